"""An instability by gradient noise: one knob, and which one."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradwatch.records import History, Measurement, ModelInfo, Recommendation
from gradwatch.rules import BatchSize, LearningRate, Momentum, TrainingLength
from gradwatch.rules.loss_course import LossCourse
from gradwatch.rules.noise_instability import NoiseInstability
from gradwatch.theory.break_even import largest_learning_rate, smallest_batch_size

Histories = Callable[..., History]
Values = Callable[..., Measurement]


def rising(step: int) -> float:
    return 0.2 * 1.001 ** (step - 1000) * (1.01 if step % 2 else 0.99)


def steep(step: int) -> float:
    return 0.2 * 1.01 ** (step - 1000)


def flat(step: int) -> float:
    return 0.2 * (1.01 if step % 3 else 0.99)


# sharpness 10, variance over the examples 400
LR = {0.9: 0.1, 0.0: 0.1}


def ratios(momentum: float, size: int) -> tuple[float, float]:
    """r and its like under the noise at these settings."""
    lr = LR[momentum]
    return tuple(
        lr / largest_learning_rate(10, variance, size, momentum=momentum) for variance in (0, 400)
    )  # type: ignore[return-value]


@pytest.fixture
def noisy(curved_run: Histories) -> Histories:
    def build(
        momentum: float = 0.9,
        size: int = 8,
        losses: Callable[[int], float | None] = rising,
        *,
        readings: int = 4,
        noise_inputs: Mapping[str, float] | None = None,
        ratio: float | None = None,
        noise_ratio: float | None = None,
        **changes: Any,
    ) -> History:
        lr = LR[momentum]
        plain, noise = ratios(momentum, size)
        limit = smallest_batch_size(lr, 10, 400, momentum=momentum)
        return curved_run(
            [plain if ratio is None else ratio] * readings,
            losses,
            noise=[noise if noise_ratio is None else noise_ratio] * readings,
            noise_inputs={"batch_size_limit": limit, **(noise_inputs or {})},
            **{"momentum": momentum, "lrs": (lr,), "batch_size": size, **changes},
        )

    return build


def advice(history: History) -> list[Recommendation]:
    rules = (Momentum(), BatchSize(), LearningRate(), TrainingLength())
    return [item for rule in rules for item in rule.advise(history)]


def test_a_large_momentum_is_what_makes_small_batches_unstable(noisy: Histories) -> None:
    plain, noise = ratios(0.9, 8)
    assert plain < 1
    assert noise > 1.2
    (found,) = advice(noisy())
    assert (found.knob, found.direction, found.severity) == ("momentum", "down", "advice")
    assert found.current == 0.9
    assert found.proposed is not None
    limit = largest_learning_rate(10, 400, 8, momentum=found.proposed)
    assert 0.1 / limit == pytest.approx(0.8)
    for printed in ("gradient noise", "multiplies the noise by 19", "minimum in common", "rough"):
        assert printed in found.reason
    assert "batch size 34 or learning rate" in found.reason  # 1.25 x 27.14, rounded up


def test_the_sharpest_direction_of_few_examples_is_their_own(noisy: Histories) -> None:
    assert advice(noisy(noise_inputs={"examples": 32.0})) == []
    assert len(advice(noisy(noise_inputs={"examples": 512.0}))) == 1


def test_a_loss_that_is_not_finite_did_not_rise_from_nan(noisy: Histories) -> None:
    (found,) = advice(noisy(losses=lambda step: rising(step) if step < 1100 else math.nan))
    assert found.reason.startswith("the loss is not finite any more")
    assert "nan" not in found.reason


def test_of_a_run_that_is_lost_the_question_is_only_why(noisy: Histories) -> None:
    """Between one and two standard errors of s² above the limit."""

    def multiplies(step: int) -> float:
        return 2.3 * 1.05 ** (step - 1000) if step >= 1000 else 2.3

    changes = {"noise_ratio": 1.5, "noise_error": 0.4}
    assert advice(noisy(losses=rising, **changes)) == []
    assert len(advice(noisy(losses=multiplies, **changes))) == 1


def test_without_momentum_the_batch(noisy: Histories) -> None:
    plain, noise = ratios(0.0, 1)
    assert plain < 1
    assert noise > 1.2
    (found,) = advice(noisy(0.0, 1))
    assert (found.knob, found.direction, found.unit) == ("batch_size", "up", "sample")
    assert (found.current, found.proposed) == (1, 5)  # 4 is at the limit
    assert "momentum" not in found.reason
    assert "learning rate" in found.reason


@pytest.mark.parametrize(
    "changes",
    [
        {"noise_inputs": {"batch_size_limit": math.nan}},
        {"noise_inputs": {"batch_size_limit": math.inf}},
        {"model": ModelInfo(train_size=10)},
    ],
)
def test_where_no_batch_helps_the_learning_rate(changes: dict[str, Any], noisy: Histories) -> None:
    (found,) = advice(noisy(0.0, 1, **changes))
    assert (found.knob, found.direction) == ("learning_rate", "down")
    assert found.proposed == pytest.approx(0.8 * largest_learning_rate(10, 400, 1))


def test_a_momentum_that_alone_cannot_help_is_left(noisy: Histories) -> None:
    # without any momentum the noise is still too much
    (found,) = advice(noisy(noise_ratio=19.0, noise_inputs={"batch_size_limit": 500.0}))
    assert found.knob == "batch_size"


SILENCES: dict[str, dict[str, Any]] = {
    "a flat loss": {"losses": flat},
    "an unknown loss": {"losses": lambda step: None},
    "two readings": {"readings": 2},
    "two of these settings": {"noise_inputs": {"readings": 2.0}},
    "a ratio of 1.19": {"noise_ratio": 1.19},
    "a ratio that one error of the variance explains": {"noise_ratio": 1.4, "ratio": 0.3},
    "a ratio within its standard error": {"noise_ratio": 2.7, "noise_error": 0.86},
    "an unconverged sharpness": {"inputs": {"relative_error": 0.06}},
    "clipping": {"inputs": {"clipped_share": 0.21}},
    "several learning rates": {"inputs": {"groups_differ": 1.0}},
    "another batch size": {"noise_inputs": {"batch_size": 16.0}},
    "an unknown batch size": {"noise_inputs": {"batch_size": math.nan}},
    "readings that share their window": {"every": 10, "losses": steep},
    "curvature that is too much by itself": {"ratio": 1.0},
}


@pytest.mark.parametrize("why", SILENCES)
def test_silent_for(why: str, noisy: Histories) -> None:
    assert advice(noisy(**SILENCES[why])) == []
    assert advice(noisy()) != []


def test_curvature_that_is_unstable_by_itself_is_no_matter_of_noise(noisy: Histories) -> None:
    (found,) = advice(noisy(ratio=1.5))
    assert found.knob == "learning_rate"
    assert "noise" not in found.reason


def test_a_run_that_started_beyond_the_threshold_hears_of_that_alone(noisy: Histories) -> None:
    def losses(step: int) -> float:
        return 2.3 if step == 0 else 9.0 * 1.001**step

    def knobs(first: float) -> list[str]:
        inputs = {"first_sharpness": first}
        return [item.knob for item in advice(noisy(losses=losses, begin=0, inputs=inputs))]

    assert knobs(50.0) == ["learning_rate"]
    assert knobs(5.0) == ["momentum"]


def test_while_noise_makes_it_unstable_nothing_else_is_said_of_it(
    noisy: Histories, noise_scale: Values, stationarity: Values
) -> None:
    def others(_: object) -> list[Measurement]:
        return [noise_scale(900.0), stationarity()]

    assert [item.knob for item in advice(noisy(others=others))] == ["momentum"]
    assert [item.knob for item in advice(noisy(0.0, 1, others=others))] == ["batch_size"]


def test_no_more_steps_while_noise_makes_it_unstable(
    noisy: Histories, stationarity: Values
) -> None:
    setting = {
        "smoothness": 10.0, "variance": 50.0, "batch_size": 128.0, "step_size": 0.01,
        "steps": 1000.0, "smoothness_is_secant": 1.0,
    }  # fmt: skip

    def build(losses: Callable[[int], float]) -> list[Recommendation]:
        values = [stationarity(0.2, **setting)]
        history = noisy(0.0, 1, losses, others=lambda step: values, lrs=(0.01,))
        return list(TrainingLength(0.05).advise(history))

    assert build(flat)
    assert not build(rising)


@given(
    curvature=st.floats(0.01, 0.99),
    noise=st.floats(1.2, 30.0),
    momentum=st.floats(0.5, 0.99),
)
def test_the_momentum_that_is_proposed_is_the_largest_stable_one(
    curvature: float, noise: float, momentum: float
) -> None:
    course = LossCourse(
        first=2.3, older=0.2, newer=0.3, newer_error=0.0, change_error=0.0, largest=0.3,
        middle=0.2, count=20, blown_up=False, trend=0.0,
    )  # fmt: skip
    value = Measurement(
        metric="noise_stability_ratio", scope="model", step=1, value=curvature + noise
    )
    state = NoiseInstability(
        measurement=value, ratio=curvature, course=course, learning_rate=0.1, momentum=momentum,
        batch_size=8.0, train_size=None,
    )  # fmt: skip

    def ratio_at(beta: float) -> float:
        """From lr (l² + k s² (1+b)/(1-b))/(2 (1+b) l), of which curvature and noise are known."""
        flat = curvature * (1 + momentum) / (1 + beta)
        return flat + noise * (1 - momentum) / (1 - beta)

    found = state.stable_momentum
    if math.isnan(found):
        # none that is smaller and at 0.8
        assert all(ratio_at(momentum * part / 100) > 0.8 for part in range(100))
        return
    assert ratio_at(found) == pytest.approx(0.8)
    middle = [found + (momentum - found) * part / 100 for part in range(1, 101)]
    assert all(ratio_at(beta) > 0.8 for beta in middle)


# --- a run that has failed since -----------------------------------------------------------------


def off(step: int) -> float:
    """Off since step 100, where nothing rises any more."""
    return (2.3 if step < 100 else 9.0) * (1.02 if step % 3 else 0.98)


@pytest.fixture
def failed(curved_run: Histories) -> Histories:
    """One reading beyond the limit of the noise, and weights that are ruined."""

    def build(
        noise: Mapping[int, float] | None = None, losses: Callable[[int], float | None] = off,
        *, reports: int = 6, ratio: float = 0.3, error: float = 0.3, **changes: Any,
    ) -> History:  # fmt: skip
        values = [0.6] * reports
        for place, value in (noise or {1: 2.8}).items():
            values[place] = value
        limit = {"batch_size_limit": 27.0, "first_sharpness": 1.0}
        inputs = {**limit, **changes.pop("inputs", {})}
        return curved_run(
            [0.4] + [ratio] * (reports - 1), losses, noise=values, noise_error=error, begin=0,
            noise_inputs={**inputs}, **{"momentum": 0.9, "batch_size": 8, **changes},
        )  # fmt: skip

    return build


def test_a_run_that_noise_has_thrown_off_hears_of_it_afterwards(failed: Histories) -> None:
    (found,) = advice(failed({1: 2.8, 2: 2.0}))
    assert (found.knob, found.severity, found.current) == ("momentum", "warning", 0.9)
    (alone,) = advice(failed({1: 2.8}))
    assert found.proposed == alone.proposed, "the first reading counts"
    for printed in ("higher than at the start", "after step 50", "2.8 of the limit at batch 8"):
        assert printed in found.reason


def test_after_100_steps_or_with_a_loss_that_is_not_finite(failed: Histories) -> None:
    def exploding(step: int) -> float:
        return math.inf if step >= 80 else 2.3

    assert [len(advice(failed(reports=reports))) for reports in (3, 4)] == [0, 1]
    assert len(advice(failed(losses=exploding, reports=3))) == 1


def test_a_run_that_noise_has_killed(failed: Histories, curved_run: Histories) -> None:
    def dead(step: int) -> float:
        return 2.3 + 0.02 * math.sin(step)

    (found,) = advice(failed(losses=dead, ratio=0.45))
    assert "the loss is back where it began" in found.reason
    assert found.severity == "advice"
    assert advice(failed(losses=dead, ratio=0.55)) == []


def low_at_first(step: int) -> float:
    """A first batch with a small loss by chance."""
    return 2.3 if step == 0 else 9.0 * (1.02 if step % 3 else 0.98)


STILL_WELL: dict[str, dict[str, Any]] = {
    "a loss that came down": {"losses": lambda step: 2.3 if step < 100 else 1.8},
    "a loss like that of the beginning": {"losses": low_at_first},
    "no loss": {"losses": lambda step: None},
    "a ratio of 1.19": {"noise": {1: 1.19}, "error": 0.01},
    "a ratio within its standard error": {"error": 0.95},
    "a reading of few examples": {"inputs": {"examples": 127.0}},
    "another batch size": {"inputs": {"batch_size": 16.0}},
    "curvature that is too much by itself": {"ratio": 1.05},
    "another optimizer": {"optimizer": "Adam", "betas": (0.9, 0.999)},
}


@pytest.mark.parametrize("why", STILL_WELL)
def test_it_was_not_the_noise_for(why: str, failed: Histories) -> None:
    assert advice(failed(**STILL_WELL[why])) == []
    assert advice(failed()) != []


@pytest.mark.parametrize("inputs", [{"clipped_share": 0.3}, {"gradient_scale": 9.0}])
def test_it_is_silent_where_the_curvature_is(
    inputs: dict[str, float], curved_run: Histories
) -> None:
    def build(**changes: float) -> list[Recommendation]:
        found = curved_run(
            [0.5] * 6, off, noise=[0.6, 2.8, 0.6, 0.6, 0.6, 0.6], noise_error=0.3, begin=0,
            noise_inputs={"batch_size_limit": 27.0}, momentum=0.9, batch_size=8, inputs=changes,
        )  # fmt: skip
        return advice(found)

    assert build() != []
    assert build(**inputs) == []

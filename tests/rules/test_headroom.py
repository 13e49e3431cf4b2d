"""Room for a larger learning rate, where neither curvature nor noise is in the way."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from gradwatch.records import History, Measurement, ModelInfo, Recommendation, StepInfo
from gradwatch.rules import BatchSize, LearningRate

Histories = Callable[..., History]
Values = Callable[..., Measurement]
GAP = math.nan


def flat(step: int) -> float:
    return 0.2 * (1.01 if step % 3 else 0.99)


def falling(step: int) -> float:
    return flat(step) * 0.999 ** (step - 1000)


def rising(step: int) -> float:
    return flat(step) * 1.001 ** (step - 1000)


def spiky(step: int) -> float:
    return 0.7 if step == 1100 else flat(step)


@pytest.fixture
def calm(curved_run: Histories, value_of: Values) -> Histories:
    """A run with a low stall ratio."""

    def build(
        ratios: Sequence[float] = (0.2,) * 5,
        losses: Callable[[int], float | None] = flat,
        *,
        stall: float = 0.05,
        error: float | None = 0.01,
        also: Callable[[StepInfo], Sequence[Measurement]] = lambda step: (),
        **changes: Any,
    ) -> History:
        def others(step: StepInfo) -> list[Measurement]:
            found = [] if math.isnan(stall) else [value_of("stall_ratio", stall, error)]
            return [*found, *also(step)]

        return curved_run(ratios, losses, others=others, **changes)

    return build


def advice(history: History) -> list[Recommendation]:
    return list(LearningRate().advise(history))


@pytest.mark.parametrize("losses", [flat, falling])
def test_the_learning_rate_may_double(losses: Callable[[int], float], calm: Histories) -> None:
    (found,) = advice(calm(losses=losses))
    assert (found.knob, found.direction, found.severity) == ("learning_rate", "up", "info")
    assert (found.current, found.proposed) == (0.1, 0.2)
    assert "up to about 0.4" in found.reason  # 0.8 x 0.1/0.2
    assert "stall ratio 0.05" in found.reason
    assert [verdict.bound for verdict in found.evidence] == ["StabilityThreshold"]


SILENCES: dict[str, dict[str, Any]] = {
    "four readings": {"ratios": (0.2,) * 4},
    "four of these settings": {"inputs": {"readings": 4.0}},
    "one reading at the edge": {"ratios": (0.2, 0.2, 0.3, 0.2, 0.2)},
    "a loss that rises": {"losses": rising},
    "a loss with a spike": {"losses": spiky},
    "an unknown loss": {"losses": lambda step: None},
    "a stall ratio that is not measured": {"stall": GAP},
    "a stall ratio above 0.1": {"stall": 0.11},
    "one that may be above 0.1": {"stall": 0.09},
    "one without an error": {"error": None},
    "a sharpness that has not converged": {"inputs": {"relative_error": 0.06}},
    "a sharpness below 0": {"inputs": {"newest": -1.0, "sharpness": -1.0}},
    "clipping": {"inputs": {"clipped_share": 0.21}},
    "clipping that nobody saw": {"inputs": {"clipped_share": math.nan}},
    "several learning rates": {"inputs": {"groups_differ": 1.0}},
    "another gradient than that of the loss": {"inputs": {"gradient_scale": 64.0}},
    "a gradient of an unknown loss": {"inputs": {"gradient_scale": math.nan}},
    "the warm-up": {"model": ModelInfo(planned_steps=100_000)},
}


@pytest.mark.parametrize("why", SILENCES)
def test_silent_for(why: str, calm: Histories) -> None:
    assert advice(calm(**SILENCES[why])) == []
    assert advice(calm()) != []


def test_silent_once_a_schedule_has_lowered_the_learning_rate(
    calm: Histories, report_of: Callable[..., Any], step_of: Callable[..., StepInfo]
) -> None:
    def after(lr: float) -> list[Recommendation]:
        history = History(ModelInfo())
        history.append(report_of(step_of(0, lrs=(lr,), loss=2.3), (), history.model))
        for report in calm()[1:]:
            history.append(report)
        return advice(history)

    assert after(0.1) != []
    assert after(0.05) != []  # a warm-up that is over
    assert after(0.11) == []


def test_silent_while_a_schedule_moves_it(calm: Histories) -> None:
    history = calm()
    moving = History(history.model)
    for place, report in enumerate(history):
        lr = 0.1 * 1.002**place
        steps = tuple(replace(step, lrs=(lr,)) for step in report.steps)
        moving.append(replace(report, steps=steps))
    assert advice(moving) == []


def test_no_further_than_any_limit_that_is_known(calm: Histories, value_of: Values) -> None:
    (noise,) = advice(calm(noise=(0.5,) * 5))
    assert noise.proposed == pytest.approx(0.8 * 0.1 / 0.5)
    assert advice(calm(noise=(0.79,) * 5)) == []
    (batch,) = advice(calm(also=lambda step: [value_of("batch_sharpness", 2 / 0.2)]))
    assert batch.proposed == pytest.approx(0.8 * 0.2)
    assert advice(calm(also=lambda step: [value_of("batch_sharpness", 2 / 0.12)])) == []


def test_noise_that_asks_for_less_wins_over_the_room(calm: Histories, stationarity: Values) -> None:
    (found,) = advice(calm(also=lambda step: [stationarity()], lrs=(0.3,)))
    assert found.direction == "down"
    # both pieces of evidence
    assert {verdict.bound for verdict in found.evidence} == {"NoiseFloor", "StabilityThreshold"}
    assert "0.2 of the stability threshold" in found.reason
    # while the loss falls the noise asks for nothing, but it is most of the bound
    assert advice(calm(also=lambda step: [stationarity(loss_trend=-3.0)], lrs=(0.3,))) == []


def test_two_reasons_to_raise_it_are_one_recommendation(
    calm: Histories, stationarity: Values
) -> None:
    slow = {"step_size": 0.1, "variance": 0.1, "steps": 1000.0}

    def build(ratio: float, smoothness: float) -> Recommendation:
        window = stationarity(0.02, **slow, smoothness=smoothness, smoothness_is_secant=1.0)
        plan = ModelInfo(planned_steps=1200)
        (found,) = advice(calm((ratio,) * 5, also=lambda step: [window], model=plan))
        return found

    alone, both = build(0.31, 0.688), build(0.2, 0.688)
    assert alone.proposed == pytest.approx(0.8 * 0.1 / 0.31)  # as far as the curvature allows
    assert both.proposed == pytest.approx(0.2)  # the smaller of the two
    assert "steps are what is missing" in both.reason
    assert "stall ratio" in both.reason
    assert len(both.evidence) == 2


def test_a_smaller_batch_waits_until_the_learning_rate_is_raised(
    calm: Histories, noise_scale: Values, stationarity: Values
) -> None:
    def build(stall: float) -> list[Recommendation]:
        values = [noise_scale(0.5), stationarity(estimates=60.0)]
        history = calm(stall=stall, also=lambda step: values)
        return [item for rule in (LearningRate(), BatchSize()) for item in rule.advise(history)]

    assert [item.knob for item in build(0.05)] == ["learning_rate"]
    assert [(item.knob, item.direction) for item in build(0.5)] == [("batch_size", "down")]


# --- the conjecture about the conditioning -------------------------------------------------------


@pytest.fixture
def early(curved_run: Histories, value_of: Values) -> Histories:
    """Far below the threshold in the first epochs, with a covariance of nearly one direction."""

    def build(
        ratios: Sequence[float] = (0.05,) * 3,
        losses: Callable[[int], float | None] = flat,
        *,
        covariance: float = 2.0,
        resolved: float = 1.0,
        also: Sequence[Measurement] = (),
        **changes: Any,
    ) -> History:
        values = [value_of("covariance_ratio", covariance, resolved=resolved), *also]
        settings = {"epoch": 1.0, **changes}
        return curved_run(ratios, losses, others=lambda step: values, **settings)

    return build


def test_an_early_phase_of_nearly_one_direction_is_information(early: Histories) -> None:
    (found,) = advice(early())
    assert (found.severity, found.proposed, found.direction) == ("info", None, "fix")
    for printed in ("ill-conditioned", "conjecture", "is 2,", "0.05 of the stability threshold"):
        assert printed in found.reason
    assert "batch norm" not in found.reason


NO_CONJECTURE: dict[str, dict[str, Any]] = {
    "two readings": {"ratios": (0.05,) * 2},
    "a reading not far below the threshold": {"ratios": (0.05, 0.05, 0.1)},
    "a run near the threshold": {"ratios": (1.0,) * 4},
    "an unresolved ratio": {"resolved": 0.0},
    "a ratio that nobody knows to be resolved": {"resolved": math.nan},
    "several directions": {"covariance": 3.0},
    "later epochs": {"epoch": 3.0},
    "a loss that rises": {"losses": rising},
    "unknown epochs": {"epoch": None},
    "later steps of the plan": {"epoch": None, "model": ModelInfo(planned_steps=10_000)},
    "later steps of the data": {"epoch": None, "model": ModelInfo(train_size=2500)},
    "clipping": {"inputs": {"clipped_share": 0.21}},
}


@pytest.mark.parametrize("why", NO_CONJECTURE)
def test_no_conjecture_for(why: str, early: Histories) -> None:
    assert advice(early(**NO_CONJECTURE[why])) == []


@pytest.mark.parametrize(
    "model", [ModelInfo(planned_steps=20_000), ModelInfo(train_size=5000, planned_steps=1)]
)
def test_the_first_epochs_are_told_from_the_plan_or_the_data(
    model: ModelInfo, early: Histories
) -> None:
    assert advice(early(epoch=None, model=model)) != []


def test_no_conjecture_where_noise_is_most_of_the_bound(
    early: Histories, stationarity: Values, value_of: Values
) -> None:
    assert advice(early(also=[stationarity(loss_trend=-3.0)], lrs=(0.3,))) == []
    assert advice(early(also=[value_of("stall_ratio", 1.5, 0.1)])) == []


def test_the_conjecture_and_the_room_are_one_recommendation(
    early: Histories, value_of: Values
) -> None:
    (found,) = advice(early((0.05,) * 5, also=[value_of("stall_ratio", 0.05, 0.01)]))
    assert found.proposed == 0.2
    assert "neither curvature nor noise" in found.reason
    assert "conjecture" in found.reason


def test_batch_normalisation_is_no_cure(early: Histories) -> None:
    from gradwatch.records import LayerInfo

    layer = LayerInfo(name="norm", kind="BatchNorm1d")
    (found,) = advice(early(model=ModelInfo(layers=(layer,))))
    assert "batch normalisation alone does not make it smooth" in found.reason

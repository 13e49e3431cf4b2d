"""Runs beyond the stability threshold, told from those that are at home there."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from gradwatch.records import History, Measurement, ModelInfo, Recommendation
from gradwatch.rules import BatchSize, LearningRate, Momentum, TrainingLength

Histories = Callable[..., History]
Values = Callable[..., Measurement]


def rising(step: int) -> float:
    """By a factor of about 1.1 in 100 steps, with a scatter of 1 %."""
    return 0.2 * 1.001 ** (step - 1000) * (1.01 if step % 2 else 0.99)


def steep(step: int) -> float:
    return 0.2 * 1.01 ** (step - 1000)


def falling(step: int) -> float:
    return 0.2 * 0.999 ** (step - 1000) * (1.01 if step % 2 else 0.99)


def flat(step: int) -> float:
    return 0.2 * (1.01 if step % 3 else 0.99)


def only(history: History) -> Recommendation:
    (found,) = LearningRate().advise(history)
    return found


def silent(history: History) -> bool:
    rules = (LearningRate(), BatchSize(), Momentum(), TrainingLength())
    return not [item for rule in rules for item in rule.advise(history)]


def test_beyond_the_threshold_with_a_rising_loss_the_step_that_is_stable(
    curved_run: Histories,
) -> None:
    found = only(curved_run([1.5] * 4, rising))
    assert (found.knob, found.severity, found.direction) == ("learning_rate", "advice", "down")
    assert (found.current, found.unit) == (0.1, "P²/L")
    assert found.proposed == pytest.approx(0.8 * 0.1 / 1.5)
    assert [verdict.bound for verdict in found.evidence] == ["StabilityThreshold"]
    assert "1.5 of the stability threshold 20" in found.reason


def test_the_newest_ratio_counts(curved_run: Histories) -> None:
    assert only(curved_run([1.3, 1.5, 2.0], rising)).proposed == pytest.approx(0.8 * 0.1 / 2.0)


@pytest.mark.parametrize("losses", [falling, flat, lambda step: None])
def test_silent_unless_the_loss_rises(
    losses: Callable[[int], float | None], curved_run: Histories
) -> None:
    assert silent(curved_run([1.5] * 4, losses))


@pytest.mark.parametrize("ratio", [0.3, 0.8, 1.0, 1.1, 1.19])
@pytest.mark.parametrize("losses", [rising, falling, flat])
def test_at_the_edge_of_stability_all_rules_are_silent(
    ratio: float, losses: Callable[[int], float], curved_run: Histories, noise_scale: Values,
    value_of: Values,
) -> None:  # fmt: skip
    # a noise scale and a stall ratio with which they would speak far below the edge
    def others(_: object) -> list[Measurement]:
        return [noise_scale(900.0), value_of("stall_ratio", 0.01, 0.001)]

    assert silent(curved_run([ratio] * 6, losses, others=others))
    assert not silent(curved_run([0.1] * 6, falling, others=others))


def test_a_rise_of_less_than_5_percent_is_none(curved_run: Histories) -> None:
    def slightly(step: int) -> float:
        return 0.2 * 1.0004 ** (step - 1000)

    assert silent(curved_run([1.5] * 3, slightly))
    assert not silent(curved_run([1.5] * 5, slightly, every=100))


def test_a_rise_within_the_scatter_is_none(curved_run: Histories) -> None:
    def scattered(step: int) -> float:
        return 0.2 + 0.02 * (step - 1000) / 100 + (0.15 if step % 2 else -0.15)

    def clear(step: int) -> float:
        return 0.2 + 0.02 * (step - 1000) / 100 + (0.005 if step % 2 else -0.005)

    assert silent(curved_run([1.5] * 3, scattered))
    assert not silent(curved_run([1.5] * 3, clear))


SILENCES: dict[str, dict[str, Any]] = {
    "two readings": {"ratios": [1.5, 1.5]},
    "two of these settings": {"inputs": {"readings": 2.0}},
    "an unknown number of them": {"inputs": {"readings": math.nan}},
    "one below the edge": {"ratios": [1.5, 1.5, 1.1, 1.5]},
    "a sharpness that has not converged": {"inputs": {"relative_error": 0.06}},
    "an unknown error": {"inputs": {"relative_error": math.inf}},
    "a sharpness below 0": {"inputs": {"newest": -1.0, "sharpness": -1.0}},
    "a last reading below 0": {"inputs": {"newest": -1.0}},
    "clipping": {"inputs": {"clipped_share": 0.21}},
    "several learning rates": {"inputs": {"groups_differ": 1.0}},
    "nobody knows how many": {"inputs": {"groups_differ": math.nan}},
    "few examples": {"inputs": {"examples": 127.0}},
    "steps along another gradient": {"inputs": {"gradient_scale": 0.4}},
    "readings that share their window": {"every": 10, "losses": steep},
}


@pytest.mark.parametrize("why", SILENCES)
def test_silent_for(why: str, curved_run: Histories) -> None:
    changes = {"ratios": [1.5] * 4, "losses": rising, **SILENCES[why]}
    assert silent(curved_run(changes.pop("ratios"), changes.pop("losses"), **changes))
    assert not silent(curved_run([1.5] * 4, rising))


def test_silent_where_the_last_reading_alone_cannot_be_relied_on(curved_run: Histories) -> None:
    history = curved_run([1.5] * 5, rising)
    last = history[-1]
    sharpness, ratio = last.measurements
    for wrong in (replace(sharpness, value=-1.0), replace(sharpness, standard_error=2.0)):
        history = curved_run([1.5] * 5, rising)
        history.replace_newest(replace(last, measurements=(wrong, ratio)))
        assert silent(history)


def test_the_error_that_comes_with_the_ratio_is_enough(curved_run: Histories) -> None:
    def without_sharpness(error: float) -> History:
        found = History(ModelInfo())
        for report in curved_run([1.5] * 4, rising, inputs={"relative_error": error}):
            found.append(replace(report, measurements=report.measurements[1:]))
        return found

    assert not silent(without_sharpness(0.04))
    assert silent(without_sharpness(0.06))


def test_readings_50_steps_apart_count_each(curved_run: Histories) -> None:
    assert silent(curved_run([1.5] * 10, steep, every=10))
    assert not silent(curved_run([1.5] * 11, steep, every=10))


def test_gradient_noise_that_is_known_lowers_the_limit(curved_run: Histories) -> None:
    known = curved_run([1.5] * 4, rising, noise=[2.0] * 4)
    assert only(known).proposed == pytest.approx(0.8 * 0.1 / 2.0)
    newest = curved_run([1.5] * 4, rising, noise=[4.0, 4.0, 4.0, 2.0])
    assert only(newest).proposed == pytest.approx(0.8 * 0.1 / 2.0)
    lower = curved_run([1.5] * 4, rising, noise=[1.0] * 4)
    assert only(lower).proposed == pytest.approx(0.8 * 0.1 / 1.5)


def test_silent_after_the_settings_have_changed(
    curved_run: Histories, step_of: Callable[..., Any], report_of: Callable[..., Any]
) -> None:
    def then(**settings: object) -> History:
        history = curved_run([1.5] * 4, rising)
        step = step_of(1200, **{"lrs": (0.1,), "loss": rising(1200), **settings})
        history.append(report_of(step, (), history.model))
        return history

    assert not silent(then())
    assert not silent(then(lrs=(0.097,)))  # a slow schedule
    assert silent(then(lrs=(0.09,)))
    assert silent(then(lrs=(0.1, 0.1)))
    assert silent(then(momentum=0.5))
    assert silent(then(nesterov=True))
    assert silent(then(optimizer="Adam"))


def test_readings_before_a_change_do_not_count(
    curved_run: Histories, report_of: Callable[..., Any]
) -> None:
    history = curved_run([1.5] * 3, rising)
    for report in curved_run([1.5] * 2, rising, begin=1150, lrs=(0.2,))[1:]:
        history.append(report)
    assert silent(history)


def test_divergence_is_told_where_nobody_saw_whether_gradients_were_clipped(
    curved_run: Histories,
) -> None:
    assert not silent(curved_run([1.5] * 4, rising, inputs={"clipped_share": math.nan}))


def test_an_unconverged_reading_among_them_is_left_out(curved_run: Histories) -> None:
    history = curved_run([1.5, 1.5, 1.0, 1.5], rising)
    assert silent(history)
    third = history[3]
    sharpness, ratio = third.measurements
    wrong = replace(third, measurements=(replace(sharpness, standard_error=9.0), ratio))
    again = History(history.model)
    for report in (*history[:3], wrong, history[4]):
        again.append(report)
    assert not silent(again)


@pytest.mark.parametrize(
    ("optimizer", "betas", "begin", "speaks"),
    [
        ("Adam", (0.9, 0.999), 99, False),
        ("Adam", (0.9, 0.999), 100, True),
        ("AdamW", (0.9, 0.95), 9, False),
        ("AdamW", (0.9, 0.95), 10, True),
        ("RMSprop", None, 99, False),
        ("RMSprop", None, 100, True),
    ],
)
def test_adam_is_spoken_of_once_its_preconditioner_has_settled(
    optimizer: str, betas: tuple[float, float] | None, begin: int, *, speaks: bool,
    curved_run: Histories,
) -> None:  # fmt: skip
    settings: dict[str, Any] = {"optimizer": optimizer, "betas": betas, "momentum": None}
    history = curved_run([1.5] * 3, rising, begin=begin, **settings)
    assert silent(history) != speaks
    if speaks:
        assert only(history).proposed == pytest.approx(0.8 * 0.1 / 1.5)
        assert only(history).unit == "P"


# --- a run that diverges at once -----------------------------------------------------------------


START = {"first_sharpness": 50.0, "first_learning_rate": 0.1, "readings": 1.0}
GAP = math.nan  # a report without a reading


def exploding(step: int) -> float:
    return 2.3 * 3.0**step if step < 30 else math.inf


def stuck(step: int) -> float:
    """A saturated network."""
    return 2.3 if step == 0 else 40.9 * (1.01 if step % 3 else 0.99)


@pytest.mark.parametrize(
    ("losses", "words"), [(exploding, "not finite"), (stuck, "against 2.3) and does not fall")]
)
def test_a_run_that_diverges_at_once_hears_of_the_curvature_at_its_start(
    losses: Callable[[int], float], words: str, curved_run: Histories
) -> None:
    assert silent(curved_run([2.5], losses, begin=0, inputs=START))  # of one loss
    found = only(curved_run([2.5, GAP, GAP, GAP], losses, begin=0, inputs=START))
    assert (found.severity, found.direction) == ("warning", "down")
    assert found.proposed == pytest.approx(0.5 * 2 / 50)
    assert words in found.reason
    assert "sharpness at step 0 was 50 = 2.5 of the stability threshold" in found.reason
    assert "restart" in found.reason
    assert "warm-up" in found.reason


def test_a_run_that_is_thrown_up_gets_100_steps_to_come_down(curved_run: Histories) -> None:
    """Unless its loss is not finite any more: there is nothing to wait for."""

    def warned(losses: Callable[[int], float], steps: int) -> bool:
        history = curved_run([2.5] + [GAP] * (steps // 10), losses, begin=0, every=10, inputs=START)
        return any(item.severity == "warning" for item in LearningRate().advise(history))

    assert [warned(stuck, steps) for steps in (100, 110)] == [False, True]
    assert warned(exploding, 30)


def test_the_threshold_of_momentum_is_that_of_momentum(curved_run: Histories) -> None:
    heavy = {**START, "threshold": 38.0}
    found = only(curved_run([50 / 38, GAP, GAP, GAP], stuck, begin=0, inputs=heavy, momentum=0.9))
    assert found.proposed == pytest.approx(0.5 * 3.8 / 50)
    lower = {**heavy, "first_sharpness": 37.0}
    assert silent(curved_run([37 / 38, GAP, GAP, GAP], stuck, begin=0, inputs=lower, momentum=0.9))


@pytest.mark.parametrize("now", [0.001, 1e6, -1.0, math.nan, math.inf])
def test_the_curvature_of_ruined_weights_does_not_count(now: float, curved_run: Histories) -> None:
    history = curved_run([2.5, GAP, GAP, 0.5], stuck, begin=0, inputs=START)
    report = history[3]
    sharpness, ratio = report.measurements
    ruined = (
        replace(sharpness, value=20 * now),
        replace(ratio, value=now, inputs={**ratio.inputs, "relative_error": math.nan}),
    )
    history.replace_newest(replace(report, measurements=ruined))
    assert only(history).proposed == pytest.approx(0.5 * 2 / 50)


def test_a_start_just_beyond_the_threshold_is_told_of_a_loss_that_multiplies(
    curved_run: Histories,
) -> None:
    begun = {**START, "first_sharpness": 21.0}  # 1.05 of the threshold

    def said(factor: float) -> bool:
        losses = [2.3 * factor**step for step in range(200)]
        history = curved_run([1.05, GAP, GAP, GAP], losses.__getitem__, begin=0, inputs=begun)
        found = LearningRate().advise(history)
        return any(item.severity == "warning" for item in found)

    assert said(1.2)
    assert not said(1.001)
    below = {**START, "first_sharpness": 19.0}
    off = curved_run([0.95, GAP, GAP, GAP], lambda step: 2.3 * 1.2**step, begin=0, inputs=below)
    assert silent(off)


def test_the_curvature_of_weights_that_are_off_lowers_by_a_factor_only(
    curved_run: Histories,
) -> None:
    """One reading before, a parabola would have been stable."""
    calm = {"first_sharpness": 16.0, "readings": 2.0}
    found = only(curved_run([0.8, 700_000.0], exploding, begin=0, inputs=calm))
    assert found.proposed == pytest.approx(0.8 * 0.1 / 8)


def test_a_run_that_comes_beyond_the_edge_later(curved_run: Histories) -> None:
    calm = {"first_sharpness": 8.0, "readings": 3.0}
    found = only(curved_run([0.4, 0.9, 1.25, 1.3, 1.6], stuck, begin=0, inputs=calm))
    # the healthy end of what was seen beyond the edge
    assert found.proposed == pytest.approx(0.8 * 0.1 / 1.25)
    assert found.severity == "warning"
    assert silent(curved_run([0.4, 0.9, 1.25, 1.3, 1.1], stuck, begin=0, inputs=calm))


def catapult(step: int) -> float:
    """Up to 40 and then far below the first loss."""
    return 2.3 if step == 0 else 40.0 * 0.8**step + 0.5


def slowly_down(step: int) -> float:
    return 2.3 if step == 0 else 40.0 - 0.2 * step


HEALTHY: dict[str, dict[str, Any]] = {
    "a catapult": {"losses": catapult},
    "a loss that falls from above": {"losses": slowly_down},
    "a loss like the first one": {"losses": lambda step: 2.3 + 0.05 * math.sin(step)},
    "no loss": {"losses": lambda step: None},
    "one start below the edge": {"inputs": {**START, "first_sharpness": 23.0}},
    "a start with a small step": {"inputs": {**START, "first_learning_rate": 0.01}},
    "clipping": {"inputs": {**START, "clipped_share": 0.21}},
    "several learning rates": {"inputs": {**START, "groups_differ": 1.0}},
    "an unconverged start": {"inputs": {**START, "relative_error": 0.06}},
    "no start": {"inputs": {"first_sharpness": math.nan}},
    "Adam": {"optimizer": "Adam", "betas": (0.9, 0.999)},
}


@pytest.mark.parametrize("why", HEALTHY)
def test_no_divergence_for(why: str, curved_run: Histories) -> None:
    changes = {"losses": stuck, "inputs": START, **HEALTHY[why]}
    losses = changes.pop("losses")
    history = curved_run([0.5, GAP, GAP, GAP], losses, begin=0, **changes)
    assert [item for item in LearningRate().advise(history) if item.severity == "warning"] == []
    assert not silent(curved_run([0.5, GAP, GAP, GAP], stuck, begin=0, inputs=START))


def test_of_few_examples_only_a_loss_that_is_lost_is_told(curved_run: Histories) -> None:
    """Their curvature is too large, and a fine-tuning may begin at a loss that is low by chance."""

    def warned(loss: float) -> bool:
        def losses(step: int) -> float:
            return 2.3 if step == 0 else loss * (1.01 if step % 3 else 0.99)

        few = {**START, "examples": 32.0}
        history = curved_run([2.5, GAP, GAP, GAP], losses, begin=0, inputs=few)
        return any(item.severity == "warning" for item in LearningRate().advise(history))

    assert warned(40.0)
    assert not warned(20.0)


# --- a run that has died -------------------------------------------------------------------------


DEAD = [0.4, 3.0, 1.5, 0.9, 0.2, 0.1, 0.1]
LATER = {"first_sharpness": 8.0}


def dead(step: int) -> float:
    """Thrown up, and at the loss of no knowledge ever since."""
    return 7.0 if step == 50 else 2.3 + 0.02 * math.sin(step)


def test_a_run_that_has_died_at_the_edge(curved_run: Histories) -> None:
    found = only(curved_run(DEAD, dead, begin=0, inputs=LATER))
    assert (found.severity, found.direction) == ("advice", "down")
    assert found.proposed == pytest.approx(0.8 * 0.1 / 1.5)
    for printed in ("the loss is back where it began", "1.5 of the stability", "at step 100"):
        assert printed in found.reason
    # 100 steps after the last reading beyond the edge, and nine losses
    assert [silent(curved_run(DEAD[:count], dead, begin=0, inputs=LATER)) for count in (5, 6)] == [
        True, False,
    ]  # fmt: skip


def learnt(step: int) -> float:
    return 0.7 * dead(step) if step > 100 else dead(step)


def coming_down(step: int) -> float:
    return 2.3 if step < 100 else 2.3 - 0.0005 * (step - 100)


ALIVE: dict[str, dict[str, Any]] = {
    "a loss below the first one": {"losses": learnt},
    "a catapult on its way down": {"losses": coming_down},
    "a loss that scatters": {"losses": lambda step: 2.3 + 0.9 * math.sin(step)},
    "no loss": {"losses": lambda step: None},
    "a curvature that is still there": {"ratios": [*DEAD[:-1], 0.6]},
    "no reading beyond the edge": {"ratios": [0.4, 1.1, 1.1, 0.9, 0.2, 0.1, 0.1]},
    "few examples": {"inputs": {**LATER, "examples": 32.0}},
    "clipping": {"inputs": {**LATER, "clipped_share": 0.3}},
    "another gradient": {"inputs": {**LATER, "gradient_scale": 9.0}},
    "Adam": {"optimizer": "Adam", "betas": (0.9, 0.99), "momentum": None},
}


@pytest.mark.parametrize("why", ALIVE)
def test_nothing_has_died_with(why: str, curved_run: Histories) -> None:
    changes = {"ratios": DEAD, "losses": dead, "inputs": LATER, **ALIVE[why]}
    ratios, losses = changes.pop("ratios"), changes.pop("losses")
    assert silent(curved_run(ratios, losses, begin=0, **changes))


def test_adam_diverges_by_three_readings(curved_run: Histories) -> None:
    adam: dict[str, Any] = {"optimizer": "Adam", "betas": (0.9, 0.999), "momentum": None}

    def losses(step: int) -> float:
        return 2.3 if step <= 1000 else 4.0 + 0.01 * (step % 3)

    assert silent(curved_run([1.5, 1.5, GAP], losses, **adam))
    assert only(curved_run([1.5, 1.5, 1.5], losses, **adam)).severity == "warning"


def test_secants_are_for_runs_whose_stability_is_not_known(
    curved_run: Histories, stationarity: Values
) -> None:
    secants = {
        "loss_recent": 40.9, "loss_trend": 0.3, "beyond_edge": 0.9, "edge_share": 0.95,
        "smoothness": 200.0, "step_size": 0.1, "smoothness_is_secant": 1.0, "smallest_loss": 2.1,
    }  # fmt: skip

    def others(_: object) -> list[Measurement]:
        return [stationarity(30.0, **secants)]

    assert silent(curved_run([0.8] * 4, flat, others=others))
    found = only(curved_run([GAP] * 4, flat, others=others))
    assert found.proposed == pytest.approx(0.5 / 200)
    unconverged = curved_run([0.8] * 4, flat, others=others, inputs={"relative_error": 0.06})
    assert only(unconverged).proposed == pytest.approx(0.5 / 200)


def test_a_sharpness_that_has_not_converged_is_no_smoothness(
    curved_run: Histories, stationarity: Values
) -> None:
    exact = {
        "loss_recent": 40.9, "loss_trend": 0.3, "beyond_edge": 0.9, "edge_share": 0.95,
        "smoothness": 200.0, "step_size": 0.1, "smoothness_is_secant": 0.0, "smallest_loss": 2.1,
    }  # fmt: skip

    def others(_: object) -> list[Measurement]:
        return [stationarity(30.0, **exact)]

    assert silent(curved_run([10.0], flat, others=others, inputs={"relative_error": 0.06}))
    assert not silent(curved_run([GAP], flat, others=others))


# --- how it meets the noise ----------------------------------------------------------------------


def test_curvature_and_noise_that_both_ask_for_less_are_one_recommendation(
    curved_run: Histories, stationarity: Values
) -> None:
    def others(_: object) -> list[Measurement]:
        return [stationarity()]

    def build(ratio: float, losses: Callable[[int], float]) -> Recommendation:
        return only(curved_run([ratio] * 4, losses, others=others, lrs=(0.3,)))

    noise = build(0.1, flat)
    both = build(1.5, rising)
    assert noise.proposed is not None
    assert both.proposed == min(noise.proposed, 0.8 * 0.3 / 1.5)
    assert {verdict.bound for verdict in both.evidence} == {"StabilityThreshold", "NoiseFloor"}
    assert "noise" in both.reason
    assert "stability threshold" in both.reason


def test_no_more_steps_while_the_training_is_unstable(
    curved_run: Histories, stationarity: Values
) -> None:
    setting = {
        "smoothness": 10.0, "variance": 50.0, "batch_size": 128.0, "step_size": 0.01,
        "steps": 1000.0, "smoothness_is_secant": 1.0,
    }  # fmt: skip

    def build(losses: Callable[[int], float]) -> History:
        def others(_: object) -> list[Measurement]:
            return [stationarity(0.2, **setting)]

        return curved_run([1.5] * 4, losses, others=others, lrs=(0.01,), model=ModelInfo())

    assert list(TrainingLength(0.05).advise(build(falling)))
    assert not list(TrainingLength(0.05).advise(build(rising)))

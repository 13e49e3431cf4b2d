"""One learning rate at a time, from the reason that weighs most."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from gradwatch.errors import ConfigError
from gradwatch.records import History, Measurement, ModelInfo, Recommendation, Report, StepInfo
from gradwatch.rules import LearningRate
from gradwatch.theory.gradient_convergence import best_learning_rate, noise_floor

Values = Callable[..., Measurement]
Histories = Callable[..., History]


def only(rule: LearningRate, history: History) -> Recommendation:
    (found,) = rule.advise(history)
    return found


def silent(history: History, target: float | None = None) -> bool:
    return list(LearningRate(target).advise(history)) == []


# --- the noise floor -----------------------------------------------------------------------------


def test_at_the_noise_floor_the_step_whose_floor_is_the_target(
    history_of: Histories, stationarity: Values
) -> None:
    found = only(LearningRate(0.005), history_of(stationarity()))
    assert (found.knob, found.direction, found.unit) == ("learning_rate", "down", "P²/L")
    assert (found.current, found.severity) == (0.3, "advice")
    assert found.proposed == pytest.approx(0.0771, rel=2e-3)  # from rounded constants
    assert noise_floor(0.688, 1.47, 8, found.proposed or 0) == pytest.approx(0.005)
    assert found.evidence[0].bound == "NoiseFloor"
    for printed in ("0.0219", "L = 0.688", "1.47", "batch 8", "lr 0.3", "0.005", "1500 steps"):
        assert printed in found.reason


def test_the_target_is_a_quarter_of_what_is_measured(
    history_of: Histories, stationarity: Values
) -> None:
    default = only(LearningRate(), history_of(stationarity()))
    assert default.proposed == only(LearningRate(0.0219 / 4), history_of(stationarity())).proposed


@pytest.mark.parametrize("trend", [-3.0, math.nan])
def test_silent_unless_the_loss_is_flat(
    trend: float, history_of: Histories, stationarity: Values
) -> None:
    assert silent(history_of(stationarity(loss_trend=trend)))


def test_promises_no_loss(history_of: Histories, stationarity: Values) -> None:
    found = only(LearningRate(0.005), history_of(stationarity()))
    assert "sigma² usually falls with the loss" in found.reason
    assert "need not mean a lower loss" in found.expected


def test_with_momentum_the_step_size_is_turned_back_into_a_learning_rate(
    history_of: Histories, stationarity: Values
) -> None:
    heavy = stationarity(momentum=0.9)
    found = only(LearningRate(0.005), history_of(heavy, lrs=(0.03,), momentum=0.9))
    assert found.current == pytest.approx(0.03)
    assert found.proposed == pytest.approx(0.00771, rel=2e-3)
    assert "heuristic" in found.reason


def test_says_that_an_l_from_secants_is_rough(history_of: Histories, stationarity: Values) -> None:
    assert (
        "secant" in only(LearningRate(), history_of(stationarity(smoothness_is_secant=1.0))).reason
    )
    assert "secant" not in only(LearningRate(), history_of(stationarity())).reason


@pytest.mark.parametrize(
    ("value", "error", "speaks"),
    [(0.7, 0.03, True), (0.7, 0.04, False), (0.7, None, False), (-0.7, 0.01, False)],
)
def test_silent_on_an_l_that_is_a_sharpness_which_has_not_converged(
    value: float, error: float | None, *, speaks: bool, history_of: Histories,
    stationarity: Values, value_of: Values,
) -> None:  # fmt: skip
    sharpness = value_of("sharpness", value, error)
    assert silent(history_of(stationarity(), sharpness)) != speaks
    # an L from secants is none of its business
    assert not silent(history_of(stationarity(smoothness_is_secant=1.0), sharpness))


def test_silent_when_the_target_is_reached(history_of: Histories, stationarity: Values) -> None:
    assert silent(history_of(stationarity()), target=0.03)
    # the floor is 0.0211, the gradient happens to be below it
    assert silent(history_of(stationarity(0.01)), target=0.011)


def test_silent_between_the_two_limits(history_of: Histories, stationarity: Values) -> None:
    # share of the noise 0.0211/(0.0211 + 0.0214)
    assert silent(history_of(stationarity(steps=400.0)))


def test_silent_far_below_the_floor(history_of: Histories, stationarity: Values) -> None:
    assert silent(history_of(stationarity(0.004)))


SILENCES = {
    "few estimates": {"estimates": 199.0},
    "clipping": {"clipped_share": 0.06},
    "clipping that nobody saw": {"clipped_share": math.nan},
    "a new learning rate": {"lr_changes": 1.0},
    "a new batch size": {"batch_changes": 1.0},
    "weight decay": {"weight_decay": 0.01},
    "several learning rates": {"groups_differ": 1.0},
    "a new loss scale": {"loss_scale_changes": 1.0},
    "a loss below its bound": {"smallest_loss": -1.0},
    "Adam's state": {"from_adam": 1.0},
    "an unknown L": {"smoothness": math.nan},
}


@pytest.mark.parametrize("why", SILENCES)
def test_silent_for(why: str, history_of: Histories, stationarity: Values) -> None:
    assert silent(history_of(stationarity(**SILENCES[why])))


@pytest.mark.parametrize("optimizer", ["Adam", "AdamW", "RMSprop", "LARS", "Lion", "", "SGD+Adam"])
def test_silent_for_other_optimizers(
    optimizer: str, history_of: Histories, stationarity: Values
) -> None:
    assert silent(history_of(stationarity(), optimizer=optimizer))


def test_silent_when_an_assumption_broke(history_of: Histories, stationarity: Values) -> None:
    broken = history_of(stationarity(0.06))
    assert broken[-1].verdicts[0].status == "violated"
    assert silent(broken)


def test_silent_on_a_verdict_of_other_settings(
    history_of: Histories, stationarity: Values, report_of: Callable[..., Report],
    step_of: Callable[..., StepInfo],
) -> None:  # fmt: skip
    history = history_of(stationarity())
    history.append(report_of(step_of(1550), (), history.model))
    assert not silent(history)  # not every report has a new estimate
    history.append(report_of(step_of(1600, lrs=(0.1,)), (), history.model))
    assert silent(history)


# --- the edge of stability -----------------------------------------------------------------------


@pytest.mark.parametrize("trend", [-3.0, 0.0])
@pytest.mark.parametrize("beyond", [0.0, 0.3])
def test_at_the_edge_of_stability_there_is_nothing_to_say(
    beyond: float, trend: float, history_of: Histories, stationarity: Values
) -> None:
    edge = {"smoothness": 6.6 if beyond else 6.2, "edge_share": 0.4, "beyond_edge": beyond}
    assert silent(history_of(stationarity(0.5, **edge, loss_trend=trend)))


# --- too few steps -------------------------------------------------------------------------------


def test_limited_by_its_steps_the_best_learning_rate(
    history_of: Histories, stationarity: Values
) -> None:
    slow = {"step_size": 0.1, "variance": 0.1, "steps": 1000.0}
    history = history_of(
        stationarity(0.02, **slow), lrs=(0.1,), model=ModelInfo(planned_steps=1000)
    )
    found = only(LearningRate(), history)
    assert found.proposed == pytest.approx(best_learning_rate(2.3026, 0.688, 0.1, 8, 1000))
    assert (found.current, found.direction, found.severity) == (0.1, "up", "info")


@pytest.mark.parametrize("target", [None, 0.01])
def test_silent_without_a_plan(
    target: float | None, history_of: Histories, stationarity: Values
) -> None:
    slow = {"step_size": 0.1, "variance": 0.1, "steps": 1000.0}
    assert silent(history_of(stationarity(0.02, **slow), lrs=(0.1,)), target)


def test_never_above_half_of_the_guarantee(history_of: Histories, stationarity: Values) -> None:
    slow, plan = {"variance": 1e-9, "steps": 1000.0}, ModelInfo(planned_steps=1000)

    def at(lr: float) -> History:
        return history_of(stationarity(0.005, step_size=lr, **slow), lrs=(lr,), model=plan)

    assert only(LearningRate(), at(0.1)).proposed == pytest.approx(0.5 / 0.688)
    assert silent(at(0.8))
    # nor above ten times the present one
    assert only(LearningRate(), at(0.02)).proposed == pytest.approx(0.2)


def test_the_best_learning_rate_is_that_of_the_planned_steps(
    history_of: Histories, stationarity: Values
) -> None:
    slow = stationarity(0.2, step_size=0.01, variance=0.1, steps=1000.0)

    def planned(steps: int) -> History:
        return history_of(slow, lrs=(0.01,), model=ModelInfo(planned_steps=steps))

    best = best_learning_rate(2.3026, 0.688, 0.1, 8, 100_000)
    assert only(LearningRate(), planned(100_000)).proposed == pytest.approx(best)
    assert silent(planned(3_500_000))  # 40 % of the bound is noise then


# --- a training that stalls ----------------------------------------------------------------------


def stalling(
    make: Values, scale: Measurement, window: Measurement, *ratios: float
) -> tuple[Measurement, ...]:
    readings = [
        replace(make("stall_ratio", ratio, 0.04), step=1500 - 100 * back)
        for back, ratio in enumerate(reversed(ratios))
    ]
    return (scale, window, *reversed(readings))


def test_a_step_that_adds_as_much_as_it_removes_is_cut_to_a_third(
    history_of: Histories, stationarity: Values, noise_scale: Values, value_of: Values
) -> None:
    window = stationarity(estimates=60.0)
    found = only(
        LearningRate(), history_of(*stalling(value_of, noise_scale(100), window, 1.2, 1.1, 1.5))
    )
    assert found.proposed == pytest.approx(0.09)
    assert found.severity == "advice"
    assert "1.2" in found.reason
    assert "100" in found.reason


def test_who_names_a_target_hears_of_it_while_the_loss_falls(
    history_of: Histories, stationarity: Values
) -> None:
    falling = history_of(stationarity(loss_trend=-9.0))
    (named,) = LearningRate(0.005).advise(falling)
    (flat,) = LearningRate(0.005).advise(history_of(stationarity(loss_trend=0.0)))
    assert (named.severity, flat.severity) == ("info", "advice")
    assert named.proposed == flat.proposed
    assert not list(LearningRate().advise(falling))


@pytest.mark.parametrize(
    ("ratios", "trend"),
    [
        ((1.2, 0.9, 1.5), 0.0),
        ((1.2, 1.07, 1.5), 0.0),  # not significantly above 1
        ((1.2, 1.5), 0.0),
        ((1.2, 1.3, 1.5), -4.0),
    ],
)
def test_silent_unless_it_stalls_for_three_readings_on_a_flat_loss(
    ratios: tuple[float, ...], trend: float, history_of: Histories, stationarity: Values,
    noise_scale: Values, value_of: Values,
) -> None:  # fmt: skip
    window = stationarity(estimates=60.0, loss_trend=trend)
    assert silent(history_of(*stalling(value_of, noise_scale(100), window, *ratios)))


def test_readings_that_share_their_window_count_once(
    history_of: Histories, stationarity: Values, noise_scale: Values, value_of: Values
) -> None:
    near = [replace(value_of("stall_ratio", 1.5, 0.1), step=1400 + 10 * i) for i in range(10)]
    values = (noise_scale(100), stationarity(estimates=60.0), *near)
    assert silent(history_of(*values))


def test_readings_without_a_standard_error_prove_nothing(
    history_of: Histories, stationarity: Values, noise_scale: Values, value_of: Values
) -> None:
    values = stalling(value_of, noise_scale(100), stationarity(estimates=60.0), 1.2, 1.1, 1.5)
    bare = [replace(item, standard_error=None) for item in values[2:]]
    assert silent(history_of(*values[:2], *bare))


def test_a_stall_is_not_told_with_momentum(
    history_of: Histories, stationarity: Values, noise_scale: Values, value_of: Values
) -> None:
    values = stalling(value_of, noise_scale(100), stationarity(estimates=60.0), 1.2, 1.1, 1.5)
    assert silent(history_of(*values, momentum=0.9))


NOISE_SILENCES = {
    "clipping": {"clipped_share": 0.21},
    "clipping that nobody saw": {"clipped_share": math.nan},
    "few estimates": {"estimates": 49.0},
    "a heavy tail": {"variance_median": 0.5},
    "no significant gradient": {"error": 60.0},
}


@pytest.mark.parametrize("why", NOISE_SILENCES)
def test_a_stall_is_not_told_for(
    why: str, history_of: Histories, stationarity: Values, noise_scale: Values, value_of: Values
) -> None:
    scale = noise_scale(100, **NOISE_SILENCES[why])
    values = stalling(value_of, scale, stationarity(estimates=60.0), 1.2, 1.1, 1.5)
    assert silent(history_of(*values, model=ModelInfo(train_size=1000)))


def test_a_stall_of_batches_of_half_of_the_data_is_not_told(
    history_of: Histories, stationarity: Values, noise_scale: Values, value_of: Values
) -> None:
    values = stalling(value_of, noise_scale(100), stationarity(estimates=60.0), 1.2, 1.1, 1.5)
    assert silent(history_of(*values, model=ModelInfo(train_size=16)))
    assert not silent(history_of(*values, model=ModelInfo(train_size=17)))


@pytest.mark.parametrize("optimizer", ["Adam", "AdamW"])
def test_a_stall_is_not_told_to(
    optimizer: str, history_of: Histories, stationarity: Values, noise_scale: Values,
    value_of: Values,
) -> None:  # fmt: skip
    values = stalling(value_of, noise_scale(100), stationarity(estimates=60.0), 1.2, 1.1, 1.5)
    assert silent(history_of(*values, optimizer=optimizer))


def test_a_stall_is_not_told_in_the_warm_up(
    history_of: Histories, stationarity: Values, noise_scale: Values, value_of: Values
) -> None:
    values = stalling(value_of, noise_scale(100), stationarity(estimates=60.0), 1.2, 1.1, 1.5)
    assert silent(history_of(*values, model=ModelInfo(planned_steps=75_001)))
    assert not silent(history_of(*values, model=ModelInfo(planned_steps=75_000)))


def test_readings_of_another_learning_rate_are_forgotten(
    history_of: Histories, stationarity: Values, noise_scale: Values, value_of: Values,
    report_of: Callable[..., Report], step_of: Callable[..., StepInfo],
) -> None:  # fmt: skip
    window = stationarity(estimates=60.0)

    def reading(history: History, lr: float) -> History:
        step = step_of(1600, lrs=(lr,))
        newest = replace(value_of("stall_ratio", 1.5, 0.1), step=1600)
        history.append(report_of(step, (noise_scale(100), window, newest), history.model))
        return history

    values = stalling(value_of, noise_scale(100), window, 1.5, 1.5)
    assert not silent(reading(history_of(*values), 0.3))
    assert silent(reading(history_of(*values), 0.2))


# --- a batch size that was changed ---------------------------------------------------------------


@pytest.fixture
def changed(
    step_of: Callable[..., StepInfo], report_of: Callable[..., Report], noise_scale: Values,
    value_of: Values,
) -> Histories:  # fmt: skip
    """A run whose batch size went from 64 to another one, each for 12 sampled steps."""

    def build(
        new: int = 512, scale: float = 100.0, *, curvature: float = 0.0, kept: int = 12,
        odd: Sequence[int] = (),
        clipped: float = 0.0, curvature_of: str = "sharpness", error: float = 0.01,
        first: Sequence[Measurement] = (), model: ModelInfo | None = None,
        after: dict[str, object] | None = None,
        **settings: object,
    ) -> History:  # fmt: skip
        history = History(model or ModelInfo())
        settings = {"lrs": (0.1,), **settings}
        for index in range(12 + kept):
            old = index < 12
            step = {**settings, "batch_size": 64 if old else new, **({} if old else after or {})}
            step |= {"batch_size": 17} if index in odd else {}
            values = [noise_scale(scale, batch_size=float(new), clipped_share=clipped)]
            values += [value_of(curvature_of, curvature, error * curvature)] if curvature else []
            values += first if index == 0 else []
            history.append(report_of(step_of(index * 10, **step), values, history.model))
        return history

    return build


@pytest.mark.parametrize(
    ("scale", "expected"), [(100.0, 0.21437908496732028), (1e5, 0.7964342566061765)]
)
def test_a_larger_batch_takes_the_learning_rate_along(
    scale: float, expected: float, changed: Histories
) -> None:
    found = only(LearningRate(), changed(scale=scale))
    assert found.proposed == pytest.approx(expected, rel=1e-9)
    assert (found.current, found.severity, found.direction) == (0.1, "info", "up")
    assert "64 to 512 at step 120" in found.reason


def test_the_odd_batches_at_the_ends_of_epochs_are_no_change(changed: Histories) -> None:
    assert "64 to 512" in only(LearningRate(), changed(kept=16, odd=(5, 11, 15, 19))).reason
    assert silent(changed(new=64, kept=16, odd=(3, 11, 19, 27)))


def test_a_smaller_batch_too(changed: Histories) -> None:
    assert only(LearningRate(), changed(8, 1e9)).proposed == pytest.approx(0.0125, rel=1e-6)


def test_adam_takes_the_square_root(changed: Histories) -> None:
    found = only(LearningRate(), changed(optimizer="AdamW", momentum=None))
    assert found.proposed == pytest.approx(0.1 * 2.1437908496732028**0.5, rel=1e-9)
    assert "heuristic" in found.reason


def test_not_raised_beyond_where_the_ratio_rule_ends(changed: Histories) -> None:
    found = only(LearningRate(), changed(scale=1e5, curvature=4.0))
    assert found.proposed == pytest.approx(2 / 3 / 4)
    heavy = only(LearningRate(), changed(scale=1e5, curvature=4.0, momentum=0.5))
    assert heavy.proposed == pytest.approx(1 / 4)
    assert silent(changed(scale=1e5, curvature=10.0))  # the present one is beyond it


def test_a_secant_allows_half_of_it(changed: Histories) -> None:
    found = only(LearningRate(), changed(scale=1e5, curvature=4.0, curvature_of="smoothness"))
    assert found.proposed == pytest.approx(0.5 / 4)


def test_a_sharpness_that_has_not_converged_limits_nothing(changed: Histories) -> None:
    usual = only(LearningRate(), changed(scale=1e5)).proposed
    for curvature, error in ((4.0, 0.06), (-4.0, -0.01)):
        found = only(LearningRate(), changed(scale=1e5, curvature=curvature, error=error))
        assert found.proposed == usual
        assert "not measured" in found.reason


@pytest.mark.parametrize(("ratio", "expected"), [(0.5, 0.8 * 0.1 / 0.5), (0.9, None)])
def test_adam_is_not_raised_beyond_its_threshold(
    ratio: float, expected: float | None, changed: Histories,
    curvature_of: Callable[..., list[Measurement]],
) -> None:  # fmt: skip
    history = changed(scale=1e9, optimizer="AdamW", momentum=None, betas=(0.9, 0.999))
    assert only(LearningRate(), history).proposed == pytest.approx(0.1 * 8**0.5)
    newest = history[-1]
    readings = curvature_of(newest.info, ratio)
    history.replace_newest(replace(newest, measurements=(*newest.measurements, *readings)))
    assert [item.proposed for item in LearningRate().advise(history)] == (
        [] if expected is None else [pytest.approx(expected)]
    )


def test_not_lowered_to_more_than_nine_tenths_of_the_stability_threshold(
    changed: Histories,
) -> None:
    found = only(LearningRate(), changed(32, 1e9, curvature=50.0))
    assert found.proposed == pytest.approx(0.9 * 2 / 50)


BEFORE: dict[str, dict[str, float]] = {
    "noise is most of the bound": {},
    "and the loss falls still": {"loss_trend": -3.0},
}


@pytest.mark.parametrize("why", BEFORE)
def test_a_larger_batch_against_the_noise_is_not_undone(
    why: str, changed: Histories, stationarity: Values
) -> None:
    history = changed(first=[stationarity(**BEFORE[why])])
    assert [item.status for item in history[0].verdicts] == ["holds"]
    assert silent(history)
    assert not silent(changed(first=[stationarity(estimates=60.0)]))


def test_a_larger_batch_against_a_stall_is_not_undone(changed: Histories, value_of: Values) -> None:
    assert silent(changed(first=[value_of("stall_ratio", 1.2, 0.05)]))
    assert not silent(changed(first=[value_of("stall_ratio", 1.2, 0.2)]))


@pytest.mark.parametrize(
    ("curvature", "words"), [(0.8, "exact to 10 %"), (3.0, "small deviations")]
)
def test_the_ratio_rule_is_guarded(curvature: float, words: str, changed: Histories) -> None:
    # lr x L becomes 0.17, 0.64; the limits are 0.18 and 0.67
    assert words in only(LearningRate(), changed(curvature=curvature)).reason


def test_a_tenth_of_the_data_is_the_largest_batch_of_the_ratio_rule(changed: Histories) -> None:
    assert silent(changed(curvature=0.8, model=ModelInfo(train_size=5119)))
    fits = only(LearningRate(), changed(curvature=0.8, model=ModelInfo(train_size=5120)))
    assert "exact" in fits.reason


UNCHANGED: dict[str, dict[str, object]] = {
    "a learning rate that followed": {"after": {"lrs": (0.8,)}},
    "one odd batch": {"kept": 3},
    "another optimizer": {"optimizer": "RMSprop"},
    "no change": {"new": 64},
    "clipping": {"clipped": 0.3},
    "clipping that nobody saw": {"clipped": math.nan},
    "batches far above the noise scale": {"scale": 1.0},
    "half of the data": {"model": ModelInfo(train_size=1024)},
}


@pytest.mark.parametrize("why", UNCHANGED)
def test_the_learning_rate_stays_for(why: str, changed: Histories) -> None:
    assert silent(changed(**UNCHANGED[why]))


def test_the_noise_scale_weighted_by_curvature_is_preferred(
    changed: Histories, report_of: Callable[..., Report], step_of: Callable[..., StepInfo],
    value_of: Values, noise_scale: Values,
) -> None:  # fmt: skip
    history = changed(scale=1e5)
    values = (noise_scale(1e5, batch_size=512.0), value_of("noise_scale_curvature", 100.0))
    step = step_of(240, lrs=(0.1,), batch_size=512)
    history.append(report_of(step, values, history.model))
    found = only(LearningRate(), history)
    assert found.proposed == pytest.approx(0.21437908496732028, rel=1e-9)


# --- a training that diverges --------------------------------------------------------------------

# A tanh network on digits at lr 3.
DIVERGED = {
    "loss_recent": 40.9, "loss_trend": 0.3, "beyond_edge": 0.9, "edge_share": 0.95,
    "smoothness": 20.0, "step_size": 3.0, "smoothness_is_secant": 1.0, "smallest_loss": 2.1,
}  # fmt: skip


def test_a_loss_above_the_first_one_by_steps_beyond_the_edge(
    history_of: Histories, stationarity: Values
) -> None:
    found = only(LearningRate(), history_of(stationarity(30.0, **DIVERGED), lrs=(3.0,)))
    assert (found.severity, found.direction, found.current) == ("warning", "down", 3.0)
    assert found.proposed == pytest.approx(0.5 / 20)
    assert "higher than at the start (40.9 against 2.303)" in found.reason
    assert "90%" in found.reason
    assert "secants" in found.reason


NOT_DIVERGING: dict[str, tuple[dict[str, float], dict[str, object]]] = {
    "a loss below the first one": ({"loss_recent": 2.2}, {}),
    "a loss that nobody saw": ({"loss_recent": math.nan}, {}),
    "a loss that falls": ({"loss_trend": -3.0}, {}),
    "a trend that is unknown": ({"loss_trend": math.nan}, {}),
    "few steps beyond": ({"beyond_edge": 0.5}, {}),
    "an unknown L": ({"smoothness": math.nan, "beyond_edge": math.nan}, {}),
    "a learning rate that was lowered": ({"step_size": 0.09}, {"lrs": (0.09,)}),
    "momentum": ({"momentum": 0.5}, {"momentum": 0.5}),
    "clipping": ({"clipped_share": 0.06}, {}),
    "several learning rates": ({"groups_differ": 1.0}, {}),
    "another optimizer": ({}, {"optimizer": "Adam"}),
}


@pytest.mark.parametrize("why", NOT_DIVERGING)
def test_no_divergence_for(why: str, history_of: Histories, stationarity: Values) -> None:
    inputs, settings = NOT_DIVERGING[why]
    window = stationarity(30.0, **{**DIVERGED, **inputs})
    assert silent(history_of(window, **{"lrs": (3.0,), **settings}))


def test_divergence_is_told_where_nobody_saw_whether_gradients_were_clipped(
    history_of: Histories, stationarity: Values
) -> None:
    unseen = stationarity(30.0, **{**DIVERGED, "clipped_share": math.nan})
    assert not silent(history_of(unseen, lrs=(3.0,)))


# --- arguments -----------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [0.0, -1.0, math.nan, math.inf, True, "small"])
def test_refuses_a_target_that_no_gradient_has(target: object) -> None:
    with pytest.raises(ConfigError, match="target"):
        LearningRate(target)  # type: ignore[arg-type]

"""One batch size at a time: for the noise floor, or for the noise scale."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest

from gradwatch.errors import ConfigError
from gradwatch.records import History, Measurement, ModelInfo, Recommendation, Report, StepInfo
from gradwatch.rules import BatchSize, LearningRate

Values = Callable[..., Measurement]
Histories = Callable[..., History]


def advice(history: History, target: float | None = None) -> list[Recommendation]:
    return list(BatchSize(target).advise(history))


def test_at_the_noise_floor_the_batch_whose_floor_is_the_target(
    history_of: Histories, stationarity: Values
) -> None:
    (found,) = advice(history_of(stationarity()), 0.005)
    assert (found.current, found.proposed, found.unit) == (8, 34, "sample")
    assert (found.knob, found.direction, found.severity) == ("batch_size", "up", "advice")
    assert "sigma² = 1.47" in found.reason


def test_at_the_noise_floor_no_smaller_batch_whatever_the_noise_scale(
    history_of: Histories, stationarity: Values, noise_scale: Values
) -> None:
    floor, redundant = stationarity(), noise_scale(0.5)
    (found,) = advice(history_of(floor, redundant), 0.005)
    assert found.proposed == 34
    # the batch that would be needed is too much of the data: still no smaller one
    model = ModelInfo(train_size=60)
    assert advice(history_of(floor, redundant, model=model), 0.005) == []
    undecided = stationarity(estimates=60.0)
    assert advice(history_of(undecided, redundant, model=model), 0.005) != []


@pytest.mark.parametrize("trend", [-3.0, math.nan])
def test_at_the_noise_floor_silent_unless_the_loss_is_flat(
    trend: float, history_of: Histories, stationarity: Values
) -> None:
    assert advice(history_of(stationarity(loss_trend=trend))) == []


def test_far_below_the_noise_scale_a_larger_batch_costs_few_samples(
    history_of: Histories, noise_scale: Values
) -> None:
    (found,) = advice(history_of(noise_scale(500.4)))
    assert (found.current, found.proposed, found.severity) == (8, 500, "info")
    for printed in ("50%", "98% now", "1.968 times the samples", "only if the learning rate is"):
        assert printed in found.reason
    assert "step 1500" in found.reason


def test_far_above_the_noise_scale_samples_are_redundant(
    history_of: Histories, noise_scale: Values, stationarity: Values
) -> None:
    well = stationarity(estimates=60.0)
    (found,) = advice(history_of(noise_scale(90), well, batch_size=1000))
    assert (found.current, found.proposed, found.direction) == (1000, 90, "down")
    assert "92%" in found.reason  # 1/(1 + 0.09)
    assert "raise" not in found.reason


def test_ten_times_the_noise_scale_is_91_percent_redundant(
    history_of: Histories, noise_scale: Values, stationarity: Values
) -> None:
    well = stationarity(estimates=60.0)
    (found,) = advice(history_of(noise_scale(99.9, 0.01), well, batch_size=1000))
    assert "91%" in found.reason


@pytest.mark.parametrize("value", [85.0, 8.0, 0.75])
def test_silent_where_the_factor_ten_is_not_certain(
    value: float, history_of: Histories, noise_scale: Values, stationarity: Values
) -> None:
    assert advice(history_of(noise_scale(value), stationarity(estimates=60.0))) == []


SILENCES = {
    "few estimates": {"estimates": 49.0},
    "no number of estimates": {"estimates": math.nan},
    "no significant gradient": {"error": 260.0},
    "clipping": {"clipped_share": 0.21},
    "a heavy tail": {"variance_median": 0.6},
    "no median": {"variance_median": math.nan},
    "the state of Adam": {"step_of_adam": 1.0},
}


@pytest.mark.parametrize("why", SILENCES)
@pytest.mark.parametrize("value", [500.0, 0.2])
def test_silent_for(
    why: str, value: float, history_of: Histories, noise_scale: Values, stationarity: Values
) -> None:
    changes = {**SILENCES[why]}
    if "error" in changes:
        changes["error"] = 0.52 * value
    model, well = ModelInfo(train_size=8000), stationarity(estimates=60.0)
    assert advice(history_of(noise_scale(value), well, model=model)) != []
    assert advice(history_of(noise_scale(value, **changes), well, model=model)) == []


def test_the_newest_noise_scale_counts(
    history_of: Histories, noise_scale: Values, report_of: Callable[..., Report],
    step_of: Callable[..., StepInfo],
) -> None:  # fmt: skip
    history = history_of(noise_scale(500))
    for step in range(1550, 1550 + 18 * 50, 50):
        history.append(report_of(step_of(step), (), history.model))
    history.append(report_of(step_of(2500), (noise_scale(300),), history.model))
    assert advice(history)[0].proposed == 300
    for step in range(2550, 2550 + 20 * 50, 50):
        assert advice(history) != []
        history.append(report_of(step_of(step), (), history.model))
    assert advice(history) == []  # too old


def test_the_odd_batch_at_the_end_of_an_epoch_is_not_the_batch_size(
    history_of: Histories, noise_scale: Values, report_of: Callable[..., Report],
    step_of: Callable[..., StepInfo],
) -> None:  # fmt: skip
    scale = noise_scale(500, batch_size=3.0)
    history = history_of(batch_size=128)
    for step, size in ((1550, 128), (1600, 128), (1650, 3)):
        history.append(report_of(step_of(step, batch_size=size), (scale,), history.model))
    assert advice(history) == []


def test_silent_without_a_standard_error(history_of: Histories, value_of: Values) -> None:
    inputs = {"estimates": 200.0, "gradient_variance": 1.0, "variance_median": 1.0}
    scale = value_of("noise_scale", 500.0, None, batch_size=8.0, clipped_share=0.0, **inputs)
    assert advice(history_of(scale)) == []


def test_silent_on_a_lower_limit_alone(history_of: Histories, value_of: Values) -> None:
    assert advice(history_of(value_of("noise_scale_at_least", 1e5, batch_size=8.0))) == []


def test_silent_for_batches_of_half_of_the_data(
    history_of: Histories, noise_scale: Values, stationarity: Values
) -> None:
    values = noise_scale(0.2), stationarity(estimates=60.0)
    assert advice(history_of(*values, model=ModelInfo(train_size=16))) == []
    assert advice(history_of(*values, model=ModelInfo(train_size=17))) != []


def test_the_batch_size_of_the_measurement_serves_where_no_step_has_one(
    history_of: Histories, noise_scale: Values
) -> None:
    (found,) = advice(history_of(noise_scale(500), batch_size=None))
    assert found.current == 8


def test_silent_once_the_gradient_is_lost_in_the_noise(
    history_of: Histories, noise_scale: Values, report_of: Callable[..., Report],
    step_of: Callable[..., StepInfo], value_of: Values,
) -> None:  # fmt: skip
    history = history_of(noise_scale(500))
    lost = replace(value_of("noise_scale_at_least", 1600.0), step=1550)
    history.append(report_of(step_of(1550), (lost,), history.model))
    assert advice(history) == []
    found = replace(noise_scale(500), step=1600)
    history.append(report_of(step_of(1600), (found,), history.model))
    assert advice(history) != []


def test_silent_in_the_warm_up(history_of: Histories, noise_scale: Values) -> None:
    assert advice(history_of(noise_scale(500), step=19, model=ModelInfo(planned_steps=1000))) == []
    assert advice(history_of(noise_scale(500), step=20, model=ModelInfo(planned_steps=1000))) != []


@pytest.mark.parametrize("optimizer", ["AdamW", "RMSprop", "SGD"])
def test_speaks_of_the_noise_scale_for_every_optimizer(
    optimizer: str, history_of: Histories, noise_scale: Values
) -> None:
    assert len(advice(history_of(noise_scale(500), optimizer=optimizer))) == 1


def test_no_batch_beyond_a_tenth_of_the_data_for_the_noise_scale_s_sake(
    history_of: Histories, noise_scale: Values
) -> None:
    (found,) = advice(history_of(noise_scale(5000), model=ModelInfo(train_size=2000)))
    assert found.proposed == 200


UNWELL = {
    "a step beyond 2/L": {"beyond_edge": 0.01},
    "steps that may be beyond 2/L": {"beyond_edge": math.nan},
    "one that a secant says": {"beyond_edge": 0.01, "smoothness_is_secant": 1.0},
    "the edge of stability": {"edge_share": 0.4},
    "a loss that nobody knows the trend of": {"loss_trend": math.nan},
    "a loss that rises": {"loss_trend": 2.5},
    "a loss above the first one": {"loss_recent": 40.9},
    "a loss that nobody saw": {"loss_recent": math.nan},
    "a bound that is mostly noise": {"estimates": 200.0, "steps": 600.0},
}


@pytest.mark.parametrize("why", UNWELL)
def test_no_smaller_batch_for(
    why: str, history_of: Histories, noise_scale: Values, stationarity: Values
) -> None:
    redundant, usual = noise_scale(0.5), {"estimates": 60.0}
    assert advice(history_of(redundant, stationarity(**usual))) != []
    assert advice(history_of(redundant, stationarity(**{**usual, **UNWELL[why]}))) == []


def test_no_smaller_batch_in_a_training_that_nobody_knows_to_go_well(
    history_of: Histories, noise_scale: Values
) -> None:
    assert advice(history_of(noise_scale(0.5))) == []


@pytest.mark.parametrize(
    "unsettled",
    [
        {"estimates": 199.0},
        {"halves_ratio": 0.49},
        {"halves_ratio": 2.1},
        {"halves_ratio": math.nan},
    ],
)
def test_no_smaller_batch_while_the_noise_scale_is_not_settled(
    unsettled: dict[str, float], history_of: Histories, noise_scale: Values, stationarity: Values
) -> None:
    well = stationarity(estimates=60.0)
    assert advice(history_of(noise_scale(0.5, **unsettled), well)) == []
    # a larger one is no risk
    assert advice(history_of(noise_scale(500.0, **unsettled), well)) != []


@pytest.mark.parametrize(("ratio", "count"), [(0.9, 1), (1.1, 0)])
def test_no_smaller_batch_for_a_training_that_may_stall(
    ratio: float, count: int, history_of: Histories, noise_scale: Values, stationarity: Values,
    value_of: Values,
) -> None:  # fmt: skip
    values = noise_scale(0.5), stationarity(estimates=60.0), value_of("stall_ratio", ratio)
    assert len(advice(history_of(*values))) == count


def test_no_smaller_batch_until_the_learning_rate_has_followed_the_last_one(
    history_of: Histories, noise_scale: Values, stationarity: Values,
    report_of: Callable[..., Report], step_of: Callable[..., StepInfo],
) -> None:  # fmt: skip
    def run(old: int) -> History:
        history = history_of(batch_size=old)
        for index in range(1, 24):
            step = step_of(1500 + index, batch_size=old if index < 12 else 64)
            values = noise_scale(4.0, batch_size=64.0), stationarity(estimates=60.0)
            history.append(report_of(step, values, history.model))
        return history

    assert advice(run(64))[0].direction == "down"
    assert advice(run(512)) == []


@pytest.mark.parametrize(
    ("ratio", "first", "loss", "reports", "count"),
    [
        (0.1, 1.0, 2.35, 4, 1),
        (0.1, 1.0, 2.35, 12, 1),
        (0.5, 1.0, 2.35, 4, 0),  # near the edge of stability
        (0.1, 50.0, 40.0, 12, 0),  # diverged at the start
        (0.1, 22.0, 2.35, 4, 0),  # in need of a warm-up
    ],
)
def test_no_smaller_batch_where_the_curvature_asks_for_smaller_steps(
    ratio: float, first: float, loss: float, reports: int, count: int, curved_run: Histories,
    noise_scale: Values, stationarity: Values,
) -> None:  # fmt: skip
    values = noise_scale(0.5), stationarity(estimates=60.0)
    history = curved_run(
        [ratio] * reports,
        lambda step: loss if step else 2.3,
        inputs={"first_sharpness": first},
        others=lambda step: values,
        begin=0,
    )
    assert len(advice(history)) == count


def test_one_way_out_of_the_noise_or_the_other_never_against_each_other(
    history_of: Histories, stationarity: Values
) -> None:
    history = history_of(stationarity())
    (batch,), (rate,) = advice(history), LearningRate().advise(history)
    assert (batch.direction, rate.direction) == ("up", "down")


def test_refuses_a_target_that_no_gradient_has() -> None:
    with pytest.raises(ConfigError, match="target"):
        BatchSize(-0.1)

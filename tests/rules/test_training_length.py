"""How many steps the target needs."""

from collections.abc import Callable

import pytest

from gradwatch.errors import ConfigError
from gradwatch.records import History, Measurement, ModelInfo
from gradwatch.rules import TrainingLength

Values = Callable[..., Measurement]
Histories = Callable[..., History]

# L 10, sigma² 50, batch 128, lr 0.01, D 2.3026: 8233 steps to 0.05
SETTING = {
    "smoothness": 10.0, "variance": 50.0, "batch_size": 128.0, "step_size": 0.01, "steps": 1000.0,
}  # fmt: skip


def test_the_number_of_steps_after_which_the_bound_is_the_target(
    history_of: Histories, stationarity: Values
) -> None:
    (found,) = TrainingLength(0.05).advise(history_of(stationarity(0.2, **SETTING), lrs=(0.01,)))
    assert (found.knob, found.unit, found.severity) == ("training_length", "step", "info")
    assert (found.current, found.proposed) == (1000, 8233)
    for printed in ("L = 10", "sigma² = 50", "batch 128", "D = 2.303"):
        assert printed in found.reason


def test_the_plan_is_what_has_to_change(history_of: Histories, stationarity: Values) -> None:
    def planned(steps: int) -> History:
        model = ModelInfo(planned_steps=steps)
        return history_of(stationarity(0.2, **SETTING), lrs=(0.01,), model=model)

    (found,) = TrainingLength(0.05).advise(planned(5000))
    assert (found.current, found.proposed) == (5000, 8233)
    assert not list(TrainingLength(0.05).advise(planned(9000)))


def test_silent_below_the_noise_floor(history_of: Histories, stationarity: Values) -> None:
    # the floor is 0.0206
    assert not list(TrainingLength(0.02).advise(history_of(stationarity(0.2, **SETTING))))


def test_silent_when_the_target_is_reached(history_of: Histories, stationarity: Values) -> None:
    assert not list(TrainingLength(0.22).advise(history_of(stationarity(0.2, **SETTING))))


def test_silent_where_noise_is_a_part_of_it(history_of: Histories, stationarity: Values) -> None:
    mixed = stationarity(0.04, **{**SETTING, "steps": 20_000.0})
    assert not list(TrainingLength(0.03).advise(history_of(mixed)))


def test_silent_where_the_noise_floor_is_undecided(
    history_of: Histories, stationarity: Values
) -> None:
    few = stationarity(0.2, **{**SETTING, "estimates": 10.0})
    assert not list(TrainingLength(0.05).advise(history_of(few)))


def test_a_training_a_thousand_times_as_long_is_no_advice(
    history_of: Histories, stationarity: Values
) -> None:
    floor = 10 * 0.01 * 50 / 128 / 1.9
    near = TrainingLength(floor * (1 + 1e-4))
    assert not list(near.advise(history_of(stationarity(0.2, **SETTING))))


def test_refuses_a_target_that_no_gradient_has() -> None:
    with pytest.raises(ConfigError, match="target"):
        TrainingLength(float("nan"))

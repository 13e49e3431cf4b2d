"""How many steps the target needs."""

from collections.abc import Callable
from dataclasses import replace

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


def test_the_split_is_that_of_the_planned_end(history_of: Histories, stationarity: Values) -> None:
    # at step 1000 0.08 of the bound is noise, at step 5000 0.298, at step 5200 0.306
    plans = {steps: ModelInfo(planned_steps=steps) for steps in (5000, 5200)}
    early = stationarity(0.2, **SETTING)
    assert list(TrainingLength().advise(history_of(early, lrs=(0.01,), model=plans[5000])))
    assert not list(TrainingLength().advise(history_of(early, lrs=(0.01,), model=plans[5200])))


def test_silent_without_a_plan_and_a_target(history_of: Histories, stationarity: Values) -> None:
    early = stationarity(0.2, **SETTING)
    assert not list(TrainingLength().advise(history_of(early, lrs=(0.01,))))


def test_silent_near_the_pole(history_of: Histories, stationarity: Values) -> None:
    # the floor is 0.0206: below twice of it the number of steps runs off
    history = history_of(stationarity(0.17, **{**SETTING, "steps": 1500.0}), lrs=(0.01,))
    assert list(TrainingLength(0.0412).advise(history))
    assert not list(TrainingLength(0.0410).advise(history))


def test_silent_while_the_steps_are_too_large(
    history_of: Histories, stationarity: Values, noise_scale: Values, value_of: Values
) -> None:
    def found(*values: Measurement, **inputs: float) -> list[object]:
        window = stationarity(0.2, **{**SETTING, **inputs})
        return list(TrainingLength(0.05).advise(history_of(*values, window, lrs=(0.01,))))

    stall = [replace(value_of("stall_ratio", 1.5, 0.1), step=step) for step in (1300, 1400, 1500)]
    assert found(noise_scale(5))
    assert not found(noise_scale(5), *stall)
    assert not found(edge_share=0.4)


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


@pytest.mark.parametrize(("steps", "speaks"), [(830.0, True), (820.0, False)])
def test_a_training_ten_times_as_long_is_the_most_to_be_told(
    steps: float, speaks: bool, history_of: Histories, stationarity: Values
) -> None:
    early = stationarity(0.2, **{**SETTING, "steps": steps})  # 8233 are needed
    assert bool(list(TrainingLength(0.05).advise(history_of(early, lrs=(0.01,))))) == speaks


def test_refuses_a_target_that_no_gradient_has() -> None:
    with pytest.raises(ConfigError, match="target"):
        TrainingLength(float("nan"))

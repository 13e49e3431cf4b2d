"""How many trainings it takes to be nearly sure of one."""

from collections.abc import Callable, Mapping

import pytest

from gradwatch.errors import ConfigError
from gradwatch.records import History, Measurement
from gradwatch.rules import Reliability

Histories = Callable[..., History]


@pytest.fixture
def run(
    history_of: Histories, value_of: Callable[..., Measurement],
    stationarity_inputs: Mapping[str, float],
) -> Histories:  # fmt: skip
    def build(value: float = 0.02, **changes: float) -> History:
        inputs = {**stationarity_inputs, **changes}
        return history_of(value_of("stationarity", value, 0.1 * value, **inputs))

    return build


@pytest.mark.parametrize(("delta", "trainings"), [(0.05, 5), (0.01, 7), (0.25, 2)])
def test_each_training_more_halves_the_risk(delta: float, trainings: int, run: Histories) -> None:
    (found,) = Reliability(delta).advise(run())
    assert (found.knob, found.scope) == ("training_length", "independent trainings")
    assert (found.current, found.proposed, found.unit) == (1, trainings, "training")
    assert found.severity == "info"
    assert "0.0542" in found.reason  # twice the bound
    assert "fresh data" in found.reason


def test_silent_where_one_training_is_enough(run: Histories) -> None:
    assert not list(Reliability(0.5).advise(run()))


def test_silent_where_the_bound_says_nothing(run: Histories, history_of: Histories) -> None:
    assert not list(Reliability(0.05).advise(run(estimates=10.0)))
    assert not list(Reliability(0.05).advise(run(0.2)))  # violated
    assert not list(Reliability(0.05).advise(history_of()))


@pytest.mark.parametrize("delta", [0.0, 1.0, -0.1, 2.0, float("nan"), True, "often"])
def test_refuses_what_is_no_probability(delta: object) -> None:
    with pytest.raises(ConfigError, match="delta"):
        Reliability(delta)  # type: ignore[arg-type]

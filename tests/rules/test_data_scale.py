"""Centring the inputs."""

from collections.abc import Callable

import pytest

from gradwatch.records import History, Measurement
from gradwatch.rules import DataScale

Values = Callable[..., Measurement]
Histories = Callable[..., History]


def test_inputs_of_a_large_mean_are_to_be_centred(history_of: Histories, value_of: Values) -> None:
    share = value_of("input_mean_share", 0.987, 0.003)
    (found,) = DataScale().advise(history_of(share, value_of("input_top_eigenvalue", 10.455)))
    assert (found.knob, found.severity, found.proposed) == ("data_scale", "info", None)
    for printed in ("0.987", "10.46", "centre", "re-tune the learning rate", "does not train fast"):
        assert printed in found.reason


@pytest.mark.parametrize(
    ("share", "error"), [(0.4, 0.01), (0.5, None), (0.55, 0.03), (float("nan"), 0.01)]
)
def test_silent_unless_the_mean_is_certainly_more_than_half(
    share: float, error: float | None, history_of: Histories, value_of: Values
) -> None:
    assert not list(DataScale().advise(history_of(value_of("input_mean_share", share, error))))


def test_silent_without_a_measurement(history_of: Histories) -> None:
    assert not list(DataScale().advise(history_of()))


@pytest.mark.parametrize("settings", [{"optimizer": "Adam"}, {"grads_clipped": True}])
def test_silent_for(settings: dict[str, object], history_of: Histories, value_of: Values) -> None:
    share = value_of("input_mean_share", 0.987, 0.003)
    assert not list(DataScale().advise(history_of(share, **settings)))

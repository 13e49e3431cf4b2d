"""Centring the inputs."""

from collections.abc import Callable

import pytest

from gradwatch.records import History, LayerInfo, Measurement, ModelInfo
from gradwatch.rules import DataScale

Values = Callable[..., Measurement]
Histories = Callable[..., History]

DENSE = LayerInfo(name="0", kind="Linear")
BEHIND = LayerInfo(name="2", kind="Linear")
PLAIN = ModelInfo(layers=(DENSE, BEHIND))


def test_inputs_of_a_large_mean_are_to_be_centred(history_of: Histories, value_of: Values) -> None:
    share = value_of("input_mean_share", 0.987, 0.003)
    (found,) = DataScale().advise(
        history_of(share, value_of("input_top_eigenvalue", 10.455), model=PLAIN)
    )
    assert (found.knob, found.severity, found.proposed) == ("data_scale", "info", None)
    for printed in ("0.987", "10.46", "centre", "re-tune the learning rate", "does not train fast"):
        assert printed in found.reason


@pytest.mark.parametrize(
    ("share", "error"), [(0.4, 0.01), (0.5, None), (0.55, 0.03), (float("nan"), 0.01)]
)
def test_silent_unless_the_mean_is_certainly_more_than_half(
    share: float, error: float | None, history_of: Histories, value_of: Values
) -> None:
    assert not list(
        DataScale().advise(history_of(value_of("input_mean_share", share, error), model=PLAIN))
    )


def test_silent_without_a_measurement(history_of: Histories) -> None:
    assert not list(DataScale().advise(history_of()))


@pytest.mark.parametrize("settings", [{"optimizer": "Adam"}, {"grads_clipped": True}])
def test_silent_for(settings: dict[str, object], history_of: Histories, value_of: Values) -> None:
    share = value_of("input_mean_share", 0.987, 0.003)
    assert not list(DataScale().advise(history_of(share, model=PLAIN, **settings)))


NORM = LayerInfo(name="1", kind="BatchNorm1d")
UNCENTRED = {
    "nothing known": ModelInfo(),
    "a convolution first": ModelInfo(layers=(LayerInfo(name="0", kind="Conv2d"), BEHIND)),
    "an embedding first": ModelInfo(layers=(LayerInfo(name="0", kind="Embedding"), BEHIND)),
    "a normalisation behind": ModelInfo(layers=(DENSE, NORM, BEHIND), normalisations=("1",)),
    "a normalisation first": ModelInfo(layers=(NORM, BEHIND), normalisations=("1",)),
    "one that owns nothing, somewhere": ModelInfo(layers=(DENSE, BEHIND), normalisations=("1",)),
}


@pytest.mark.parametrize("why", UNCENTRED)
def test_silent_where_the_mean_does_not_reach_a_linear_layer(
    why: str, history_of: Histories, value_of: Values
) -> None:
    share = value_of("input_mean_share", 0.987, 0.003)
    assert not list(DataScale().advise(history_of(share, model=UNCENTRED[why])))


def test_a_normalisation_further_on_is_no_reason_to_be_silent(
    history_of: Histories, value_of: Values
) -> None:
    model = ModelInfo(layers=(DENSE, BEHIND, NORM), normalisations=("1",))
    share = value_of("input_mean_share", 0.987, 0.003)
    assert list(DataScale().advise(history_of(share, model=model)))

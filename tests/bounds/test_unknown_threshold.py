"""Where no threshold is known, the verdict says so."""

from typing import Any

import pytest

from gradwatch.bounds import UnknownThreshold
from gradwatch.records import Measurement, ModelInfo, StepInfo, Verdict


def judge(scope: str = "model", **settings: Any) -> Verdict | None:
    facts = {"step": 5, "lrs": (0.1,), "optimizer": "SGD", "momentum": 0.0, **settings}
    measurement = Measurement(metric="sharpness", scope=scope, step=5, value=3.0)
    bound = UnknownThreshold()
    interval = bound.interval(measurement, StepInfo(**facts), ModelInfo())
    if interval is None:
        return None
    return Verdict.of(measurement, interval, bound="UnknownThreshold", source=bound.source)


@pytest.mark.parametrize(
    "optimizer",
    ["LAMB", "Muon", "Adafactor", "SAM", "AdamWScheduleFree", "LBFGS", "Adagrad", "SGD+Adam"],
)
def test_an_unknown_optimizer_is_undecided_and_named(optimizer: str) -> None:
    found = judge(optimizer=optimizer)
    assert found is not None
    assert found.status == "undecided"
    assert optimizer in found.because


@pytest.mark.parametrize(
    ("settings", "because"),
    [({"lrs": (0.1, 0.2)}, "different learning rates"), ({"maximize": True}, "maximises")],
)
def test_settings_without_a_threshold(settings: dict[str, Any], because: str) -> None:
    found = judge(**settings)
    assert found is not None
    assert because in found.because


@pytest.mark.parametrize(
    "settings",
    [{}, {"optimizer": "Adam", "betas": (0.9, 0.999), "momentum": None}, {"momentum": 0.9}],
)
def test_where_a_threshold_is_known_the_other_bound_speaks(settings: dict[str, Any]) -> None:
    assert judge(**settings) is None


def test_a_layer_is_not_judged() -> None:
    assert judge(scope="0.weight", optimizer="LAMB") is None

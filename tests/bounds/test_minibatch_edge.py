"""How large the curvature along the gradients of mini-batches gets."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradwatch.bounds import MinibatchEdge
from gradwatch.records import Measurement, ModelInfo, StepInfo, Verdict


def judge(value: float, *, scope: str = "model", **settings: Any) -> Verdict | None:
    bound = MinibatchEdge()
    facts = {"step": 5, "lrs": (0.1,), "optimizer": "SGD", "momentum": 0.0, **settings}
    measurement = Measurement(metric="batch_sharpness", scope=scope, step=5, value=value)
    interval = bound.interval(measurement, StepInfo(**facts), ModelInfo())
    if interval is None:
        return None
    return Verdict.of(measurement, interval, bound="MinibatchEdge", source=bound.source)


def test_it_stays_at_two_over_the_learning_rate() -> None:
    below, beyond = judge(19.9), judge(30.0)
    assert below is not None
    assert beyond is not None
    assert below.interval.upper == pytest.approx(20.0)
    assert (below.status, below.interval.kind) == ("holds", "heuristic")
    assert (beyond.status, beyond.interval.upper) == ("undecided", below.interval.upper)
    assert "no theorem" in beyond.because
    assert "empirical" in MinibatchEdge.source


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"momentum": 0.9}, "without momentum"),
        ({"lrs": (0.1, 0.2)}, "different"),
        ({"lrs": ()}, "no learning rate"),
        ({"grads_clipped": True}, "clipped"),
    ],
)
def test_is_undecided_for(settings: dict[str, Any], words: str) -> None:
    found = judge(1.0, **settings)
    assert found is not None
    assert found.status == "undecided"
    assert words in found.because


def test_says_nothing_of_other_optimizers() -> None:
    assert judge(1.0, optimizer="Adam", betas=(0.9, 0.999)) is None
    assert judge(1.0, scope="layer") is None


@given(st.floats(), st.floats())
def test_it_is_never_violated(value: float, lr: float) -> None:
    found = judge(value, lrs=(lr,))
    assert found is not None
    assert found.status in {"holds", "undecided"}

"""Where the gradient noise makes SGD unstable."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradwatch.bounds import NoiseStability
from gradwatch.records import Measurement, ModelInfo, StepInfo, Verdict


def judge(
    value: float,
    *,
    error: float | None = 0.0,
    scope: str = "model",
    examples: float = 512.0,
    scale: float = 1.0,
    train_size: int | None = None,
    **settings: Any,
) -> Verdict | None:
    bound = NoiseStability()
    facts = {"step": 5, "lrs": (0.1,), "optimizer": "SGD", "momentum": 0.9, **settings}
    measurement = Measurement(
        metric="noise_stability_ratio",
        scope=scope,
        step=5,
        value=value,
        standard_error=error,
        inputs={"examples": examples, "gradient_scale": scale},
    )
    interval = bound.interval(measurement, StepInfo(**facts), ModelInfo(train_size=train_size))
    if interval is None:
        return None
    return Verdict.of(measurement, interval, bound="NoiseStability", source=bound.source)


def decided(value: float, **settings: Any) -> Verdict:
    found = judge(value, **settings)
    assert found is not None
    return found


def test_up_to_its_limit_the_learning_rate_is_stable() -> None:
    assert decided(0.99).status == "holds"
    assert decided(0.99).interval.kind == "law"
    assert decided(1.1).status == "undecided"
    assert decided(1.21).status == "violated"
    assert "common minimum" in NoiseStability.source


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [(2.0, 0.6, "not for certain"), (2.0, None, "unknown"), (0.5, None, "unknown")],
)
def test_a_coarse_variance_decides_nothing(value: float, error: float | None, words: str) -> None:
    found = decided(value, error=error)
    assert found.status == "undecided"
    assert words in found.because


def test_the_sharpest_direction_of_few_examples_is_their_own() -> None:
    assert "of 32 examples" in decided(2.0, examples=32.0).because
    assert decided(0.9, examples=32.0).status == "holds"
    assert decided(2.0, examples=32.0, train_size=32).status == "violated"


def test_far_beyond_a_coarse_variance_is_enough() -> None:
    assert decided(2.0, error=0.4).status == "violated"


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"lrs": (0.1, 0.2)}, "different"), ({"grads_clipped": True}, "clipped")],
)
def test_is_undecided_for(settings: dict[str, Any], words: str) -> None:
    assert words in decided(2.0, **settings).because


def test_says_nothing_of_other_optimizers() -> None:
    assert judge(2.0, optimizer="AdamW") is None
    assert judge(2.0, scope="layer") is None


@given(st.floats(), st.none() | st.floats())
def test_no_number_breaks_it(value: float, error: float | None) -> None:
    found = decided(value, error=error)
    assert found.status != "violated" or value > 1.2 or value < 0


@pytest.mark.parametrize(("scale", "decides"), [(0.49, False), (0.51, True), (64.0, False)])
def test_steps_along_another_gradient_decide_nothing(scale: float, decides: bool) -> None:
    for value in (0.5, 2.0):
        found = decided(value, scale=scale)
        assert (found.status != "undecided") == decides
        assert decides or "number of micro-batches" in found.because

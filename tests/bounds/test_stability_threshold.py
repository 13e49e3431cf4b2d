"""How large the sharpness may be for the steps of the optimizer."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradwatch.bounds import StabilityThreshold
from gradwatch.records import Measurement, ModelInfo, StepInfo, Verdict

ADAM: dict[str, Any] = {"optimizer": "Adam", "momentum": None, "betas": (0.9, 0.999), "step": 1000}
THRESHOLD = 20.0


def judge(
    ratio: float, *, newest: float | None = None, error: float | None = 0.0, scope: str = "model",
    train_size: int | None = None, inputs: dict[str, float] | None = None, **settings: Any,
) -> Verdict | None:  # fmt: skip
    """Of a mean ratio, a newest one (the same if not given) and its standard error."""
    bound = StabilityThreshold()
    facts = {"step": 5, "lrs": (0.1,), "optimizer": "SGD", "momentum": 0.0, **settings}
    last = ratio if newest is None else newest
    measurement = Measurement(
        metric="stability_ratio",
        scope=scope,
        step=5,
        value=ratio,
        standard_error=error,
        inputs={"newest": last * THRESHOLD, "threshold": THRESHOLD, **(inputs or {})},
    )
    interval = bound.interval(measurement, StepInfo(**facts), ModelInfo(train_size=train_size))
    if interval is None:
        return None
    return Verdict.of(measurement, interval, bound="StabilityThreshold", source=bound.source)


def decided(ratio: float, **settings: Any) -> Verdict:
    found = judge(ratio, **settings)
    assert found is not None
    return found


@pytest.mark.parametrize("settings", [{}, ADAM, {"momentum": 0.9, "nesterov": True}])
def test_the_ratio_of_sharpness_and_threshold(settings: dict[str, Any]) -> None:
    below = decided(0.99, **settings)
    assert below.interval.upper == 1.0
    assert (below.status, below.interval.kind) == ("holds", "law")
    for ratio in (1.01, 1.19):
        edge = decided(ratio, **settings)
        assert edge.status == "undecided"
        assert "normal" in edge.because
    assert decided(1.21, **settings).status == "violated"


@pytest.mark.parametrize(
    ("mean", "newest", "status"),
    [
        (0.9, 0.9, "holds"),
        (0.9, 1.5, "undecided"),
        (1.5, 0.9, "undecided"),
        (1.5, 1.1, "undecided"),
        (1.5, 1.3, "violated"),
    ],
)
def test_mean_and_newest_reading_have_to_agree(mean: float, newest: float, status: str) -> None:
    assert decided(mean, newest=newest).status == status


def test_without_the_newest_reading_the_mean_decides() -> None:
    unknown = {"newest": float("nan")}
    assert decided(1.5, inputs=unknown).status == "violated"
    assert decided(0.5, inputs=unknown).status == "holds"


@pytest.mark.parametrize(
    ("examples", "train_size", "status"),
    [
        (32.0, None, "undecided"),
        (127.0, 50_000, "undecided"),
        (128.0, 50_000, "violated"),
        (32.0, 32, "violated"),
        (31.0, 32, "undecided"),
    ],
)
def test_few_examples_curve_more_than_all(
    examples: float, train_size: int | None, status: str
) -> None:
    inputs = {"examples": examples}
    found = decided(1.5, inputs=inputs, train_size=train_size)
    assert found.status == status
    if status == "undecided":
        assert f"the curvature of {examples:.0f} examples" in found.because
        assert "probe_batch" in found.because
    below = decided(0.95, inputs=inputs, train_size=train_size)
    assert below.status == "holds", "that of all is even lower"


@pytest.mark.parametrize("ratio", [-0.5, 0.1, 1.1, 1.5])
@pytest.mark.parametrize("scale", [1 / 1024, 0.49, 2.1, 64.0])
def test_steps_along_another_gradient_decide_nothing(ratio: float, scale: float) -> None:
    found = decided(ratio, inputs={"gradient_scale": scale})
    assert found.status == "undecided"
    assert "number of micro-batches" in found.because


@pytest.mark.parametrize("scale", [0.51, 1.0, 1.9, float("nan")])
def test_steps_along_the_gradient_of_the_loss_decide(scale: float) -> None:
    assert decided(0.5, inputs={"gradient_scale": scale}).status == "holds"
    assert decided(1.5, inputs={"gradient_scale": scale}).status == "violated"


def test_losses_that_may_not_be_divided_leave_a_low_ratio_open() -> None:
    """They make the steps longer, never shorter."""
    parts = {"added_up": 1.0}
    found = decided(0.5, inputs=parts)
    assert found.status == "undecided"
    assert "micro-batches" in found.because
    assert decided(1.5, inputs=parts).status == "violated"
    assert decided(0.5, inputs={**parts, "gradient_scale": 1.0}).status == "holds"
    assert decided(0.5, inputs={"added_up": 0.0}).status == "holds"


def test_a_violation_survives_the_largest_error_that_counts_as_converged() -> None:
    assert decided(1.225, error=0.05 * 1.225).status == "violated"


def test_says_nothing_of_parts_of_the_model() -> None:
    assert judge(1e9, scope="layer") is None


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"optimizer": "NAdam", "betas": (0.9, 0.999)}, "NAdam"),
        ({"optimizer": "SGD+Adam"}, "SGD+Adam"),
        ({"optimizer": ""}, "unknown"),
        ({"lrs": (0.1, 0.2)}, "different learning rates"),
        ({"lrs": (0.0,)}, "is 0"),
        ({"momentum": 1.0}, "momentum"),
        ({"maximize": True}, "the optimizer maximises"),
        ({"grads_clipped": True}, "clipped"),
        ({"error": None}, "converged"),
        ({"error": float("nan")}, "converged"),
        ({"error": 3.0}, "converged"),
        ({**ADAM, "step": 99}, "settled"),
        ({**ADAM, "step": 9, "betas": (0.9, 0.9)}, "settled"),
        ({**ADAM, "optimizer": "RMSprop", "betas": None, "step": 99}, "settled"),
        ({**ADAM, "betas": None}, "betas"),
        ({**ADAM, "lrs": (0.1, 0.2)}, "different learning rates"),
    ],
)
def test_is_undecided_for(settings: dict[str, Any], words: str) -> None:
    found = decided(50.0, **settings)
    assert found.status == "undecided"
    assert words in found.because


def test_adam_is_decided_once_its_preconditioner_has_settled() -> None:
    assert decided(50.0, **ADAM | {"step": 100}).status == "violated"
    assert decided(50.0, **ADAM | {"step": 10, "betas": (0.9, 0.95)}).status == "violated"


@pytest.mark.parametrize("ratio", [0.0, -0.2])
def test_without_a_positive_curvature_nothing_is_unstable(ratio: float) -> None:
    assert decided(ratio, error=0.04).status == "holds"
    assert decided(ratio, error=0.06).status == "undecided"  # 5 % of the threshold


@given(st.floats(), st.floats(), st.none() | st.floats(), st.floats(), st.floats())
def test_no_number_breaks_it(
    ratio: float, newest: float, error: float | None, lr: float, scale: float
) -> None:
    for settings in ({}, ADAM):
        inputs = {"gradient_scale": scale, "newest": newest}
        found = decided(ratio, error=error, inputs=inputs, **{**settings, "lrs": (lr,)})
        if found.status == "violated":
            assert ratio > 1.2
            assert not newest <= 1.2 * THRESHOLD

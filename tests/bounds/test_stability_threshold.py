"""How large the sharpness may be for the steps of the optimizer."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradwatch.bounds import StabilityThreshold
from gradwatch.records import Measurement, ModelInfo, StepInfo, Verdict

ADAM = {"optimizer": "Adam", "momentum": None, "betas": (0.9, 0.999), "step": 1000}


def judge(
    value: float, *, metric: str = "sharpness", error: float | None = 0.0, scope: str = "model",
    examples: float | None = None, train_size: int | None = None, **settings: Any,
) -> Verdict | None:  # fmt: skip
    bound = StabilityThreshold(metric)  # type: ignore[arg-type]
    facts = {"step": 5, "lrs": (0.1,), "optimizer": "SGD", "momentum": 0.0, **settings}
    measurement = Measurement(
        metric=metric,
        scope=scope,
        step=5,
        value=value,
        standard_error=error,
        unit="L/P²",
        inputs={} if examples is None else {"examples": examples},
    )
    interval = bound.interval(measurement, StepInfo(**facts), ModelInfo(train_size=train_size))
    if interval is None:
        return None
    return Verdict.of(measurement, interval, bound="StabilityThreshold", source=bound.source)


def decided(value: float, **settings: Any) -> Verdict:
    found = judge(value, **settings)
    assert found is not None
    return found


def preconditioned(value: float, **settings: Any) -> Verdict:
    return decided(value, metric="preconditioned_sharpness", **{**ADAM, **settings})


@pytest.mark.parametrize(
    ("settings", "threshold"),
    [
        ({}, 20.0),
        ({"momentum": 0.9}, 38.0),
        ({"momentum": 0.9, "dampening": 0.5}, 76.0),
        ({"momentum": 0.9, "nesterov": True}, 13.571428571428573),
        ({"weight_decay": 1.0}, 19.0),
    ],
)
def test_the_sharpness_of_sgd(settings: dict[str, Any], threshold: float) -> None:
    below = decided(0.99 * threshold, **settings)
    assert below.interval.upper == pytest.approx(threshold, rel=1e-12)
    assert (below.status, below.interval.kind) == ("holds", "law")
    for ratio in (1.01, 1.19):
        edge = decided(ratio * threshold, **settings)
        assert edge.status == "undecided"
        assert "normal" in edge.because
    assert decided(1.21 * threshold, **settings).status == "violated"


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
    found = decided(30.0, examples=examples, train_size=train_size)
    assert found.status == status
    if status == "undecided":
        assert f"the curvature of {examples:.0f} examples" in found.because
        assert "probe_batch" in found.because
    below = decided(19.0, examples=examples, train_size=train_size)
    assert below.status == "holds", "that of all is even lower"


def test_a_violation_survives_the_largest_error_that_counts_as_converged() -> None:
    assert decided(24.5, error=0.05 * 24.5).status == "violated"


@pytest.mark.parametrize(
    ("optimizer", "settings", "threshold"),
    [
        ("Adam", {}, 380.0),
        ("AdamW", {"weight_decay": 0.1}, 378.1),
        ("RMSprop", {"betas": None, "momentum": 0.9}, 38.0),
    ],
)
def test_under_adam_the_preconditioned_sharpness_decides(
    optimizer: str, settings: dict[str, Any], threshold: float
) -> None:
    settings = {"optimizer": optimizer, **settings}
    assert preconditioned(0.99 * threshold, **settings).status == "holds"
    assert preconditioned(1.1 * threshold, **settings).status == "undecided"
    assert preconditioned(1.3 * threshold, **settings).status == "violated"
    plain = decided(1e9, **{**ADAM, **settings})
    assert plain.status == "undecided"
    assert plain.because == f"under {optimizer} the preconditioned sharpness decides"


def test_the_preconditioned_sharpness_says_nothing_of_others() -> None:
    assert judge(1e9, metric="preconditioned_sharpness") is None
    assert judge(1e9, metric="preconditioned_sharpness", optimizer="NAdam") is None
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
        ({"grads_clipped": True}, "clipped"),
        ({"error": None}, "converged"),
        ({"error": float("nan")}, "converged"),
        ({"error": 60.0}, "converged"),
    ],
)
def test_is_undecided_for(settings: dict[str, Any], words: str) -> None:
    found = decided(1000.0, **settings)
    assert found.status == "undecided"
    assert words in found.because


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"step": 99}, "settled"),
        ({"step": 9, "betas": (0.9, 0.9)}, "settled"),
        ({"optimizer": "RMSprop", "betas": None, "step": 99}, "settled"),
        ({"betas": None}, "betas"),
        ({"lrs": (0.1, 0.2)}, "different learning rates"),
    ],
)
def test_the_preconditioned_one_is_undecided_for(settings: dict[str, Any], words: str) -> None:
    found = preconditioned(1e9, **settings)
    assert found.status == "undecided"
    assert words in found.because


def test_adam_is_decided_once_its_preconditioner_has_settled() -> None:
    assert preconditioned(1e9, step=100).status == "violated"
    assert preconditioned(1e9, step=10, betas=(0.9, 0.95)).status == "violated"


@pytest.mark.parametrize("value", [0.0, -3.0])
def test_without_a_positive_curvature_nothing_is_unstable(value: float) -> None:
    assert decided(value, error=0.9).status == "holds"
    assert decided(value, error=1.1).status == "undecided"  # 5 % of the threshold


@given(st.floats(), st.none() | st.floats(), st.floats(), st.sampled_from(["SGD", "Adam", "AdamW"]))
def test_no_number_breaks_it(value: float, error: float | None, lr: float, optimizer: str) -> None:
    for metric in ("sharpness", "preconditioned_sharpness"):
        settings: dict[str, Any] = {**ADAM, "lrs": (lr,), "optimizer": optimizer}
        found = judge(value, metric=metric, error=error, **settings)
        if found is not None and found.status == "violated":
            assert value > 1.2 * found.interval.upper

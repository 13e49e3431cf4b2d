"""The bound at the present learning rate. What it shares with the one of the whole run is tested
there."""

import math

import pytest

from gradwatch.bounds import NoiseFloor
from gradwatch.records import Measurement, ModelInfo, StepInfo, Verdict

STEP = StepInfo(step=1500, lrs=(0.3,), optimizer="SGD", momentum=0.0, grads_clipped=False)
INPUTS = {
    "estimates": 200.0, "clipped_share": 0.0, "lr_changes": 0.0, "edge_share": 0.0,
    "beyond_edge": 0.0, "lowest_loss": 0.0, "smallest_loss": 0.1, "first_loss": 2.3026,
    "smoothness": 10.0, "step_size": 0.03, "variance": 50.0, "batch_size": 128.0,
    "batch_changes": 0.0, "loss_scale_changes": 0.0, "groups_differ": 0.0, "momentum": 0.0,
    "weight_decay": 0.0, "smoothness_is_secant": 0.0, "steps": 10_000.0, "from_adam": 0.0,
}  # fmt: skip


def judge(value: float = 0.02, error: float = 0.001, **inputs: float) -> Verdict:
    bound = NoiseFloor()
    measurement = Measurement(
        metric="stationarity_recent", scope="model", step=1500, value=value, standard_error=error,
        inputs={**INPUTS, **inputs},
    )  # fmt: skip
    interval = bound.interval(measurement, STEP, ModelInfo())
    assert interval is not None
    return Verdict.of(measurement, interval, bound="NoiseFloor", source=bound.source)


def test_the_bound_is_a_step_term_plus_the_floor() -> None:
    found = judge()
    assert (found.status, found.interval.lower, found.interval.kind) == ("holds", 0.0, "heuristic")
    assert found.interval.upper == pytest.approx(0.07796362745098, rel=1e-9)


def test_the_lowest_loss_lowers_the_step_term() -> None:
    assert judge(lowest_loss=0.1).interval.upper == pytest.approx(
        0.06893382352941 + 0.00902980392157 * 2.2026 / 2.3026, rel=1e-9
    )


def test_a_gradient_far_above_it_is_a_broken_assumption() -> None:
    assert judge(0.15).status == "violated"
    assert judge(0.1).status == "undecided"


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"lr_changes": 1.0}, "learning rate changed"),
        ({"lr_changes": math.nan}, "learning rate changed"),
        ({"batch_changes": 1.0}, "batch size changed"),
        ({"step_size": math.nan}, "not finite"),
        ({"steps": 0.0}, "not finite"),
        ({"variance": -0.1}, "not finite"),
        ({"batch_size": math.nan}, "not finite"),
        ({"first_loss": math.nan}, "not finite"),
        ({"step_size": 0.2}, "not finite"),
        ({"step_size": 1e-320, "steps": 1.0}, "not finite"),
    ],
)
def test_is_undecided_with_the_reason(inputs: dict[str, float], words: str) -> None:
    found = judge(**inputs)
    assert found.status == "undecided"
    assert words in found.because

"""Gradient descent on digits: the sharpness climbs to the threshold, and the watch keeps calm."""

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from gradwatch.theory import break_even as theory

if TYPE_CHECKING:
    from tests.monitors.edge.conftest import Lab, Run

PAGE = "Break-even point and edge of stability"

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

Verify = Callable[..., None]

Descent = Callable[[float, float, int, int], "Run"]


@pytest.fixture(scope="module")
def descent(lab: "Lab") -> Descent:
    """Gradient descent on all rows, with the standard monitors and all rules."""

    @cache
    def run(lr: float, momentum: float, steps: int, every: int) -> "Run":
        model = lab.network(nn.Tanh, hidden=2)
        optimizer = torch.optim.SGD(model.parameters(), lr, momentum=momentum)
        return lab.train(model, optimizer, lab.digits(500), lab.half_square, steps, every=every)

    return run


@pytest.mark.parametrize(
    ("lr", "steps", "every", "start"),
    [(0.1, 6000, 100, 0.8), (0.2, 4000, 50, 1.6), (0.4, 3000, 100, 3.2)],
)
def test_b4_the_sharpness_climbs_to_the_threshold_and_stays(
    verify: Verify, lab: "Lab", descent: Descent, lr: float, steps: int, every: int, start: float
) -> None:
    run = descent(lr, 0.0, steps, every)
    scaled = lr * run.values("sharpness")
    verify(
        "B4", f"eta lambda at the start, eta {lr}", expected=start, measured=float(scaled[0]),
        tolerance=("relative", 0.02),
    )  # fmt: skip
    verify(
        "B4", f"mean eta lambda of the last 4 readings, eta {lr}", expected=2.0,
        measured=float(scaled[-4:].mean()), tolerance=("absolute", 0.15),
    )  # fmt: skip
    reached = run.readings("break_even_step")
    assert {item.value for item in reached} == {reached[0].step}  # said again, never moved
    assert len(reached) == sum(item.step >= reached[0].step for item in run.readings("sharpness"))
    assert ("at the first reading" in reached[0].source) == (start > 2)
    verify(
        "B4", f"eta lambda at the break-even point, eta {lr}", expected=max(2.0, start),
        measured=float(scaled[len(scaled) - len(reached)]), tolerance=("relative", 0.06),
    )  # fmt: skip
    # On the way down from a start that is too sharp, or where it overshoots, it is beyond.
    settled = 0 if lr == 0.1 else 500
    assert run.statuses("StabilityThreshold", since=settled) <= {"holds", "undecided"}
    lab.says_nothing(verify, "B4", f"eta {lr}", run)


def test_b5_with_momentum_it_need_not_get_there(
    verify: Verify, lab: "Lab", descent: Descent
) -> None:
    run = descent(0.05, 0.9, 2500, 50)
    scaled = 0.05 * run.values("sharpness")
    what = "eta 0.05, momentum 0.9"
    verify(
        "B5", f"eta lambda at the end, {what}", expected=2.2, measured=float(scaled[-1]),
        tolerance=("relative", 0.05),
    )  # fmt: skip
    verify(
        "B5", f"largest eta lambda, {what}", expected=3.8, measured=float(scaled.max()),
        tolerance="at_most",
    )  # fmt: skip
    verify(
        "B5", f"stability ratio at the end, {what}", expected=2.2 / 3.8,
        measured=float(run.values("stability_ratio")[-1]), tolerance=("relative", 0.05),
    )  # fmt: skip
    assert run.statuses("StabilityThreshold") == {"holds"}
    assert not run.readings("break_even_step")
    lab.says_nothing(verify, "B5", what, run)


def test_b13_the_gradient_can_miss_the_sharpest_direction(verify: Verify, descent: Descent) -> None:
    run = descent(0.2, 0.0, 4000, 50)
    late = [theory.return_length(0.2, value) for value in run.at("rayleigh_quotient", 600, 1500)]
    (early,) = run.at("rayleigh_quotient", 50, 50)
    (sharpness,) = run.at("sharpness", 50, 50)
    for what, value in (("smallest", min(late)), ("largest", max(late))):
        verify(
            "B13", f"{what} 2/(eta r_g), steps 600 to 1500", expected=1.0, measured=value,
            tolerance=("relative", 0.1),
        )  # fmt: skip
    verify(
        "B13", "2/(eta r_g) at step 50", expected=188.0,
        measured=theory.return_length(0.2, early), tolerance=("relative", 0.1),
    )  # fmt: skip
    verify(
        "B13", "2/(eta lambda) at step 50", expected=1.16,
        measured=theory.return_length(0.2, sharpness), tolerance=("relative", 0.02),
    )  # fmt: skip

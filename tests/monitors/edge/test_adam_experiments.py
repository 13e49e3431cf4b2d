"""Adam on digits: the preconditioned sharpness against its threshold."""

from collections.abc import Callable
from statistics import fmean
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


def adam(lab: "Lab", lr: float, beta1: float, steps: int) -> "Run":
    model = lab.network(nn.Tanh, hidden=2)
    optimizer = torch.optim.Adam(model.parameters(), lr, betas=(beta1, 0.999))
    return lab.train(model, optimizer, lab.digits(500), lab.half_square, steps)


@pytest.mark.parametrize(
    ("lr", "beta1", "first", "last"),
    [(1e-3, 0.9, 1050, 1500), (3e-3, 0.9, 300, 1000), (1e-3, 0.5, 450, 1500)],
)
def test_b6_the_preconditioned_sharpness_stays_at_the_threshold(
    verify: Verify, lab: "Lab", lr: float, beta1: float, first: int, last: int
) -> None:
    run = adam(lab, lr, beta1, last + 1)
    scaled = [lr * value for value in run.at("preconditioned_sharpness", first, last)]
    what = f"eta times preconditioned sharpness, steps {first} to {last}, eta {lr}, beta1 {beta1}"
    for name, value, tolerance in (
        ("mean", fmean(scaled), 0.15),
        ("smallest", min(scaled), 0.25),
        ("largest", max(scaled), 0.25),
    ):
        verify(
            "B6", f"{name} {what}", expected=lr * theory.adam_threshold(lr, beta1),
            measured=value, tolerance=("relative", tolerance),
        )  # fmt: skip
    assert run.statuses("StabilityThreshold") <= {"holds", "undecided"}
    assert len({item.value for item in run.readings("break_even_step")}) == 1
    lab.says_nothing(verify, "B6", f"Adam, eta {lr}, beta1 {beta1}", run)


def test_b6_a_small_learning_rate_does_not_get_there(verify: Verify, lab: "Lab") -> None:
    run = adam(lab, 3e-4, 0.9, 3001)
    scaled = 3e-4 * run.values("preconditioned_sharpness")
    verify(
        "B6", "eta times preconditioned sharpness at step 3000, eta 0.0003, beta1 0.9",
        expected=16.0, measured=float(scaled[-1]), tolerance=("relative", 0.05),
    )  # fmt: skip
    assert (scaled.diff() > 0).all()
    assert not run.readings("break_even_step")
    lab.says_nothing(verify, "B6", "Adam, eta 0.0003, beta1 0.9", run)

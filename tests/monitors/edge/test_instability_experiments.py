"""Trainings that diverge, and whether the advice cures them: the same run, as advised."""

import math
from collections.abc import Callable
from math import log10
from typing import TYPE_CHECKING, Any, Final

import pytest
import torch
from torch import Tensor, nn

from gradwatch import presets
from gradwatch.theory import break_even as theory

if TYPE_CHECKING:
    from tests.monitors.edge.conftest import Batch, Lab, Run

PAGE = "Break-even point and edge of stability"

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

Verify = Callable[..., None]


# --- By curvature ------------------------------------------------------------------------------


def descend(lab: "Lab", kind: str, lr: float, momentum: float) -> "Run":
    """Gradient descent on 500 digits, with all monitors and rules."""
    if kind == "linear model":
        model = lab.seeded(lambda: nn.Sequential(nn.Linear(64, 10)))
    else:
        model = lab.network(nn.Tanh if kind == "tanh" else nn.ReLU, hidden=2)
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=momentum)
    return lab.train(model, optimizer, lab.digits(500), lab.half_square, 1000, every=20)


@pytest.mark.parametrize(
    ("kind", "momentum", "factors"),
    [
        ("linear model", 0.0, (1.05, 1.5, 10.0)),
        ("linear model", 0.9, (1.05, 1.5)),
        ("tanh", 0.0, (3.0, 10.0)),
        ("tanh", 0.9, (1.1, 1.5, 10.0)),
        ("ReLU", 0.0, (10.0,)),
        ("ReLU", 0.9, (10.0,)),
    ],
)
def test_a_run_that_diverges_is_told_a_rate_at_which_it_converges(
    verify: Verify, lab: "Lab", kind: str, momentum: float, factors: tuple[float, ...]
) -> None:
    first = descend(lab, kind, 1e-9, momentum).values("sharpness")[0]
    limit = 2 * (1 + momentum) / float(first)
    cured = []
    for factor in factors:
        failed = descend(lab, kind, factor * limit, momentum)
        assert not failed.came_down
        advice = failed.final
        assert advice is not None, f"{kind}, {factor} of the threshold: nothing was said"
        assert (advice.knob, advice.direction, advice.severity) == (
            "learning_rate", "down", "warning",
        )  # fmt: skip
        assert advice.proposed is not None
        followed = descend(lab, kind, advice.proposed, momentum)
        cured.append(followed.came_down and not followed.advice)
    verify(
        "rules", f"diverging runs cured by the advice, {kind}, momentum {momentum:g}, "
        f"lr of {', '.join(f'{item:g}' for item in factors)} thresholds at the start",
        expected=len(factors), measured=sum(cured), tolerance=("absolute", 0),
    )  # fmt: skip


@pytest.mark.parametrize("factor", [1.1, 1.5, 2.0])
def test_a_start_beyond_the_threshold_that_comes_down_is_left_in_peace(
    verify: Verify, lab: "Lab", factor: float
) -> None:
    """A network without momentum is thrown into a flatter region and learns there."""
    run = descend(lab, "tanh", factor * 2 / 8.0795, 0.0)
    lab.says_nothing(verify, "rules", f"tanh, lr of {factor} thresholds at the start", run)


# --- By gradient noise -------------------------------------------------------------------------

STEPS: Final = 600


def regression(*scales: float) -> "Batch":
    """512 examples that one linear model fits: they have their minimum in common."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(512, len(scales), generator=generator) * torch.tensor(scales)
    return inputs, (inputs @ torch.randn(len(scales), generator=generator))[:, None]


def square(model: nn.Module, batch: "Batch") -> Tensor:
    loss: Tensor = 0.5 * (model(batch[0]) - batch[1]).square().mean()
    return loss


def fit(
    lab: "Lab", data: "Batch", lr: float, momentum: float, size: float, **options: Any
) -> "Run":
    model = lab.seeded(lambda: nn.Sequential(nn.Linear(data[0].shape[1], 1, bias=False)))
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=momentum)
    return lab.train(
        model,
        optimizer,
        data,
        square,
        STEPS,
        size=int(size),
        every=10,
        probe_batch=data,
        **options,
    )


ONE_SHARP: Final = (1.0, 0.3, 0.3, 0.3, 0.3)


@pytest.mark.parametrize(
    ("lr", "momentum", "size", "knob"),
    [
        (0.5, 0.9, 1, "momentum"),
        (0.9, 0.9, 2, "momentum"),
        (1.8, 0.9, 4, "batch_size"),
        (2.9, 0.9, 4, "batch_size"),
        (3.3, 0.9, 16, "batch_size"),
        (2.25, 0.5, 2, "batch_size"),
        (1.75, 0.0, 1, "batch_size"),
        (3.9, 0.9, 8, "learning_rate"),
    ],
)
def test_an_instability_by_noise_is_told_what_stops_it(
    verify: Verify, lab: "Lab", lr: float, momentum: float, size: int, knob: str
) -> None:
    data = regression(*ONE_SHARP)
    failed = fit(lab, data, lr, momentum, size)
    what = f"lr {lr}, momentum {momentum}, S {size}"
    assert not failed.came_down
    verify(
        "R1", f"stability ratio without noise, {what}", expected=1.0,
        measured=failed.readings("stability_ratio")[0].value, tolerance="at_most",
    )  # fmt: skip
    # Told before the numbers overflow, and nothing about another knob.
    (first, *others) = failed.advice
    assert {item.knob for item in (first, *others)} == {knob}
    assert first.proposed is not None
    settings = {"learning_rate": lr, "momentum": momentum, "batch_size": float(size)}
    settings[knob] = first.proposed
    followed = fit(lab, data, *settings.values())
    verify(
        "R1", f"log10 of the loss over the first one with the advised {knob}, {what}",
        expected=-1.0, measured=log10((followed.late + 1e-30) / followed.losses[0]),
        tolerance="at_most",
    )  # fmt: skip
    assert not followed.advice


def test_the_advice_comes_while_the_loss_is_finite(verify: Verify, lab: "Lab") -> None:
    run = fit(lab, regression(*ONE_SHARP), 0.5, 0.9, 1)
    said = next(
        report.step
        for report in run.reports
        if any(item.knob == "momentum" for item in report.recommendations)
    )
    verify(
        "R1", "steps to the advice on momentum, lr 0.5, momentum 0.9, S 1", expected=200,
        measured=said, tolerance="at_most",
    )  # fmt: skip


def test_without_noise_the_same_settings_converge(lab: "Lab") -> None:
    data = regression(*ONE_SHARP)
    run = fit(lab, data, 1.8, 0.9, len(data[0]))
    assert run.came_down
    assert not run.advice
    assert run.statuses("NoiseStability") <= {"holds"}


def test_r1_is_the_limit_along_one_direction(verify: Verify, lab: "Lab") -> None:
    """Where 8 directions are equally sharp the noise of each adds to the others.

    For normal inputs and S = 1 it is d + 1 = 9 times as strong as along one of them, so that a
    training below the limit of R1 is unstable all the same.
    """
    data = regression(*[1.0] * 8)
    limit = theory.largest_learning_rate(1.0, 2.0, 1)  # along one direction: 2/3
    exact = theory.largest_learning_rate(1.0, 9.0, 1)  # of all eight: 2/(d + 2)
    for share, expected in ((0.7 * limit, 1.0), (0.7 * exact, -1.0)):
        run = fit(lab, data, share, 0.0, 1, monitors=presets.curvature())
        largest = max(run.losses[-100:])
        grown = log10((largest + 1e-30) / run.losses[0]) if math.isfinite(largest) else math.inf
        verify(
            "R1", f"sign of the growth of the loss, 8 equal directions, lr {share:.3g}, S 1",
            expected=expected, measured=math.copysign(1.0, grown), tolerance=("absolute", 0),
        )  # fmt: skip

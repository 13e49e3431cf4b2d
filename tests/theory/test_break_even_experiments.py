"""Break-even point and edge of stability against simulation, and with PyTorch's optimizers.

Each test is one experiment; the numbers it compares are those of its table row. Seeds fix the
draws, tolerances are statistical, so another generator gives another number that still holds.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from gradwatch.capture.model.parameters import settings_of
from gradwatch.theory import break_even as theory

PAGE = "Break-even point and edge of stability"

Verify = Callable[..., None]
NEAR = 0.02
STEPS = 300


@pytest.mark.parametrize("batch", [1, 5, 25, 50])
def test_b1_second_moment_of_a_step(verify: Verify, batch: int) -> None:
    """The mean of (1 - eta h_B)² over batches of 50 examples with a common minimum."""
    curvatures = np.random.default_rng(0).gamma(2.0, 1.0, 50)
    curvature, variance = float(curvatures.mean()), float(curvatures.var())
    limit = theory.largest_learning_rate(curvature, variance, batch, 50)
    generator = np.random.default_rng(1)
    means = np.array([curvatures[generator.permutation(50)[:batch]].mean() for _ in range(40_000)])
    for share in (0.5, 1.0, 1.5):
        expected = theory.second_moment_factor(share * limit, curvature, variance, batch, 50)
        if share == 1.0:
            verify(
                "B1",
                f"factor at eta_max, S = {batch}",
                expected=1.0,
                measured=expected,
                tolerance=("relative", 1e-9),
            )
        verify(
            "B1",
            f"E(1 - eta h_B)², S = {batch}, eta = {share} eta_max",
            expected=expected,
            measured=float(np.mean((1 - share * limit * means) ** 2)),
            tolerance=("absolute", max(0.015 * expected, 1e-12)),
        )


def second_moment_radius(
    rate: float, curvature: float, variance: float, factor: float, momentum: float
) -> float:
    """Spectral radius of the map of E[z z^T] in a step of heavy ball, z = (w, v)."""

    def step(h: float) -> np.ndarray[Any, np.dtype[np.float64]]:
        return np.array([[1 - rate * h, -rate * momentum], [h, momentum]])

    mean = step(curvature)
    scatter = np.array([[-rate, 0.0], [1.0, 0.0]])
    whole = np.kron(mean, mean) + factor * variance * np.kron(scatter, scatter)
    return float(np.abs(np.linalg.eigvals(whole)).max())


@pytest.mark.parametrize(
    ("curvature", "variance", "factor", "momentum", "limit"),
    [
        (2.0, 3.0, 0.1, 0.9, 0.78351),
        (10.0, 400.0, 1 / 32, 0.9, 0.11259),
        (10.0, 400.0, 1 / 32, 0.5, 0.21818),
        (10.0, 400.0, 1 / 8, 0.0, 0.13333),
    ],
)
def test_b2_heavy_ball_under_noise(
    verify: Verify, curvature: float, variance: float, factor: float, momentum: float, limit: float
) -> None:
    settings = f"lambda {curvature:g}, s² {variance:g}, kappa {factor:.5g}, beta {momentum}"
    rate = theory.largest_learning_rate(curvature, variance, 1 / factor, momentum=momentum)
    verify(
        "B2", f"eta_max, {settings}", expected=limit, measured=rate, tolerance=("relative", 5e-5)
    )
    # At the limit itself, where the radius is 1, and on both sides of it.
    for share, name in ((0.999, "below"), (1.0, "at"), (1.001, "above")):
        radius = second_moment_radius(share * rate, curvature, variance, factor, momentum)
        side = radius if share == 1.0 else float(np.sign(radius - 1))
        verify(
            "B2",
            f"second moments {name} eta_max, {settings}",
            expected=np.sign(share - 1) if share != 1.0 else 1.0,
            measured=side,
            tolerance=("absolute", 1e-9),
        )


# --- B3: the thresholds of PyTorch's own optimizers --------------------------------------------

Make = Callable[[list[Tensor]], Optimizer]


def frozen(optimizer: Optimizer, point: Tensor, square: float) -> None:
    """Puts the second moment of an Adam or RMSprop to what the next step makes one value of.

    It is far above the squares of the gradients.
    """
    state, group = optimizer.state[point], optimizer.param_groups[0]
    decay = group["alpha"] if "alpha" in group else group.get("betas", (0.0, 1.0))[1]
    for name in ("exp_avg_sq", "square_avg"):
        if name in state:
            state[name].fill_(square / decay)
    if "max_exp_avg_sq" in state:
        state["max_exp_avg_sq"].fill_(square)
    if "step" in state:
        state["step"].fill_(1e6)  # without bias corrections, as they change too


def growth(make: Make, curvature: float, *, square: float = 4.0) -> float:
    """Factor of the distance to the minimum of a parabola over 300 steps, late ones only."""
    point = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = make([point])
    point.grad = torch.zeros_like(point)
    optimizer.step()  # makes the state, and does not move
    with torch.no_grad():
        point.fill_(1e-6)
    reached: list[float] = []
    for _ in range(STEPS):
        frozen(optimizer, point, square)
        point.grad = curvature * point.detach()
        optimizer.step()
        reached.append(abs(point.item()))
    early, late = max(reached[:10]), max(reached[-10:])
    return late / early


ROWS: list[tuple[str, Make]] = [
    ("SGD", lambda p: SGD(p, lr=0.1)),
    ("SGD, momentum 0.9", lambda p: SGD(p, lr=0.1, momentum=0.9)),
    ("SGD, Nesterov 0.9", lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True)),
    ("SGD, momentum 0.9, dampening 0.5", lambda p: SGD(p, lr=0.1, momentum=0.9, dampening=0.5)),
    ("SGD, weight decay 1", lambda p: SGD(p, lr=0.1, weight_decay=1.0)),
    (
        "SGD, momentum 0.9, weight decay 1",
        lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=1.0),
    ),
    (
        "SGD, Nesterov 0.9, weight decay 1",
        lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1.0),
    ),
    ("Adam, beta1 0.5", lambda p: Adam(p, lr=0.1, betas=(0.5, 0.999))),
    ("Adam, beta1 0.9", lambda p: Adam(p, lr=0.1)),
    ("AMSGrad", lambda p: Adam(p, lr=0.1, amsgrad=True)),
    ("Adam, weight decay 1", lambda p: Adam(p, lr=0.1, weight_decay=1.0)),
    ("AdamW, beta1 0.5", lambda p: AdamW(p, lr=0.1, betas=(0.5, 0.999), weight_decay=0.0)),
    ("AdamW, beta1 0.9, weight decay 1", lambda p: AdamW(p, lr=0.1, weight_decay=1.0)),
    ("RMSprop", lambda p: RMSprop(p, lr=0.1)),
    ("RMSprop, momentum 0.9", lambda p: RMSprop(p, lr=0.1, momentum=0.9)),
    ("RMSprop, centred, momentum 0.9", lambda p: RMSprop(p, lr=0.1, momentum=0.9, centered=True)),
    ("RMSprop, weight decay 1", lambda p: RMSprop(p, lr=0.1, weight_decay=1.0)),
]


@pytest.mark.parametrize(("name", "make"), ROWS, ids=[name for name, _ in ROWS])
def test_b3_converges_below_the_threshold_and_diverges_above(
    verify: Verify, name: str, make: Make
) -> None:
    """The settings are read as a watch reads them, so that the whole way is tested."""
    optimizer = make([torch.nn.Parameter(torch.zeros(1))])
    settings = settings_of(optimizer)
    rates = [group["lr"] for group in optimizer.param_groups]
    threshold = theory.threshold_of(type(optimizer).__name__, rates, **settings)
    assert threshold.known
    root = math.sqrt(4.0)  # P; eps is far below it
    decay = settings["weight_decay"] if name.startswith(("Adam,", "RMSprop")) else 0.0
    for share in (1 - NEAR, 1 + NEAR):
        # Adam and RMSprop have the threshold on P^-1 (H + wd), the others on H.
        curvature = share * threshold.value
        if threshold.preconditioned:
            curvature = curvature * root - decay
        verify(
            "B3",
            f"{name}: moves away from the minimum at {share:g} of the threshold",
            expected=float(share > 1),
            measured=float(growth(make, curvature) > 1),
            tolerance=("absolute", 0),
        )

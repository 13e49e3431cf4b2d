"""Learning-rate/batch ratio against simulation: recursions, wells, Adam's state, trainings.

Each test is one experiment; the numbers it compares are those of its table row. Seeds fix the
draws, tolerances are statistical, so another generator gives another number that still holds.
"""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gradwatch.numerics.hvp import Hessian
from gradwatch.theory import lr_batch_ratio as theory

PAGE = "Learning-rate / batch-size ratio"

Verify = Callable[..., None]


@pytest.mark.parametrize(
    ("rate", "momentum"),
    [
        (0.1, 0.0),
        pytest.param(1.0, 0.0, marks=pytest.mark.slow),
        (1.8, 0.0),
        pytest.param(0.1, 0.9, marks=pytest.mark.slow),
        pytest.param(2.0, 0.9, marks=pytest.mark.slow),
    ],
)
def test_v1_stationary_variance(verify: Verify, rate: float, momentum: float) -> None:
    generator = np.random.default_rng(0)
    chains, steps, batch = 4000, 2000, 8
    position, velocity, total = np.zeros(chains), np.zeros(chains), 0.0
    for step in range(steps):
        gradient = position + generator.standard_normal(chains) / math.sqrt(batch)
        velocity = momentum * velocity + gradient
        position = position - rate * velocity
        if step >= steps // 2:
            total += float(np.mean(position**2)) / (steps - steps // 2)
    verify(
        "V1",
        f"variance around the minimum, eta lambda = {rate}, momentum {momentum}",
        expected=theory.stationary_variance(rate, 1, 1, batch, momentum),
        measured=total,
        tolerance=("relative", 0.02),
    )


def share_in_flat_well(higher: float, noise_level: float) -> float:
    """Share of time in the well at -0.5 of bend 2, raised, against that at 0.5 of bend 18."""
    generator = np.random.default_rng(0)
    particles, steps, rate = 2000, 20_000, 0.004
    x = np.repeat([-0.5, 0.5], particles // 2)
    kick = math.sqrt(2 * noise_level * rate)
    inside = 0.0
    for step in range(steps):
        in_flat = higher + (x + 0.5) ** 2 < 9 * (x - 0.5) ** 2
        slope = np.where(in_flat, 2 * (x + 0.5), 18 * (x - 0.5))
        x = x - rate * slope + kick * generator.standard_normal(particles)
        if step >= steps // 2:
            inside += float(in_flat.mean()) / (steps // 2)
    return inside


@pytest.mark.slow
@pytest.mark.parametrize(
    ("higher", "noise_level"), [(0.0, 0.15), (0.15, 0.15), (0.15, 0.3), (0.3, 0.15)]
)
def test_v2_flat_and_sharp_wells(verify: Verify, higher: float, noise_level: float) -> None:
    share = share_in_flat_well(higher, noise_level)
    expected = theory.minima_ratio(2, 18, higher, 0.0, noise_level)
    what = f"flat well {higher} higher, n = {noise_level}"
    verify(
        "V2",
        f"p_A/p_B, {what}",
        expected=expected,
        measured=share / (1 - share),
        tolerance=("relative", 0.15),
    )
    verify(
        "V2",
        f"the preferred well, {what}",
        expected=float(expected > 1),
        measured=float(share > 0.5),
        tolerance=("absolute", 0),
    )


@pytest.mark.parametrize("batch", [2, 16, 128])
def test_v7_optimal_step_on_a_quadratic(verify: Verify, batch: int) -> None:
    """The step with the smallest loss on average, over 5000 batch gradients."""
    generator = np.random.default_rng(1)
    bends = generator.uniform(0.2, 2.0, 50)
    point, spread = generator.standard_normal(50), generator.uniform(1.0, 3.5, 50)
    gradient = bends * point
    square, bend = float(gradient @ gradient), float(gradient @ (bends * gradient))
    scale = theory.curvature_noise_scale(float(bends @ spread**2), bend)
    draws = gradient + spread * generator.standard_normal((5000, 50)) / math.sqrt(batch)
    largest = theory.noiseless_step(square, bend)
    steps = largest * np.arange(0.005, 1.2, 0.005)
    losses = [0.5 * float(np.mean((point - step * draws) ** 2 @ bends)) for step in steps]
    verify(
        "V7",
        f"step that gains most, B = {batch}",
        expected=theory.optimal_step(largest, scale, batch),
        measured=steps[int(np.argmin(losses))],
        tolerance=("absolute", 0.01 * largest),
    )
    verify(
        "V7",
        f"its gain, B = {batch}",
        expected=theory.best_gain(square, bend, scale, batch),
        measured=0.5 * float(point**2 @ bends) - min(losses),
        tolerance=("relative", 0.02),
    )


@pytest.mark.parametrize(("steps", "repeats", "tolerance"), [(3000, 1, 0.03), (20, 100, 0.02)])
def test_v8_adam_state(verify: Verify, steps: int, repeats: int, tolerance: float) -> None:
    """PyTorch's Adam at learning rate 0 on gradients of one law: both early and late."""
    generator = torch.Generator().manual_seed(0)
    batch, width = 8, 2000
    gradient = 0.3 * torch.randn(width, generator=generator, dtype=torch.float64)
    spread = 0.5 + torch.rand(width, generator=generator, dtype=torch.float64)
    estimates = []
    for _ in range(repeats):
        parameter = nn.Parameter(torch.zeros(width, dtype=torch.float64))
        optimizer = torch.optim.Adam([parameter], lr=0.0, betas=(0.9, 0.999))
        for _ in range(steps):
            noise = torch.randn(width, generator=generator, dtype=torch.float64)
            parameter.grad = gradient + spread * noise / math.sqrt(batch)
            optimizer.step()
        state = optimizer.state[parameter]
        first = float((state["exp_avg"] / (1 - 0.9**steps)).square().sum())
        second = float(state["exp_avg_sq"].sum() / (1 - 0.999**steps))
        estimates.append(theory.adam_estimate(second, first, 0.9, batch, steps))
    square, variance = np.mean(estimates, axis=0)
    for what, expected, measured in (
        ("||G||²", gradient.square().sum(), square),
        ("tr Sigma", spread.square().sum(), variance),
    ):
        verify(
            "V8",
            f"{what} from Adam's state after {steps} steps",
            expected=expected,
            measured=measured,
            tolerance=("relative", tolerance),
        )


# --- Trainings -----------------------------------------------------------------------------------


def digits() -> tuple[Tensor, Tensor]:
    datasets = pytest.importorskip("sklearn.datasets")
    pixels, labels = (torch.as_tensor(part) for part in datasets.load_digits(return_X_y=True))
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))[:1280]
    return pixels[order].float() / 16, labels[order]


def classifier(seed: int) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))


def epochs(
    model: nn.Module, data: tuple[Tensor, Tensor], rate: float, batch: int, seed: int
) -> Iterator[float]:
    """Train by plain SGD; give the loss on all data after every epoch."""
    generator = torch.Generator().manual_seed(seed)
    parameters: list[Tensor] = list(model.parameters())
    while True:
        for some in torch.randperm(len(data[0]), generator=generator).split(batch):
            loss = nn.functional.cross_entropy(model(data[0][some]), data[1][some])
            gradients = torch.autograd.grad(loss, parameters)
            with torch.no_grad():
                torch._foreach_add_(parameters, gradients, alpha=-rate)
        with torch.no_grad():
            whole = float(nn.functional.cross_entropy(model(data[0]), data[1]))
        yield whole


def top_curvature(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    loss = nn.functional.cross_entropy(model(data[0]), data[1])
    hessian = Hessian(loss, list(model.parameters()))
    vector = hessian.gradient
    value = math.nan
    for _ in range(100):
        length = math.sqrt(sum(float(part.square().sum()) for part in vector))
        vector = tuple(part / length for part in vector)
        image = hessian(vector)
        value = sum(float((v * h).sum()) for v, h in zip(vector, image, strict=True))
        vector = image
    return value


SCALES = (1, 2, 4, 8, 16, 64)


@pytest.mark.slow
def test_v5_only_the_ratio_matters_until_the_steps_are_too_long(verify: Verify) -> None:
    data = digits()
    curves = {scale: np.zeros(15) for scale in SCALES}
    for seed in range(3):
        for scale, curve in curves.items():
            losses = epochs(classifier(seed), data, 0.025 * scale, 8 * scale, seed)
            curve += [next(losses) / 3 for _ in range(15)]
    for scale in SCALES[1:-1]:
        verify(
            "V5",
            f"loss after 15 epochs, eta and S times {scale}",
            expected=curves[1][14],
            measured=curves[scale][14],
            tolerance=("relative", 0.02),
        )
    verify(
        "V5",
        "twice the loss after 5 epochs is below that at 64 times",
        expected=curves[64][4],
        measured=2 * curves[1][4],
        tolerance="at_most",
    )


@pytest.mark.slow
def test_v6_a_larger_ratio_ends_in_flatter_places(verify: Verify) -> None:
    data = digits()
    curvatures = []
    settings = ((0.025, 32), (0.1, 32), (0.4, 32), (0.8, 8))
    for rate, batch in settings:
        model = classifier(0)
        losses = epochs(model, data, rate, batch, seed=0)
        assert any(loss <= 0.1 for loss, _ in zip(losses, range(400), strict=False))
        curvatures.append(top_curvature(model, data))
    for (before, after), (rate, batch) in zip(pairwise(curvatures), settings[1:], strict=True):
        verify(
            "V6",
            f"lambda_max at loss 0.1, eta/S = {rate / batch:.3g}, against the ratio before",
            expected=before,
            measured=after,
            tolerance="at_most",
        )

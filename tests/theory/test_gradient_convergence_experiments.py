"""Gradient convergence against simulation: quadratics, all masks, small networks.

Each test is one experiment; the numbers it compares are those of its table row.
"""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from gradwatch.theory import gradient_convergence as theory

PAGE = "Gradient convergence"

Verify = Callable[..., None]


def mean_square_gradients(
    eigenvalues: np.ndarray, noise: float, rate: float, steps: int
) -> np.ndarray:
    """Exact E ||grad f||² at each step of SGD from w = 1 on a quadratic.

    Each coordinate has independent gradient noise of the same variance.
    """
    second = np.ones_like(eigenvalues)
    squares = np.empty(steps)
    for step in range(steps):
        squares[step] = np.sum(eigenvalues**2 * second)
        second = (1 - rate * eigenvalues) ** 2 * second + rate**2 * noise
    return squares


@pytest.mark.parametrize(("product", "ratio"), [(0.5, 0.99987), (1.0, 0.99990)])
def test_t1_one_dimension_attains_the_bound(verify: Verify, product: float, ratio: float) -> None:
    curvature, noise, steps, rate = 2.0, 0.5, 10_000, product / 2.0
    squares = mean_square_gradients(np.array([curvature]), noise, rate, steps)
    split = theory.stationarity_bound(0.5 * curvature, curvature, noise, 1, rate, steps)
    verify(
        "T1",
        f"mean ||grad f||² over its bound, 1-D, gL = {product}",
        expected=ratio,
        measured=squares.mean() / split.bound,
        tolerance=("absolute", 1e-5),
    )
    verify(
        "T1",
        f"last ||grad f||², 1-D, gL = {product}",
        expected=theory.noise_floor(curvature, noise, 1, rate),
        measured=squares[-1],
        tolerance=("relative", 1e-8),
    )


@pytest.mark.parametrize("steps", [100, 1000, 10_000])
@pytest.mark.parametrize("product", [0.05, 0.5, 1.0, 1.5])
def test_t1_twenty_dimensions_stay_below_the_bound(
    verify: Verify, product: float, steps: int
) -> None:
    eigenvalues = np.logspace(-3, math.log10(4), 20)
    rate = product / 4
    squares = mean_square_gradients(eigenvalues, 0.05, rate, steps)
    gap = float(eigenvalues.sum()) / 2
    verify(
        "T1",
        f"mean ||grad f||², 20-D, gL = {product}, N = {steps}",
        expected=theory.stationarity_bound(gap, 4, 20 * 0.05, 1, rate, steps).bound * (1 + 1e-9),
        measured=squares.mean(),
        tolerance="at_most",
    )


def two_layers(first: Tensor, second: Tensor, inputs: Tensor) -> Tensor:
    return (torch.tanh(inputs @ first.T) @ second.T).square().sum()


def test_t3_denoising_is_input_dropout(verify: Verify) -> None:
    generator = torch.Generator().manual_seed(0)
    keep = 0.7
    x = torch.randn(16, 6, generator=generator, dtype=torch.float64)
    mask = (torch.rand(16, 6, generator=generator) < keep).double()
    first = torch.randn(5, 6, generator=generator, dtype=torch.float64).requires_grad_()
    scaled = (keep * first.detach()).requires_grad_()
    second = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    denoising = two_layers(first, second, x * mask)
    dropout = two_layers(scaled, second, x * mask / keep)
    verify(
        "T3",
        "loss of masking corruption and of input dropout with zeta W",
        expected=float(dropout.detach()),
        measured=float(denoising.detach()),
        tolerance=("relative", 1e-12),
    )
    (of_denoising,) = torch.autograd.grad(denoising, first)
    (of_dropout,) = torch.autograd.grad(dropout, scaled)
    verify(
        "T3",
        "largest difference of the gradients, denoising and zeta times dropout",
        expected=0.0,
        measured=float((of_denoising - keep * of_dropout).abs().max()),
        tolerance=("absolute", 1e-12),
    )


@pytest.mark.parametrize("inverted", [True, False])
def test_t3_penalty_by_all_masks(verify: Verify, inverted: bool) -> None:
    generator = np.random.default_rng(0)
    weights, x, y = (
        generator.normal(size=(4, 6)),
        generator.normal(size=6),
        generator.normal(size=4),
    )
    keep = 0.6
    loss = 0.0
    for bits in itertools.product([0.0, 1.0], repeat=6):
        mask = np.array(bits)
        probability = keep ** mask.sum() * (1 - keep) ** (6 - mask.sum())
        masked = x * mask / keep if inverted else x * mask
        loss += probability * float(np.sum((y - weights @ masked) ** 2))
    shrunk = weights if inverted else keep * weights
    penalty = theory.linear_dropout_penalty(weights, x, keep, inverted)
    verify(
        "T3",
        f"loss averaged over all masks, {'inverted' if inverted else 'plain'}",
        expected=float(np.sum((y - shrunk @ x) ** 2)) + penalty,
        measured=loss,
        tolerance=("relative", 1e-12),
    )


@pytest.mark.parametrize(
    ("keep_in", "keep_out", "masks"), [(0.8, 0.5, 1), (0.8, 0.5, 4), (0.5, 0.5, 32)]
)
def test_t3_update_coverage(verify: Verify, keep_in: float, keep_out: float, masks: int) -> None:
    generator = np.random.default_rng(0)
    ins = generator.random((4000, masks)) < keep_in
    outs = generator.random((4000, masks)) < keep_out
    verify(
        "T3",
        f"share of weights with a gradient, zeta {keep_in} and {keep_out}, B = {masks}",
        expected=theory.update_coverage(keep_in, keep_out, masks),
        measured=np.mean((ins & outs).any(axis=1)),
        tolerance=("absolute", 0.02),
    )


def digits() -> tuple[Tensor, Tensor]:
    """Pixels in [0, 1] and one-hot labels of 1500 digits."""
    datasets = pytest.importorskip("sklearn.datasets")
    pixels, labels = (torch.as_tensor(part) for part in datasets.load_digits(return_X_y=True))
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))[:1500]
    return pixels[order].double() / 16, torch.nn.functional.one_hot(labels[order], 10).double()


def layer_squares(
    weights: list[Tensor], x: Tensor, y: Tensor, keep: float, inverted: bool
) -> list[float]:
    """Mean over samples of ||grad_W_l||² under fresh masks on the input of every layer."""
    generator = torch.Generator().manual_seed(1)
    inputs, pre_activations, h = [], [], x
    for weight in weights:
        mask = (torch.rand(h.shape, generator=generator) < keep).double()
        inputs.append(h * mask / keep if inverted else h * mask)
        pre_activations.append(inputs[-1] @ weight)
        pre_activations[-1].requires_grad_()
        h = torch.sigmoid(pre_activations[-1])
    errors = torch.autograd.grad(0.5 * (h - y).square().sum(), pre_activations)
    # The gradient of one sample is an outer product.
    return [
        float((i.detach().square().sum(dim=1) * e.square().sum(dim=1)).mean())
        for i, e in zip(inputs, errors, strict=True)
    ]


@pytest.mark.parametrize(
    ("keep", "inverted"), [(1.0, True), (0.5, True), (0.3, True), (0.5, False), (0.3, False)]
)
@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0])
def test_t6_structure_bound(verify: Verify, scale: float, keep: float, inverted: bool) -> None:
    x, y = digits()
    widths = [64, 32, 32, 10]
    generator = torch.Generator().manual_seed(0)
    weights = [
        scale * torch.randn(n, m, generator=generator, dtype=torch.float64) / math.sqrt(n)
        for n, m in itertools.pairwise(widths)
    ]
    bounds = theory.layer_gradient_squares(
        widths,
        [float(weight.square().sum()) for weight in weights],
        [float(torch.linalg.matrix_norm(weight, 2)) ** 2 for weight in weights],
        input_square=float(x.square().mean()),
        keep=[keep] * 3,
        inverted=inverted,
    )
    squares = layer_squares(weights, x, y, keep, inverted)
    verify(
        "T6",
        f"E ||grad_W||² over its bound, closest layer, weights x {scale}, "
        f"{'inverted' if inverted else 'plain'} masks of {keep}",
        expected=1.0,
        measured=max(square / bound for square, bound in zip(squares, bounds, strict=True)),
        tolerance="at_most",
    )


@pytest.mark.parametrize("scale", [0.0, 0.3, 1.0])
def test_t6_one_layer(verify: Verify, scale: float) -> None:
    x, y = digits()
    generator = torch.Generator().manual_seed(0)
    weight = scale * torch.randn(64, 10, generator=generator, dtype=torch.float64)
    s = torch.sigmoid(x @ weight)
    gradients = torch.einsum("ni,no->nio", x, (s - y) * s * (1 - s)).flatten(1)
    verify(
        "T6",
        f"sigma² of one sigmoid layer, weights x {scale}",
        expected=theory.one_layer_variance(64, 10, float(x.square().mean())),
        measured=float((gradients - gradients.mean(dim=0)).square().sum(dim=1).mean()),
        tolerance="at_most",
    )
    # The Hessian has one block an output: E of the bend times x x^T.
    bends = s**2 * (1 - s) ** 2 + (s - y) * s * (1 - s) * (1 - 2 * s)
    blocks = torch.einsum("no,ni,nj->oij", bends, x, x) / len(x)
    top = float(torch.linalg.eigvalsh(x.T @ x / len(x))[-1])
    verify(
        "T6",
        f"top Hessian eigenvalue of one sigmoid layer, weights x {scale}",
        expected=theory.one_layer_smoothness(top),
        measured=float(torch.linalg.eigvalsh(blocks).max()),
        tolerance="at_most",
    )


def test_t6_the_smoothness_bound_is_attained(verify: Verify) -> None:
    """One input of fixed value, target 0, and every weight along the curve."""
    z = np.linspace(-3, 1, 4001)
    s = 1 / (1 + np.exp(-z))
    bends = s**2 * (1 - s) ** 2 + s * s * (1 - s) * (1 - 2 * s)
    verify(
        "T6",
        "largest curvature of one sigmoid unit, x = 2",
        expected=theory.one_layer_smoothness(4.0),
        measured=4.0 * bends.max(),
        tolerance=("relative", 1e-6),
    )

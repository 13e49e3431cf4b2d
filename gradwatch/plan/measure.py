"""Constants of a fresh network on a few probe batches: curvature, gradient noise, loss."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gradwatch.capture.probe.objective import Objective
from gradwatch.errors import ConfigError
from gradwatch.numerics.hvp import Hessian
from gradwatch.numerics.lanczos import extreme_eigenpairs

FEWEST = 2  # batches, and samples in one: a variance needs two
PARTS = 8  # micro-batches of a probe batch
FEWEST_PARTS = 4  # micro-batches of all: an error needs two pairs of them
ITERATIONS = 50
CONVERGED = 1e-4  # relative error of the eigenvalue


class Estimate(NamedTuple):
    """An unbiased estimate.

    Attributes:
        value: what was estimated [(L/P)²].
        error: about its standard error [(L/P)²].
    """

    value: float
    error: float


class Gradient(NamedTuple):
    """What micro-batches show of the gradient.

    Attributes:
        square: of the true gradient; a single estimate may be negative.
        variance: of the gradient of one sample, trace of the covariance.
    """

    square: Estimate
    variance: Estimate


def loss_and_curvature(objectives: Sequence[Objective]) -> tuple[float, float]:
    """Mean loss over the batches, and the top eigenvalue of its Hessian.

    Args:
        objectives: the loss on each batch, to be evaluated inside `undisturbed`.

    Returns:
        Loss [L] and eigenvalue [L/P²].

    Raises:
        ConfigError: if the loss is not finite.
    """
    parameters = objectives[0].parameters()
    losses = [objective.loss(parameters) for objective in objectives]
    loss = torch.stack(losses).mean()
    value = float(loss.detach())
    if not math.isfinite(value):
        raise ConfigError(f"the loss must be finite, got {value}")
    return value, top_eigenvalue(Hessian(loss, list(parameters.values())))


def top_eigenvalue(hessian: Hessian) -> float:
    """The largest eigenvalue, by the Lanczos iteration.

    Power iteration would find the strongest one, and nothing where two of opposite signs are
    equally strong, as they are in networks with small outputs.

    Args:
        hessian: the Hessian of a loss.

    Returns:
        The eigenvalue, from below; nan if the Hessian is not finite [L/P²].
    """
    found = extreme_eigenpairs(
        hessian,
        [torch.randn_like(parameter) for parameter in hessian.parameters],
        ITERATIONS,
        tolerance=CONVERGED,
        reorthogonalise=False,
        stop=True,
    )
    return float(found.largest.value)


def gradient_estimate(objectives: Sequence[Objective], sizes: Sequence[int]) -> Gradient:
    """Square and variance of the gradient, from micro-batches of equal size of all batches.

    With A micro-batches of b samples, S the sum of their gradients and q that of their squares, the
    square is (||S||² - q) / (A (A-1)), the variance b (q - ||S||²/A) / (A-1).

    The errors come from V1, the variance of ||g_k||², and V2, that of ||g_1 - g_2||²/2 over pairs.
    Of gradients about normal V2 is twice the trace of the squared covariance, and V1 is V2 and four
    times the variance along the gradient. So the error of the square is the root of (V1 - V2)/A +
    V2/(A (A-1)), two to three times too large where noise hides the gradient, because V1 - V2 is
    taken as 0 where it is negative; that of the variance is a little too large.

    Args:
        objectives: the loss on each batch, to be evaluated inside `undisturbed`.
        sizes: samples of each batch, enough for `FEWEST_PARTS` micro-batches.

    Returns:
        Both estimates.
    """
    rows = microbatch_size(sizes)
    total: list[Tensor] = []
    before: list[Tensor] = []
    squares, pairs = [], []
    for gradient in _microbatch_gradients(objectives, sizes, rows):
        total = [s + g for s, g in zip(total, gradient, strict=True)] if total else gradient
        squares.append(_dot(gradient, gradient))
        if before:
            difference = [g - h for g, h in zip(gradient, before, strict=True)]
            pairs.append(_dot(difference, difference) / 2)
        before = [] if before else gradient
    return _estimates(squares, pairs, _dot(total, total), rows)


def _estimates(
    squares: Sequence[float], pairs: Sequence[float], total: float, rows: int
) -> Gradient:
    count, parts = len(squares), math.fsum(squares)
    square = (total - parts) / (count * (count - 1))
    variance = rows * max(0.0, parts - total / count) / (count - 1)
    noise = _spread(pairs)
    along = max(0.0, _spread(squares) - noise)
    return Gradient(
        Estimate(square, math.sqrt(along / count + noise / (count * (count - 1)))),
        Estimate(variance, rows * math.sqrt(noise / len(pairs))),
    )


def microbatch_size(sizes: Sequence[int]) -> int:
    """Samples in a micro-batch: an eighth of the smallest batch, and two for batch normalisation.

    Args:
        sizes: samples of each batch.

    Returns:
        At least 2.
    """
    return max(FEWEST, min(sizes) // PARTS)


def count_parts(sizes: Sequence[int]) -> int:
    """Micro-batches of all batches.

    Args:
        sizes: samples of each batch.

    Returns:
        How many are whole.
    """
    rows = microbatch_size(sizes)
    return sum(size // rows for size in sizes)


def _microbatch_gradients(
    objectives: Sequence[Objective], sizes: Sequence[int], rows: int
) -> Iterator[list[Tensor]]:
    for objective, size in zip(objectives, sizes, strict=True):
        parameters = objective.parameters()
        leaves = list(parameters.values())
        for start in range(0, size - rows + 1, rows):
            loss = objective.loss(parameters, slice(start, start + rows))
            slopes = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
            yield list(slopes)


def _spread(values: Sequence[float]) -> float:
    """Variance of at least two numbers."""
    return float(torch.tensor(values, dtype=torch.float64).var())


def _dot(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    pairs = zip(first, second, strict=True)
    return math.fsum(float((one.double() * two.double()).sum()) for one, two in pairs)

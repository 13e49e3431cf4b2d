"""Constants of a fresh network on a few probe batches: curvature, gradient noise, loss."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gradwatch.capture.probe.objective import Objective
from gradwatch.errors import ConfigError
from gradwatch.numerics.hvp import Hessian

FEWEST = 2  # batches, and samples in one: a variance needs two
PARTS = 8  # micro-batches of a probe batch
ITERATIONS = 50
CONVERGED = 1e-3  # relative change of the eigenvalue in one iteration


class Variance(NamedTuple):
    """Variance of the gradient of one sample.

    Attributes:
        value: trace of the covariance, unbiased [(L/P)²].
        error: standard error of it [(L/P)²].
    """

    value: float
    error: float


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
    """The largest eigenvalue, by power iteration.

    The iteration finds the eigenvalue of the largest magnitude. If that is negative it is repeated
    on the Hessian shifted by it.

    Args:
        hessian: the Hessian of a loss.

    Returns:
        The eigenvalue [L/P²].
    """
    largest = _power_iteration(hessian, 0.0)
    return largest if largest >= 0.0 else _power_iteration(hessian, -largest) + largest


def _power_iteration(hessian: Hessian, shift: float) -> float:
    """Eigenvalue of the largest magnitude of the Hessian plus shift times the identity."""
    vector = _normalised([torch.randn_like(parameter) for parameter in hessian.parameters])
    value = math.nan
    for _ in range(ITERATIONS):
        image = [h + shift * v for h, v in zip(hessian(vector), vector, strict=True)]
        before, value = value, _dot(image, vector)
        if abs(value - before) <= CONVERGED * abs(value):
            break
        vector = _normalised(image)
    return value


def gradient_variance(objectives: Sequence[Objective], sizes: Sequence[int]) -> Variance:
    """Variance of one sample's gradient, from micro-batches of equal size of all batches.

    With A micro-batches of b samples, S the sum of their gradients and q that of their squares, it
    is b (q - ||S||²/A) / (A-1). Its error is the spread of the estimates b ||g_1 - g_2||²/2 from
    pairs of them, so it is a little too large.

    Args:
        objectives: the loss on each batch, to be evaluated inside `undisturbed`.
        sizes: samples of each batch.

    Returns:
        The variance.
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
            pairs.append(rows * _dot(difference, difference) / 2)
        before = [] if before else gradient
    count = len(squares)
    spread = max(0.0, math.fsum(squares) - _dot(total, total) / count)
    variance = rows * spread / (count - 1)
    return Variance(variance, _standard_error(pairs))


def microbatch_size(sizes: Sequence[int]) -> int:
    """Samples in a micro-batch: an eighth of the smallest batch, and two for batch normalisation.

    Args:
        sizes: samples of each batch.

    Returns:
        At least 2.
    """
    return max(FEWEST, min(sizes) // PARTS)


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


def _standard_error(values: Sequence[float]) -> float:
    if len(values) == 1:
        return math.inf
    tensor = torch.tensor(values, dtype=torch.float64)
    return float(tensor.std()) / math.sqrt(len(values))


def _dot(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    pairs = zip(first, second, strict=True)
    return math.fsum(float((one.double() * two.double()).sum()) for one, two in pairs)


def _normalised(vector: Sequence[Tensor]) -> list[Tensor]:
    length = math.sqrt(_dot(vector, vector))
    return [part / length for part in vector] if length > 0.0 else list(vector)

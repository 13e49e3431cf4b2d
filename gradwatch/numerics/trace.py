"""The trace of an operator that can only be multiplied with vectors."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gradwatch.numerics.flat import flatten, unflatten
from gradwatch.numerics.lanczos import Operator
from gradwatch.numerics.noise import inner_product


class Trace(NamedTuple):
    """An estimate of a trace.

    Attributes:
        value: (), unbiased; may have either sign.
        standard_error: (), from the scatter of the samples; NaN for a single one.
    """

    value: Tensor
    standard_error: Tensor


def hutchinson_trace(
    operator: Operator, like: Sequence[Tensor], samples: int, seed: int = 0
) -> Trace:
    """Trace of a symmetric operator from products with random signs, without a host read.

    `tr H = E[z^T H z]` for independent signs z. The variance of one sample is twice the sum of the
    squares of all entries beside the diagonal, so that a diagonal operator is exact. All samples
    are drawn, whatever the first ones look like: neither a negative trace nor one near 0 ends it.

    Args:
        operator: symmetric, such as a `Hessian`.
        like: one tensor for each that the operator takes, at least one.
        samples: how many products to make; the error of the error is 1/sqrt(2 (samples - 1)).
        seed: of the signs, which leave PyTorch's random streams alone.

    Returns:
        Trace and standard error, in the unit of the operator.

    References:
        Hutchinson 1990, "A stochastic estimator of the trace of the influence matrix".

    Example:
        >>> hutchinson_trace(lambda v: [-2.0 * v[0]], [torch.zeros(3)], samples=4)
        Trace(value=tensor(-6.), standard_error=tensor(0.))
    """
    flat = flatten(like)
    generator = torch.Generator(flat.device).manual_seed(seed)
    found = []
    for _ in range(samples):
        bits = torch.randint(2, flat.shape, generator=generator, device=flat.device)
        signs = unflatten(bits.to(flat.dtype).mul_(2).sub_(1), like)
        found.append(inner_product(signs, operator(signs)))
    values = torch.stack(found)
    error = values.std() / samples**0.5 if samples > 1 else torch.full_like(values[0], torch.nan)
    return Trace(values.mean(), error)

"""Estimators of gradient noise, on the device of the gradients.

The squared norm of a batch gradient is no estimate of that of the true gradient: it is too large by
the noise. The estimators here are unbiased, so that theirs may be negative: keep the sign and
average over steps.
"""

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from gradwatch.numerics.norms import CHUNK

POWER_ITERATIONS: Final = 30


def inner_product(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """Sum over all entries of the products of two lists of tensors.

    Args:
        first: n tensors of any shape; half precision is widened.
        second: n tensors of the same shapes.

    Returns:
        () tensor on the device of the first tensor, in the product of the units.

    Example:
        >>> inner_product([torch.tensor([1.0, 2.0])], [torch.tensor([3.0, 4.0])])
        tensor(11.)
    """
    return _sum([_dot(one, two) for one, two in zip(first, second, strict=True)])


def squared_distance(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """Squared L2 norm of the difference of two lists of tensors.

    Args:
        first: n tensors of any shape; half precision is widened.
        second: n tensors of the same shapes.

    Returns:
        () tensor on the device of the first tensor, in the square of the unit.

    Example:
        >>> squared_distance([torch.tensor([1.0, 2.0])], [torch.tensor([4.0, 6.0])])
        tensor(25.)
    """
    differences = (_flat(one) - _flat(two) for one, two in zip(first, second, strict=True))
    return _sum([_dot(difference, difference) for difference in differences])


def split_by_parts(
    total_square: Tensor, part_squares: Tensor, share_squares: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Gradient and noise from the parts that a step's gradient was averaged from.

    For independent parts with contributions `c_i` of mean `p_i G` to the whole `S = sum_i c_i`,
    each of a variance inverse to its number of samples, `V = E||S - G||²` is the variance of the
    whole, and this solves `E||S||² = ||G||² + V` and `E sum_i ||c_i||² = sum_i p_i² ||G||² + V`.
    With A equal parts it is the U-statistic `(||S||² - q)/(1 - 1/A)`.

    Args:
        total_square: () `||S||²` [L²/P²].
        part_squares: () `sum_i ||c_i||²` [L²/P²].
        share_squares: `sum_i p_i²`, below 1.

    Returns:
        () unbiased `||G||²` [L²/P²], which may be negative, and () unbiased `V` [L²/P²].

    References:
        McCandlish et al. 2018, Appendix A, arXiv:1812.06162, has the case of two batch sizes.

    Example:
        >>> split_by_parts(torch.tensor(1.0), torch.tensor(2.0), 0.5)
        (tensor(-2.), tensor(3.))
    """
    rest = 1.0 - share_squares
    square = (total_square - part_squares) / rest
    return square, (part_squares - share_squares * total_square) / rest


def split_by_halves(
    first: Sequence[Tensor], second: Sequence[Tensor], half: int
) -> tuple[Tensor, Tensor]:
    """Gradient and noise from the mean gradients of two halves of a batch.

    Args:
        first: the gradient of one half [L/P].
        second: the gradient of the other one [L/P].
        half: number of examples in each.

    Returns:
        () unbiased `||G||² = g1 . g2` [L²/P²], which may be negative, and () unbiased variance of
        the gradient of one sample, `half ||g1 - g2||²/2` [L² sample/P²].

    Example:
        >>> split_by_halves([torch.tensor([1.0])], [torch.tensor([3.0])], 8)
        (tensor(3.), tensor(16.))
    """
    return inner_product(first, second), half * squared_distance(first, second) / 2


def split_by_moments(
    first_square: Tensor, second: Tensor, shrink: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Gradient and noise from the bias-corrected state of Adam.

    For gradients of one law, `E sum v_hat = ||G||² + V` and `E sum m_hat² = ||G||² + r V`. A
    gradient that drifts within the memory of Adam makes `V` too large.

    Args:
        first_square: () sum of `m_hat²` [L²/P²].
        second: () sum of `v_hat` [L²/P²].
        shrink: `r`, variance of `m_hat` over that of one gradient, below 1.

    Returns:
        () `||G||²` [L²/P²], which may be negative, and () variance `V` of the gradient of one step
        [L²/P²].

    Example:
        >>> split_by_moments(torch.tensor(1.0), torch.tensor(3.0), 0.5)
        (tensor(-1.), tensor(4.))
    """
    noise = (second - first_square) / (1.0 - shrink)
    return first_square - noise * shrink, noise


def mean_squared_norm(rows: Tensor) -> Tensor:
    """Unbiased squared norm of the mean of independent rows.

    `(||sum_i x_i||² - sum_i ||x_i||²) / (n (n - 1))`.

    Args:
        rows: (n, d) tensor, n at least 2.

    Returns:
        () tensor in the square of the unit of the entries; may be negative.

    Example:
        >>> mean_squared_norm(torch.tensor([[1.0, 0.0], [1.0, 2.0]]))
        tensor(1.)
    """
    count = rows.shape[0]
    return (rows.sum(0).square().sum() - rows.square().sum()) / (count * (count - 1))


def top_second_moment(rows: Tensor, iterations: int = POWER_ITERATIONS) -> Tensor:
    """Largest eigenvalue of `X^T X / n`, by power iteration without a host read.

    Args:
        rows: (n, d) tensor X.
        iterations: number of products with `X^T X`.

    Returns:
        () tensor in the square of the unit of the entries. It is approached from below, with an
        error of the order of (second over largest eigenvalue)^(2 iterations).

    Example:
        >>> top_second_moment(torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
        tensor(2.)
    """
    with torch.autocast(rows.device.type, enabled=False):
        # Any fixed vector that is orthogonal to nothing in particular: no random draw is needed.
        entries = torch.arange(rows.shape[1], device=rows.device, dtype=rows.dtype)
        vector = torch.cos(entries + 1.0)
        smallest = torch.finfo(rows.dtype).tiny
        for _ in range(iterations):
            vector = rows.T @ (rows @ vector)
            vector = vector / torch.linalg.vector_norm(vector).clamp_min(smallest)
        return (rows @ vector).square().sum() / rows.shape[0]


def _sum(parts: Sequence[Tensor]) -> Tensor:
    if not parts:
        return torch.zeros(())
    device = parts[0].device
    return torch.stack([part.to(device) for part in parts]).sum()


def _dot(first: Tensor, second: Tensor) -> Tensor:
    """In chunks, so that float32 does not lose digits with the length."""
    one, two = _flat(first), _flat(second)
    if one.numel() <= CHUNK:
        return torch.dot(one, two)
    pairs = zip(torch.split(one, CHUNK), torch.split(two, CHUNK), strict=True)
    return torch.stack([torch.dot(*pair) for pair in pairs]).sum()


def _flat(tensor: Tensor) -> Tensor:
    """One-dimensional and real, in float32 or float64."""
    dense = tensor.detach() if tensor.layout == torch.strided else tensor.detach().to_dense()
    if dense.is_complex():
        dense = torch.view_as_real(dense)
    flat = dense.reshape(-1)
    return flat if flat.dtype in {torch.float32, torch.float64} else flat.float()

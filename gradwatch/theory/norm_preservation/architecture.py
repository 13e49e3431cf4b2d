"""Factors that dropout, residual branches and zero padding put on the squared norm."""

import math

import numpy as np

from gradwatch.theory.argument import fault_in, not_negative, whole
from gradwatch.theory.norm_preservation.argument import dropout_rate
from gradwatch.theory.norm_preservation.vector import Vector


def dropout_factor(p: float) -> float:
    """Expected factor 1/(1-p) of the squared norm under inverted dropout.

    Multiplying sigma^2 of the layer by 1-p undoes it.

    Args:
        p: Probability that a unit is dropped, in [0, 1).

    Returns:
        The factor; its variance is in `layer_moments`.

    Raises:
        ValueError: If p is outside [0, 1).

    References:
        Derived here.
    """
    if fault := dropout_rate(p=p):
        raise ValueError(fault)
    return 1.0 / (1.0 - p)


def largest_dropout(depth: int, growth: float = 2.0) -> float:
    """Largest dropout that keeps prod 1/(1-p) below G: p <= 1 - G^(-1/L).

    Args:
        depth: L, layers with dropout and no normalisation.
        growth: G, allowed factor of the squared norm, above 1.

    Returns:
        p.

    Raises:
        ValueError: If depth is not a count or growth is not above 1.

    References:
        Derived here.

    Example:
        >>> round(largest_dropout(12), 4)
        0.0561
    """
    above_one = fault_in({"growth": growth}, lambda v: 1 < v < math.inf, "lie in (1, inf)")
    if fault := whole(depth=depth) or above_one:
        raise ValueError(fault)
    return -math.expm1(-math.log(growth) / depth)


def residual_factor(alpha: float, branch_ratio: float = 1.0, depth: int = 1) -> float:
    """Expected factor (1 + alpha^2 f)^L of the squared norm over L blocks h <- h + alpha F(h).

    Args:
        alpha: Scale of the branch.
        branch_ratio: f = E ||F(h)||^2 / ||h||^2, 1 if the branch preserves the norm.
        depth: L, residual blocks; 1 for the factor per block.

    Returns:
        The factor, if the last layer of F has a sign-symmetric law.

    Raises:
        ValueError: If alpha is not finite, branch_ratio is negative or not finite, or depth is no
            count.

    References:
        Derived here.

    Example:
        >>> residual_factor(1.0, depth=10)
        1024.0
    """
    finite = fault_in({"alpha": alpha}, math.isfinite, "be finite")
    if fault := finite or not_negative(branch_ratio=branch_ratio) or whole(depth=depth):
        raise ValueError(fault)
    return (1.0 + alpha**2 * branch_ratio) ** depth


def padding_profile(
    profile: Vector, kernel: int, padding: int, stride: int = 1, dilation: int = 1
) -> Vector:
    """Mean square along one dimension after a zero-padded convolution that preserves the rest.

    Each output is the mean of the kernel's taps, those outside the map counting 0. Zeros weaken the
    edges, and weak edges lose less: repeat this once per layer for the factor of a stack. The
    L-th power of `padding_factor` is too small (0.175 instead of 0.353 for ten 3x3 layers at 8x8).

    Args:
        profile: (size,), mean square at each position.
        kernel: Taps of the kernel.
        padding: Zeros on either side.
        stride: Step between outputs.
        dilation: Step between taps.

    Returns:
        (outputs,), mean square at each output position; the dimensions of a map multiply.

    Raises:
        ValueError: If profile is not a vector, kernel, stride or dilation is not a count, padding
            is not a whole number of at least 0, or the kernel does not fit.

    References:
        Derived here.

    Example:
        >>> padding_profile(np.array([3.0, 3.0, 3.0]), 3, 1).tolist()
        [2.0, 3.0, 2.0]
    """
    counts = whole(kernel=kernel, stride=stride, dilation=dilation) or whole(0, padding=padding)
    shape = "" if profile.ndim == 1 else f"profile must have shape (size,), got {profile.shape}"
    if fault := counts or shape:
        raise ValueError(fault)
    last_start = len(profile) + padding - dilation * (kernel - 1) - 1
    starts = np.arange(-padding, last_start + 1, stride)
    if not (len(profile) and len(starts)):
        raise ValueError(
            f"kernel must fit into the padded map, got kernel {kernel}, dilation {dilation}, "
            f"size {len(profile)}, padding {padding}"
        )
    taps = starts[:, None] + dilation * np.arange(kernel)
    inside = (taps >= 0) & (taps < len(profile))
    values = np.where(inside, profile[np.where(inside, taps, 0)], 0.0)
    return np.asarray(values.mean(axis=1))


def padding_factor(
    size: int, kernel: int, padding: int, stride: int = 1, dilation: int = 1
) -> float:
    """Share of kernel taps inside the map, the factor of q by zero padding in one dimension.

    (3H-2)/(3H) for kernel 3, padding 1, stride 1; multiply over the dimensions of the map. It holds
    for one layer on a uniform map; see `padding_profile` for a stack.

    Args:
        size: H, positions of the map in this dimension.
        kernel: Taps of the kernel.
        padding: Zeros on either side.
        stride: Step between outputs.
        dilation: Step between taps.

    Returns:
        The mean share, in [0, 1].

    Raises:
        ValueError: If size, kernel, stride or dilation is not a count, padding is not a whole
            number of at least 0, or the kernel does not fit.

    References:
        Derived here.

    Example:
        >>> padding_factor(8, 3, 1) == 22 / 24
        True
    """
    if fault := whole(size=size):
        raise ValueError(fault)
    return float(padding_profile(np.ones(size), kernel, padding, stride, dilation).mean())

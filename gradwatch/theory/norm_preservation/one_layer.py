"""One ReLU layer: the exact law of its factor on the squared norm, and explicit tail bounds."""

import math
from typing import NamedTuple

from gradwatch.theory.argument import fault_in, inside_unit, positive, whole
from gradwatch.theory.norm_preservation.argument import dropout_rate


class Moments(NamedTuple):
    """Mean and variance of a random factor or of its logarithm."""

    mean: float
    variance: float


def relu_square_mgf(t: float) -> float:
    """Moment generating function of one ReLU unit, E exp(t ReLU(z)^2) = 1/2 + 1/2 (1-2t)^(-1/2).

    The factor of a whole fan-out He layer is rho = (2/m) chi2_K with K ~ Binomial(m, 1/2), for
    every input, and E exp(t rho) is the m-th power of this function at 2 t / m.

    Args:
        t: Argument, below 1/2.

    Returns:
        The expectation.

    Raises:
        ValueError: If t is not below 1/2.

    References:
        Derived here.

    Example:
        >>> relu_square_mgf(0.375)
        1.5
    """
    if fault := fault_in({"t": t}, lambda v: v < 0.5, "be below 1/2 for the expectation to exist"):
        raise ValueError(fault)
    return 0.5 + 0.5 / math.sqrt(1.0 - 2.0 * t)


def layer_moments(width: int, dropout: float = 0.0) -> Moments:
    """Mean and variance of rho for one fan-out He ReLU layer with inverted dropout p.

    E rho = 1/(1-p) and m Var(rho) = 6/(1-p)^3 - 1/(1-p)^2, so 1 and 5/m without dropout.

    Args:
        width: m, units of the layer.
        dropout: p, probability that a unit is dropped.

    Returns:
        The two moments; exact, and the same for every input.

    Raises:
        ValueError: If width is not a count or dropout is outside [0, 1).

    References:
        Derived here.

    Example:
        >>> layer_moments(100), layer_moments(100, 0.5)
        (Moments(mean=1.0, variance=0.05), Moments(mean=2.0, variance=0.44))
    """
    if fault := whole(width=width) or dropout_rate(dropout=dropout):
        raise ValueError(fault)
    keep = 1.0 - dropout
    return Moments(1.0 / keep, (6.0 / keep**3 - 1.0 / keep**2) / width)


def tail_exponent(deviation: float) -> float:
    """`tail_rate` without the check of its argument."""
    if abs(deviation) < 1e-4:
        # Both terms of the closed form agree to most of their digits here.
        return deviation**2 * (3 / 32 - 5 * deviation / 96 + 35 * deviation**2 / 1024)
    root = math.sqrt(1.0 + deviation)
    return deviation / 4.0 - math.log1p(0.5 * deviation / (1.0 + root))


def tail_rate(deviation: float) -> float:
    """Exponent c of the closed tail bound of one ReLU layer, c_up(eps), and c_low(eps) at -eps.

    c_up(eps) = eps/4 + log(2 / (1 + sqrt(1+eps))), c_low(eps) = c_up(-eps) >= c_up(eps), near 0
    c = 3 eps^2/32: about 6 % below the best exponent, `chernoff_rate`.

    Args:
        deviation: eps for P(rho > 1 + eps), -eps for P(rho < 1 - eps); above -1.

    Returns:
        c, so that the probability is at most exp(-m c).

    Raises:
        ValueError: If deviation is not finite or not above -1.

    References:
        Chernoff's bound at t = eps / (2 (1+eps)); derived here.

    Example:
        >>> round(tail_rate(0.5), 6), round(tail_rate(-0.5), 6)
        (0.018505, 0.033347)
    """
    if fault := fault_in({"deviation": deviation}, lambda v: -1 < v < math.inf, "lie in (-1, inf)"):
        raise ValueError(fault)
    return tail_exponent(deviation)


def chernoff_rate(ratio: float) -> float:
    """Best Chernoff exponent of one ReLU layer, sup_t t a/2 - log E exp(t ReLU(z)^2).

    The supremum is at u = (1-2t)^(-1/2) with 2 u^3 = a (u + 1). Near a = 1 it is (a-1)^2 / 10.

    Args:
        ratio: a, the level that rho exceeds (a > 1) or falls below (a < 1).

    Returns:
        The exponent per unit of width; absolute error about 1e-16.

    Raises:
        ValueError: If ratio is not positive and finite.

    References:
        Cramer-Chernoff; derived here.

    Example:
        >>> round(chernoff_rate(1.5), 6)
        0.019506
    """
    if fault := positive(ratio=ratio):
        raise ValueError(fault)
    root = max(1.0, ratio)
    while (step := (2 * root**3 - ratio * (root + 1)) / (6 * root**2 - ratio)) > 1e-15 * root:
        root -= step  # convex and started above the root, so Newton's steps never overshoot
    return max(0.0, ratio * (1.0 - root**-2) / 4.0 - math.log1p((root - 1.0) / 2.0))


def tail_bound(width: int, deviation: float, samples: int = 1) -> float:
    """One-sided bound N exp(-m c) on P(some rho lies beyond 1 + deviation) after one layer.

    Args:
        width: m.
        deviation: eps for the upper tail, -eps for the lower; above -1.
        samples: N, fixed examples the statement is uniform over.

    Returns:
        A probability, at most 1.

    Raises:
        ValueError: If width or samples is not a count, or deviation is not above -1.

    References:
        Derived here; see `tail_rate`.

    Example:
        >>> round(tail_bound(100, 0.5), 4), round(tail_bound(100, -0.5), 4)
        (0.1572, 0.0356)
    """
    if fault := whole(width=width, samples=samples):
        raise ValueError(fault)
    return min(1.0, samples * math.exp(-width * tail_rate(deviation)))


def union_bound(width: int, epsilon: float, samples: int = 1) -> float:
    """Two-sided bound 2 N exp(-m c_up(eps)) on P(some |rho - 1| > eps) after one layer.

    Args:
        width: m.
        epsilon: eps, tolerance on the squared norm, in (0, 1).
        samples: N, fixed examples.

    Returns:
        A probability, at most 1.

    Raises:
        ValueError: If width or samples is not a count, or epsilon is outside (0, 1).

    References:
        Union bound over both tails, as c_low >= c_up; derived here.
    """
    if fault := whole(width=width, samples=samples) or inside_unit(epsilon=epsilon):
        raise ValueError(fault)
    return min(1.0, 2.0 * samples * math.exp(-width * tail_exponent(epsilon)))

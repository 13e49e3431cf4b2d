"""Many layers: the log-normal law of the whole factor, and the width that keeps it in bounds."""

import math
from collections.abc import Sequence
from typing import Final

from gradwatch.theory.argument import not_negative, positive, whole
from gradwatch.theory.norm_preservation.argument import widths_with_kappas
from gradwatch.theory.norm_preservation.one_layer import Moments

NARROWEST: Final = 16
"""Fewest units of a layer whose log gain is close to normal."""


def norm_variance(widths: Sequence[int], kappas: Sequence[float]) -> float:
    """Variance of the log squared norm, V = sum_l kappa_l / m_l.

    Args:
        widths: m_1..m_L.
        kappas: kappa of the activation of each layer (5 for ReLU), see `ActivationLaw`.

    Returns:
        V; a norm (not squared) has log standard deviation sqrt(V) / 2 between initialisations.

    Raises:
        ValueError: If the lengths differ or are 0, a width is not a count, or a kappa is negative.

    References:
        Derived here; the sum of 1/m_l is that of Hanin & Rolnick 2018, arXiv:1803.01719.

    Example:
        >>> norm_variance([64, 512, 128, 1024], [5.0] * 4)
        0.1318359375
    """
    if fault := widths_with_kappas(widths, kappas):
        raise ValueError(fault)
    return sum(kappa / width for width, kappa in zip(widths, kappas, strict=True))


def ratio_variance(widths: Sequence[int], kappas: Sequence[float]) -> float:
    """Exact variance of the squared norm ratio, Var R_L = prod(1 + kappa_l/m_l) - 1.

    Args:
        widths: m_1..m_L.
        kappas: kappa of each layer; exact if the activations are homogeneous.

    Returns:
        The variance; the mean of R_L is 1.

    Raises:
        ValueError: If the lengths differ or are 0, a width is not a count, or a kappa is negative.

    References:
        Derived here.

    Example:
        >>> round(ratio_variance([100, 100], [5.0, 5.0]), 4)
        0.1025
    """
    if fault := widths_with_kappas(widths, kappas):
        raise ValueError(fault)
    logs = (math.log1p(kappa / width) for width, kappa in zip(widths, kappas, strict=True))
    return math.expm1(sum(logs))


def log_ratio_moments(variance: float) -> Moments:
    """Normal law of log R_L: mean -V/2, variance V.

    Deep narrow networks typically shrink, although the mean of R_L is 1: the median of the norm
    ratio is exp(-V/4). Test logarithms, not means.

    Args:
        variance: V of `norm_variance`.

    Returns:
        Mean and variance of the logarithm of the squared norm ratio.

    Raises:
        ValueError: If variance is negative or not finite.

    References:
        Derived here; asymptotic in the widths.
    """
    if fault := not_negative(variance=variance):
        raise ValueError(fault)
    return Moments(-variance / 2.0, variance)


def z_score(log_factor: float, variance: float) -> float:
    """Deviation of a measured squared norm ratio from its law, z = (log R + V/2) / sqrt(V).

    Args:
        log_factor: log R, natural logarithm of the squared norm ratio over the expected factor.
        variance: V of `norm_variance`, positive.

    Returns:
        z, close to standard normal; P(|z| > 4) is about 2e-4 at six layers of 64 units.

    Raises:
        ValueError: If variance is not positive and finite.

    References:
        Derived here.

    Example:
        >>> round(z_score(math.log(0.25), 0.5), 4)
        -1.607
    """
    if fault := positive(variance=variance):
        raise ValueError(fault)
    return (log_factor + variance / 2.0) / math.sqrt(variance)


def width_for_stability(depth: int, tau: float, kappa: float = 5.0) -> int:
    """Width at which V = kappa L / m is tau^2: m >= kappa L / tau^2.

    Args:
        depth: L.
        tau: Standard deviation allowed to the log squared norm; norms then vary by e^(tau/2).
        kappa: kappa of the activation, 5 for ReLU.

    Returns:
        Units per layer.

    Raises:
        ValueError: If depth is not a count, or tau or kappa is not positive.

    References:
        Derived here.

    Example:
        >>> width_for_stability(10, 0.5)
        200
    """
    if fault := whole(depth=depth) or positive(tau=tau, kappa=kappa):
        raise ValueError(fault)
    # A rounding error in the last digit must not cost a unit.
    return math.ceil(kappa * depth / tau**2 * (1.0 - 1e-12))

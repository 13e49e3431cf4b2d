"""Noise around a minimum, and where the learning-rate/batch ratio alone stops deciding it."""

import math

import numpy as np
from numpy.typing import ArrayLike

from gradwatch.errors import ConfigError
from gradwatch.theory.argument import (
    above_one,
    at_least_one,
    fault_in,
    inside_unit,
    momentum_rate,
    not_negative,
    positive,
    require,
    values_of,
)


def stationary_variance(
    learning_rate: float,
    curvature: float,
    variance: float,
    batch_size: float,
    momentum: float = 0.0,
) -> float:
    """Variance of a parameter around its minimum, exact for the steps of SGD with heavy ball.

    (eta c / (S lambda)) (1 + beta) / ((1 - beta) (2 (1 + beta) - eta lambda)), for PyTorch's
    form v = beta v + g.

    Args:
        learning_rate: eta, above 0 [P²/L].
        curvature: lambda, of this direction, above 0 [L/P²].
        variance: c, of one sample's gradient in this direction [(L/P)²].
        batch_size: S, at least 1.
        momentum: beta, in [0, 1).

    Returns:
        The variance [P²]; inf for eta lambda >= 2 (1 + beta), where the steps diverge.

    Raises:
        ConfigError: If an argument is outside its range.

    References:
        Derived here.

    Example:
        >>> stationary_variance(1, 1, 1, 8)
        0.125
    """
    limit = stationary_variance_limit(learning_rate, curvature, variance, batch_size, momentum)
    edge = 2.0 * (1.0 + momentum)
    left = edge - learning_rate * curvature
    return limit * edge / left if left > 0.0 else math.inf


def stationary_variance_limit(
    learning_rate: float,
    curvature: float,
    variance: float,
    batch_size: float,
    momentum: float = 0.0,
) -> float:
    """The same for eta lambda -> 0, as the Langevin equation has it: eta c / (2 S lambda (1-beta)).

    Args:
        learning_rate: eta, above 0 [P²/L].
        curvature: lambda, above 0 [L/P²].
        variance: c, of one sample's gradient [(L/P)²].
        batch_size: S, at least 1.
        momentum: beta, in [0, 1).

    Returns:
        The variance [P²].

    Raises:
        ConfigError: If an argument is outside its range.

    References:
        Derived here.

    Example:
        >>> stationary_variance_limit(1, 1, 1, 8)
        0.0625
    """
    require(
        positive(learning_rate=learning_rate, curvature=curvature),
        not_negative(variance=variance),
        at_least_one(batch_size=batch_size),
        momentum_rate(momentum=momentum),
    )
    return learning_rate * variance / (2.0 * batch_size * curvature * (1.0 - momentum))


def stationary_excess_loss(
    learning_rate: float, eigenvalues: ArrayLike, batch_size: float
) -> float:
    """Mean loss above the minimum if the gradient covariance is the Hessian, plain SGD.

    sum_i eta lambda_i / (2 S (2 - eta lambda_i)), about eta tr(H) / (4 S) for small eta.

    Args:
        learning_rate: eta, above 0 [P²/L].
        eigenvalues: (d,), lambda_i of the Hessian at the minimum, at least 0 [L/P²].
        batch_size: S, at least 1.

    Returns:
        The excess, in the unit where covariance and Hessian are equal [L]; inf for
        eta lambda_i >= 2.

    Raises:
        ConfigError: If an argument is outside its range.

    References:
        Derived here.

    Example:
        >>> stationary_excess_loss(0.5, [1.0, 2.0], 8)
        0.08333333333333333
    """
    require(positive(learning_rate=learning_rate), at_least_one(batch_size=batch_size))
    products = learning_rate * values_of("eigenvalues", eigenvalues)
    if (products < 0.0).any():
        raise ConfigError("eigenvalues must not be negative, as at a minimum")
    if (products >= 2.0).any():
        return math.inf
    return float(np.sum(products / (2.0 - products))) / (2.0 * batch_size)


def ratio_law_limit(momentum: float = 0.0, tolerance: float = 0.1) -> float:
    """Largest eta lambda_max at which only the ratio eta/S matters: 2 (1 + beta) tau / (1 + tau).

    Up to it the stationary variance is within tau of its limit. On digits the loss curves agreed
    well beyond the limit for 10 %, so it is conservative.

    Args:
        momentum: beta, in [0, 1).
        tolerance: tau, relative excess that is allowed, above 0.

    Returns:
        The limit, a pure number.

    Raises:
        ConfigError: If an argument is outside its range.

    References:
        Derived here.

    Example:
        >>> round(ratio_law_limit(), 4)
        0.1818
    """
    require(momentum_rate(momentum=momentum), positive(tolerance=tolerance))
    return 2.0 * (1.0 + momentum) * tolerance / (1.0 + tolerance)


def learning_rate_limit(tolerance: float, curvature: float, momentum: float = 0.0) -> float:
    """Largest learning rate at which only the ratio matters: `ratio_law_limit` / lambda_max.

    Args:
        tolerance: tau, above 0.
        curvature: lambda_max of the Hessian, above 0 [L/P²].
        momentum: beta, in [0, 1).

    Returns:
        eta [P²/L].

    Raises:
        ConfigError: If an argument is outside its range.

    References:
        Derived here.

    Example:
        >>> round(learning_rate_limit(0.1, 10), 6)
        0.018182
    """
    require(positive(curvature=curvature))
    return ratio_law_limit(momentum, tolerance) / curvature


def without_replacement_factor(train_size: float, batch_size: float) -> float:
    """Factor of the variance of a batch gradient that is drawn without replacement: (N-S)/(N-1).

    Args:
        train_size: N, above 1.
        batch_size: S, from 1 to N.

    Returns:
        The factor, in [0, 1].

    Raises:
        ConfigError: If an argument is outside its range.

    References:
        Sampling theory; its use here derived.

    Example:
        >>> without_replacement_factor(101, 51)
        0.5
    """
    require(
        above_one(train_size=train_size),
        at_least_one(batch_size=batch_size),
        fault_in({"batch_size": batch_size}, lambda v: v <= train_size, f"be at most {train_size}"),
    )
    return (train_size - batch_size) / (train_size - 1.0)


def finite_data_factor(train_size: float, batch_size: float, scale: float) -> float:
    """Factor of the noise when eta and S both grow k-fold on finite data: (N - k S) / (N - S).

    Args:
        train_size: N, samples.
        batch_size: S, from 1, below N.
        scale: k, above 0.

    Returns:
        The factor, 0 if the larger batch is all the data or more.

    Raises:
        ConfigError: If an argument is outside its range.

    References:
        Derived here.

    Example:
        >>> finite_data_factor(1280, 8, 16)
        0.9056603773584906
    """
    require(
        at_least_one(batch_size=batch_size, train_size=train_size),
        fault_in({"batch_size": batch_size}, lambda v: v < train_size, f"be below {train_size}"),
        positive(scale=scale),
    )
    return max(0.0, train_size - scale * batch_size) / (train_size - batch_size)


def finite_data_holds(
    train_size: float, batch_size: float, scale: float, tolerance: float = 0.1
) -> bool:
    """Whether the data are enough for a k-fold scaling of eta and S: the factor is >= 1 - tau.

    Args:
        train_size: N, samples.
        batch_size: S, from 1, below N.
        scale: k, above 0.
        tolerance: tau, in (0, 1).

    Returns:
        True if `finite_data_factor` is within tau of 1.

    Raises:
        ConfigError: If an argument is outside its range.

    References:
        Derived here.

    Example:
        >>> finite_data_holds(1280, 8, 16), finite_data_holds(1280, 8, 32)
        (True, False)
    """
    require(inside_unit(tolerance=tolerance))
    return finite_data_factor(train_size, batch_size, scale) >= 1.0 - tolerance

"""The bound on the gradients of randomly stopped SGD, and its two parts."""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from gradwatch.errors import ConfigError
from gradwatch.theory.argument import (
    Vector,
    at_least_one,
    not_negative,
    positive,
    require,
    values_of,
    whole,
)


class Split(NamedTuple):
    """A bound on the mean square of the true gradient, by what it is due to.

    Attributes:
        step_term: the part that shrinks with the number of steps [(L/P)²].
        noise_term: the part set by learning rate and batch size, which never shrinks [(L/P)²].
    """

    step_term: float
    noise_term: float

    @property
    def bound(self) -> float:
        """The sum of both [(L/P)²]; inf beyond the learning rate 2/L."""
        return self.step_term + self.noise_term

    @property
    def noise_share(self) -> float:
        """Share of the noise in the bound; nan if the bound is 0 or both parts are infinite."""
        if self.bound == 0 or math.isinf(self.noise_term):
            return math.nan
        return self.noise_term / self.bound


BEYOND = Split(math.inf, math.inf)


def stationarity_bound(
    loss_gap: float,
    smoothness: float,
    variance: float,
    batch_size: float,
    learning_rate: float,
    steps: float,
) -> Split:
    """Bound on the mean of ||grad f||² over a run of constant learning rate g.

    step_term = 2 D / (N g (2 - L g)), noise_term = L g s² / (2 - L g), with s² = sigma²/B. It
    holds in expectation for an L-smooth objective, unbiased gradients and g < 2/L.

    Args:
        loss_gap: D, loss at the start above the lowest loss [L].
        smoothness: L, an upper bound on the curvature along the run [L/P²].
        variance: sigma², trace of the covariance of the gradient of one sample [(L/P)²].
        batch_size: B, samples per step, at least 1; need not be whole.
        learning_rate: g of plain SGD [P²/L].
        steps: N, at least 1; need not be whole.

    Returns:
        Both parts, [(L/P)²]; infinite for g >= 2/L, where there is no bound.

    Raises:
        ConfigError: If an argument is outside its range.

    References:
        Derived here from the descent lemma; same as Ghadimi & Lan 2013, theorem 2.1.

    Example:
        >>> split = stationarity_bound(2.3026, 16, 52, 128, 0.1, 10_000)
        >>> round(split.bound, 4), round(split.noise_share, 3)
        (1.6365, 0.993)
    """
    require(
        not_negative(loss_gap=loss_gap),
        positive(learning_rate=learning_rate),
        at_least_one(steps=steps),
    )
    floor = noise_floor(smoothness, variance, batch_size, learning_rate)
    if math.isinf(floor):
        return BEYOND
    slack = 2.0 - smoothness * learning_rate
    return Split(2.0 * loss_gap / (steps * learning_rate * slack), floor)


def noise_floor(
    smoothness: float, variance: float, batch_size: float, learning_rate: float
) -> float:
    """Mean square of the true gradient that more steps cannot get below: L g s² / (2 - L g).

    In one dimension with curvature L the floor is attained exactly.

    Args:
        smoothness: L, curvature [L/P²].
        variance: sigma², per sample [(L/P)²].
        batch_size: B, at least 1.
        learning_rate: g [P²/L].

    Returns:
        The floor [(L/P)²]; inf for g >= 2/L.

    Raises:
        ConfigError: If an argument is outside its range.

    References:
        Derived here.

    Example:
        >>> noise_floor(2, 0.5, 1, 0.25)
        0.16666666666666666
    """
    require(
        not_negative(smoothness=smoothness, variance=variance, learning_rate=learning_rate),
        at_least_one(batch_size=batch_size),
    )
    product = smoothness * learning_rate
    return product * variance / batch_size / (2.0 - product) if product < 2.0 else math.inf


def stationarity_bound_decay(
    loss_gap: float,
    smoothness: float,
    variance: float,
    batch_size: float,
    learning_rate: float,
    steps: int,
    rho: float,
) -> Split:
    """The bound for learning rates g_k = g k^-rho, of the mean weighted by `stopping_weights`.

    (2 D + L s² g² H_N(2 rho)) / (2 g H_N(rho) - L g² H_N(2 rho)), H_N(r) = sum of k^-r, k = 1..N.

    Args:
        loss_gap: D [L].
        smoothness: L [L/P²].
        variance: sigma², per sample [(L/P)²].
        batch_size: B, at least 1.
        learning_rate: g, of the first step [P²/L].
        steps: N, a count.
        rho: exponent of the decay, at least 0.

    Returns:
        Both parts [(L/P)²]; infinite for g >= 2/L.

    Raises:
        ConfigError: If an argument is outside its range.

    References:
        Derived here.

    Example:
        >>> round(stationarity_bound_decay(2.3026, 10, 50, 128, 0.1, 10_000, 0.5).bound, 6)
        0.128776
    """
    require(
        not_negative(smoothness=smoothness, variance=variance, rho=rho),
        positive(learning_rate=learning_rate),
        at_least_one(batch_size=batch_size),
        whole(steps=steps),
    )
    rates = learning_rate * np.arange(1.0, steps + 1.0) ** -rho
    return path_bound(
        loss_gap,
        np.full(len(rates), float(smoothness)),
        np.full(len(rates), variance / batch_size),
        rates,
    )


def path_bound(
    loss_gap: float, smoothness: ArrayLike, step_variances: ArrayLike, learning_rates: ArrayLike
) -> Split:
    """The bound along a run whose constants were measured step by step.

    (2 D + sum_k L_k g_k² s_k²) / sum_k (2 g_k - L_k g_k²), for the mean of ||grad f||² weighted by
    `stopping_weights`. D may be the loss at the start minus the loss now.

    Args:
        loss_gap: D [L].
        smoothness: (N,), L_k, upper bound on the curvature near step k [L/P²].
        step_variances: (N,), s_k² = sigma_k²/B_k, variance of the gradient of a step [(L/P)²].
        learning_rates: (N,), g_k [P²/L].

    Returns:
        Both parts [(L/P)²]; infinite if any g_k >= 2/L_k, or if all learning rates are 0.

    Raises:
        ConfigError: If an array is empty, holds a negative or non-finite number, or the lengths
            differ.

    References:
        Derived here.

    Example:
        >>> round(path_bound(1, [2, 4, 3], [0.5, 0.4, 0.3], [0.1, 0.1, 0.05]).bound, 6)
        4.689595
    """
    require(not_negative(loss_gap=loss_gap))
    variances = _not_negative_array("step_variances", step_variances)
    rates = _not_negative_array("learning_rates", learning_rates)
    curvatures = _not_negative_array("smoothness", smoothness)
    if not len(variances) == len(rates) == len(curvatures):
        raise ConfigError(
            "smoothness, step_variances and learning_rates must be equally long, got "
            f"{len(curvatures)}, {len(variances)} and {len(rates)}"
        )
    weights = stopping_weights(rates, curvatures)
    total = float(weights.sum())
    if bool(np.any(curvatures * rates >= 2.0)) or total <= 0.0:
        return BEYOND
    noise = float(np.sum(curvatures * rates**2 * variances))
    return Split(2.0 * loss_gap / total, noise / total)


def stopping_weights(learning_rates: ArrayLike, smoothness: ArrayLike) -> Vector:
    """Weights 2 g_k - L_k g_k² of the steps in the mean that is bounded.

    Divided by their sum they are the probabilities of stopping at each step. A weight is negative
    beyond g = 2/L, where the mean means nothing.

    Args:
        learning_rates: (N,), g_k [P²/L].
        smoothness: L, one number or (N,) [L/P²].

    Returns:
        (N,), the weights, not normalised [P²/L].

    Raises:
        ConfigError: If an array is empty, holds a negative or non-finite number, or the lengths
            differ.

    References:
        Derived here.

    Example:
        >>> weights = stopping_weights([0.1, 0.1, 0.05, 0.05], 4)
        >>> (weights / weights.sum()).round(6).tolist()
        [0.32, 0.32, 0.18, 0.18]
    """
    rates = _not_negative_array("learning_rates", learning_rates)
    curvatures = _not_negative_array("smoothness", np.atleast_1d(smoothness))
    if len(curvatures) not in {1, len(rates)}:
        raise ConfigError(
            f"smoothness must be one number or one a step, got {len(curvatures)} for "
            f"{len(rates)} learning rates"
        )
    return np.asarray(2.0 * rates - curvatures * rates**2)


def _not_negative_array(name: str, values: ArrayLike) -> Vector:
    array = values_of(name, values)
    if (array < 0.0).any():
        raise ConfigError(f"{name} must not be negative, got {array.min()}")
    return array

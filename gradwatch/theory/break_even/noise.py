"""Where the noise of mini-batches makes SGD unstable, and the curvature at which that happens.

The statements are about one direction along which the loss of each example is a parabola, all with
the same minimum. Without the common minimum the noise adds a variance around the minimum instead
(`gradwatch.theory.lr_batch_ratio`), and these limits are no limits.

Symbols: eta learning rate, beta momentum coefficient of heavy ball, lambda mean curvature of the
examples along the direction, s² its variance over them, kappa = (N - S)/(S (N - 1)).
"""

import math
from typing import NamedTuple

from gradwatch.theory.argument import (
    at_least_one,
    fault_in,
    finite,
    momentum_rate,
    not_negative,
    positive,
    require,
)


class StabilityShares(NamedTuple):
    """A learning rate over its limit of stability, in two parts.

    Attributes:
        curvature: eta lambda/(2 (1 + beta)), of the mean curvature.
        noise: eta kappa s²/(2 (1 - beta) lambda), of its scatter over batches.
    """

    curvature: float
    noise: float

    @property
    def ratio(self) -> float:
        """eta/eta_max, stable in mean square up to 1."""
        return self.curvature + self.noise


def noise_factor(batch_size: float, train_size: float = math.inf) -> float:
    """Variance of the mean of a batch over that of one example: kappa = (N - S)/(S (N - 1)).

    Args:
        batch_size: S, drawn without replacement, from 1 to N.
        train_size: N; inf, the default, for kappa = 1/S.

    Returns:
        kappa, in [0, 1]; 0 if the batch is all the data.

    Raises:
        ConfigError: If an argument is outside its range.

    References:
        Sampling theory; in Jastrzebski et al. 2020, arXiv:2002.09572.

    Example:
        >>> noise_factor(8), noise_factor(50, 50)
        (0.125, 0.0)
    """
    require(
        at_least_one(batch_size=batch_size),
        fault_in({"train_size": train_size}, lambda v: v >= batch_size, f"be >= {batch_size}"),
    )
    if math.isinf(train_size):
        return 1.0 / batch_size
    return (train_size - batch_size) / (batch_size * (train_size - 1.0)) if train_size > 1 else 0.0


def second_moment_factor(
    learning_rate: float,
    curvature: float,
    curvature_variance: float,
    batch_size: float,
    train_size: float = math.inf,
) -> float:
    """Factor of the mean square distance by a step: (1 - eta lambda)² + eta² s² kappa.

    It is E[(1 - eta h)²] over batches of mean curvature h. Plain SGD is stable in mean square if
    and only if it is at most 1.

    Args:
        learning_rate: eta of plain SGD [P²/L].
        curvature: lambda [L/P²].
        curvature_variance: s² [L²/P⁴].
        batch_size: S, from 1 to N.
        train_size: N; inf if it is very large.

    Returns:
        The factor, a pure number.

    Raises:
        ConfigError: If an argument is outside its range.

    References:
        Jastrzebski et al. 2020, arXiv:2002.09572, after Wu et al. 2018; exact form derived here.

    Example:
        >>> second_moment_factor(0.5, 1.0, 1.0, 1)
        0.5
    """
    require(
        not_negative(learning_rate=learning_rate, curvature_variance=curvature_variance),
        finite(curvature=curvature),
    )
    kept = 1.0 - learning_rate * curvature
    noise = learning_rate * learning_rate * curvature_variance
    return kept * kept + noise * noise_factor(batch_size, train_size)


def largest_learning_rate(
    curvature: float,
    curvature_variance: float,
    batch_size: float,
    train_size: float = math.inf,
    momentum: float = 0.0,
) -> float:
    """Stable learning rates end at 2 (1 + b) lambda/(lambda² + kappa s² (1 + b)/(1 - b)).

    b is the momentum. Exact: stable in mean square if and only if the learning rate is below.
    For PyTorch's form v = b v + g. With dampening d divide it by 1 - d; with the averaging momentum
    of an Adam of constant preconditioner P divide it by 1 - beta1 and take curvature and variance
    of P^-1/2 H P^-1/2.

    Args:
        curvature: lambda, above 0 [L/P²].
        curvature_variance: s² [L²/P⁴].
        batch_size: S, from 1 to N.
        train_size: N; inf if it is very large.
        momentum: b, in [0, 1).

    Returns:
        eta_max [P²/L]; 2 (1 + b)/lambda without noise.

    Raises:
        ConfigError: If an argument is outside its range.

    References:
        b = 0: Jastrzebski et al. 2020, arXiv:2002.09572; heavy ball derived here.

    Example:
        >>> largest_learning_rate(10, 0, 32), largest_learning_rate(10, 400, 1)
        (0.2, 0.04)
    """
    require(
        positive(curvature=curvature),
        not_negative(curvature_variance=curvature_variance),
        momentum_rate(momentum=momentum),
    )
    noise = noise_factor(batch_size, train_size) * curvature_variance / curvature
    return 2.0 * (1.0 + momentum) / (curvature + noise * (1.0 + momentum) / (1.0 - momentum))


def stability_shares(
    learning_rate: float,
    curvature: float,
    curvature_variance: float,
    batch_size: float,
    train_size: float = math.inf,
    momentum: float = 0.0,
) -> StabilityShares:
    """What mean curvature and noise contribute to eta/eta_max, with `largest_learning_rate`.

    Args:
        learning_rate: eta [P²/L].
        curvature: lambda, above 0 [L/P²].
        curvature_variance: s² [L²/P⁴].
        batch_size: S, from 1 to N.
        train_size: N; inf if it is very large.
        momentum: beta, in [0, 1).

    Returns:
        The two parts, pure numbers.

    Raises:
        ConfigError: If an argument is outside its range.

    References:
        As `largest_learning_rate`.

    Example:
        >>> stability_shares(0.02, 10.0, 400.0, 1).ratio
        0.5
    """
    require(
        not_negative(learning_rate=learning_rate, curvature_variance=curvature_variance),
        positive(curvature=curvature),
        momentum_rate(momentum=momentum),
    )
    noise = noise_factor(batch_size, train_size) * curvature_variance
    return StabilityShares(
        learning_rate * curvature / (2.0 * (1.0 + momentum)),
        learning_rate * noise / (2.0 * (1.0 - momentum) * curvature),
    )


def stable_curvatures(
    learning_rate: float,
    curvature_variance: float,
    batch_size: float,
    train_size: float = math.inf,
    momentum: float = 0.0,
) -> tuple[float, float] | None:
    """Curvatures at which a learning rate is stable: (1 + beta -+ root) / eta.

    root² = (1 + beta)² - eta² kappa s² (1 + beta)/(1 - beta).

    Args:
        learning_rate: eta, above 0 [P²/L].
        curvature_variance: s² [L²/P⁴].
        batch_size: S, from 1 to N.
        train_size: N; inf if it is very large.
        momentum: beta, in [0, 1).

    Returns:
        The lowest and the highest [L/P²]; None if the noise alone is too much.

    Raises:
        ConfigError: If an argument is outside its range.

    References:
        Derived here.

    Example:
        >>> stable_curvatures(0.1, 0, 32), stable_curvatures(0.1, 400, 1)
        ((0.0, 20.0), None)
    """
    require(
        positive(learning_rate=learning_rate),
        not_negative(curvature_variance=curvature_variance),
        momentum_rate(momentum=momentum),
    )
    middle = 1.0 + momentum
    noise = learning_rate * learning_rate * curvature_variance * middle / (1.0 - momentum)
    square = middle * middle - noise * noise_factor(batch_size, train_size)
    if square < 0.0:
        return None
    root = math.sqrt(square)
    return (middle - root) / learning_rate, (middle + root) / learning_rate


def smallest_batch_size(
    learning_rate: float,
    curvature: float,
    curvature_variance: float,
    train_size: float = math.inf,
    momentum: float = 0.0,
) -> float:
    """Smallest stable batch: N/(1 + k (N - 1)), k = (2 (1+b) lambda/eta - lambda²)(1-b)/((1+b) s²).

    Args:
        learning_rate: eta, above 0 [P²/L].
        curvature: lambda, above 0 [L/P²].
        curvature_variance: s² [L²/P⁴].
        train_size: N; inf for 1/k.
        momentum: b, in [0, 1).

    Returns:
        S, not rounded, at least 1; inf where the curvature alone is unstable, k < 0.

    Raises:
        ConfigError: If an argument is outside its range.

    References:
        Derived here.

    Example:
        >>> smallest_batch_size(0.1, 10.0, 400.0), smallest_batch_size(0.3, 10.0, 400.0)
        (4.0, inf)
    """
    require(
        positive(learning_rate=learning_rate, curvature=curvature),
        not_negative(curvature_variance=curvature_variance),
        fault_in({"train_size": train_size}, lambda v: v >= 1, "be at least 1"),
        momentum_rate(momentum=momentum),
    )
    room = curvature * (2.0 * (1.0 + momentum) / learning_rate - curvature)
    noise = curvature_variance * (1.0 + momentum) / (1.0 - momentum)
    if room < 0.0 or (room == 0.0 and math.isinf(train_size) and noise > 0.0):
        return math.inf
    if room >= noise:
        return 1.0
    factor = room / noise
    if math.isinf(train_size):
        return 1.0 / factor
    return max(1.0, train_size / (1.0 + factor * (train_size - 1.0)))


def break_even_curvature(
    learning_rate: float, ratio: float, batch_size: float, train_size: float = math.inf
) -> float:
    """Curvature at the break-even point: 2/eta - kappa alpha/psi².

    With lambda_K = alpha lambda and lambda_K = s² psi². Neither alpha nor psi, the distance to the
    minimum, can be observed: only the direction is of use, down with eta, up with S.

    Args:
        learning_rate: eta of plain SGD, above 0 [P²/L].
        ratio: alpha/psi² [L/P²].
        batch_size: S, from 1 to N.
        train_size: N; inf if it is very large.

    Returns:
        lambda at break-even [L/P²]; 0 where no positive curvature is stable.

    Raises:
        ConfigError: If an argument is outside its range.

    References:
        Derived here under the assumptions of Jastrzebski et al. 2020, arXiv:2002.09572.

    Example:
        >>> break_even_curvature(0.1, 80.0, 8)
        10.0
    """
    require(positive(learning_rate=learning_rate), not_negative(ratio=ratio))
    return max(0.0, 2.0 / learning_rate - noise_factor(batch_size, train_size) * ratio)

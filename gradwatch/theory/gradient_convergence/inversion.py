"""The bound of constant learning rate, solved for what a user can set."""

import math

from gradwatch.theory.argument import (
    above_one,
    at_least_one,
    inside_unit,
    not_negative,
    positive,
    require,
)


def best_learning_rate(
    loss_gap: float, smoothness: float, variance: float, batch_size: float, steps: float
) -> float:
    """The constant learning rate with the smallest bound after N steps.

    g* = 2 / (L + sqrt(L² + 4 c / a)), a = 2 D / N, c = L sigma² / B; the bound there is
    c g* / (1 - L g*). It is 1/L without noise.

    Args:
        loss_gap: D, above 0 [L].
        smoothness: L [L/P²].
        variance: sigma², per sample [(L/P)²].
        batch_size: B, at least 1.
        steps: N, at least 1.

    Returns:
        g*, in (0, 1/L] [P²/L].

    Raises:
        ConfigError: If an argument is outside its range.

    References:
        Derived here.

    Example:
        >>> round(best_learning_rate(2.3026, 10, 50, 128, 10_000), 8)
        0.01028438
    """
    require(
        positive(loss_gap=loss_gap, smoothness=smoothness),
        not_negative(variance=variance),
        at_least_one(batch_size=batch_size, steps=steps),
    )
    c = smoothness * variance / batch_size
    noise = 2.0 * math.sqrt(c * steps / (2.0 * loss_gap))
    return 2.0 / (smoothness + math.hypot(smoothness, noise))


def learning_rate_for_floor(
    smoothness: float, variance: float, batch_size: float, target: float
) -> float:
    """The learning rate whose noise floor is the target: g = 2 eps / (L (eps + s²)).

    Args:
        smoothness: L [L/P²].
        variance: sigma², per sample [(L/P)²].
        batch_size: B, at least 1.
        target: eps, wanted mean square of the true gradient, above 0 [(L/P)²].

    Returns:
        g, in (0, 2/L]; 2/L without noise, so cap it at 1/L [P²/L].

    Raises:
        ConfigError: If an argument is outside its range.

    References:
        Derived here.

    Example:
        >>> round(learning_rate_for_floor(10, 50, 128, 0.01), 8)
        0.0049922
    """
    require(
        positive(smoothness=smoothness, target=target),
        not_negative(variance=variance),
        at_least_one(batch_size=batch_size),
    )
    return 2.0 * target / (smoothness * (target + variance / batch_size))


def steps_for_target(
    loss_gap: float,
    smoothness: float,
    variance: float,
    batch_size: float,
    learning_rate: float,
    target: float,
) -> int | float:
    """Steps until the bound is the target: N = 2 D / (eps g (2 - L g) - L g² s²), rounded up.

    Args:
        loss_gap: D [L].
        smoothness: L [L/P²].
        variance: sigma², per sample [(L/P)²].
        batch_size: B, at least 1.
        learning_rate: g, above 0 [P²/L].
        target: eps, above 0 [(L/P)²].

    Returns:
        N, at least 1; inf if the noise floor is not below the target, or g >= 2/L.

    Raises:
        ConfigError: If an argument is outside its range.

    References:
        Derived here.

    Example:
        >>> steps_for_target(2.3026, 10, 50, 128, 0.01, 0.05)
        8233
    """
    require(not_negative(loss_gap=loss_gap), at_least_one(batch_size=batch_size))
    rate = step_progress(smoothness, variance, batch_size, learning_rate, target)
    return _count(2.0 * loss_gap, rate)


def step_progress(
    smoothness: float, variance: float, batch_size: float, learning_rate: float, target: float
) -> float:
    """Twice the loss gap that one step may count for: eps g (2 - L g) - L g² s².

    Args:
        smoothness: L [L/P²].
        variance: sigma², per sample [(L/P)²].
        batch_size: B, at least 1.
        learning_rate: g, above 0 [P²/L].
        target: eps, above 0 [(L/P)²].

    Returns:
        The progress [L]; not positive if no number of steps reaches the target.

    Raises:
        ConfigError: If an argument is outside its range.

    References:
        Derived here.
    """
    require(
        not_negative(smoothness=smoothness, variance=variance),
        positive(learning_rate=learning_rate, target=target),
        at_least_one(batch_size=batch_size),
    )
    product = smoothness * learning_rate
    noise = product * learning_rate * variance / batch_size
    return target * learning_rate * (2.0 - product) - noise


def batch_size_for_target(
    loss_gap: float,
    smoothness: float,
    variance: float,
    learning_rate: float,
    steps: float,
    target: float,
) -> int | float:
    """Batch size whose bound after N steps is the target.

    B = L g² sigma² / (eps g (2 - L g) - 2 D / N), rounded up.

    Args:
        loss_gap: D [L].
        smoothness: L [L/P²].
        variance: sigma², per sample [(L/P)²].
        learning_rate: g, above 0 [P²/L].
        steps: N, at least 1.
        target: eps, above 0 [(L/P)²].

    Returns:
        B, at least 1; inf if the steps are too few for any batch size.

    Raises:
        ConfigError: If an argument is outside its range.

    References:
        Derived here.

    Example:
        >>> batch_size_for_target(2.3026, 10, 50, 0.03, 10_000, 0.02)
        805
    """
    require(
        not_negative(loss_gap=loss_gap, smoothness=smoothness, variance=variance),
        positive(learning_rate=learning_rate, target=target),
        at_least_one(steps=steps),
    )
    product = smoothness * learning_rate
    left = target * learning_rate * (2.0 - product) - 2.0 * loss_gap / steps
    return _count(product * learning_rate * variance, left)


def batch_size_for_floor(
    smoothness: float, variance: float, learning_rate: float, target: float
) -> int | float:
    """Batch size whose noise floor is the target: B = L g sigma² / (eps (2 - L g)), rounded up.

    Args:
        smoothness: L [L/P²].
        variance: sigma², per sample [(L/P)²].
        learning_rate: g, above 0 [P²/L].
        target: eps, above 0 [(L/P)²].

    Returns:
        B, at least 1; inf for g >= 2/L.

    Raises:
        ConfigError: If an argument is outside its range.

    References:
        Derived here.

    Example:
        >>> batch_size_for_floor(0.688, 1.47, 0.3, 0.005)
        34
    """
    require(
        not_negative(smoothness=smoothness, variance=variance),
        positive(learning_rate=learning_rate, target=target),
    )
    product = smoothness * learning_rate
    return _count(product * variance, target * (2.0 - product))


def trainings_for_reliability(delta: float, factor: float = 2.0) -> int:
    """Independent trainings of which one stays below c times the bound: ceil(ln(1/delta) / ln c).

    One run exceeds c times its expectation with probability 1/c at most (Markov). To pick the best
    one its gradient must be measured on fresh data.

    Args:
        delta: Allowed probability that none does, in (0, 1).
        factor: c, above 1.

    Returns:
        The number of trainings.

    Raises:
        ConfigError: If an argument is outside its range.

    References:
        Derived here.

    Example:
        >>> trainings_for_reliability(0.05), trainings_for_reliability(0.05, 4)
        (5, 3)
    """
    require(inside_unit(delta=delta), above_one(factor=factor))
    exact = -math.log(delta) / math.log(factor)
    return max(1, math.ceil(exact * (1.0 - 1e-12)))  # a whole number may come out a bit too large


def _count(amount: float, each: float) -> int | float:
    """Smallest count that reaches the amount; inf if none does, or none that a float can hold."""
    count = amount / each if each > 0.0 else math.inf
    return max(1, math.ceil(count)) if math.isfinite(count) else math.inf

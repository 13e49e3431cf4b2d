"""What a step and a sample are worth at a batch size, and the learning rate that goes with it."""

import math

from gradwatch.theory.argument import at_least_one, fault_in, not_negative, positive, require


def step_efficiency(noise_scale: float, batch_size: float) -> float:
    """Progress of a step over that of an infinite batch: 1 / (1 + B_noise / B).

    Args:
        noise_scale: B_noise [sample].
        batch_size: B, at least 1.

    Returns:
        The share, in (0, 1].

    Raises:
        ConfigError: If an argument is outside its range.

    References:
        Derived here.

    Example:
        >>> step_efficiency(64, 64)
        0.5
    """
    require(not_negative(noise_scale=noise_scale), at_least_one(batch_size=batch_size))
    return 1.0 / (1.0 + noise_scale / batch_size)


def sample_efficiency(noise_scale: float, batch_size: float) -> float:
    """Progress of a sample over that in a tiny batch: 1 / (1 + B / B_noise).

    Args:
        noise_scale: B_noise, above 0 [sample].
        batch_size: B, at least 1.

    Returns:
        The share, in (0, 1).

    Raises:
        ConfigError: If an argument is outside its range.

    References:
        Derived here.

    Example:
        >>> round(sample_efficiency(10, 100), 3)
        0.091
    """
    require(positive(noise_scale=noise_scale), at_least_one(batch_size=batch_size))
    return 1.0 / (1.0 + batch_size / noise_scale)


def rescaled_learning_rate(
    learning_rate: float,
    batch_size: float,
    new_batch_size: float,
    noise_scale: float,
    exponent: float = 1.0,
) -> float:
    """Learning rate for another batch size: eta ((1 + B_n/S) / (1 + B_n/S'))^x.

    Linear in the batch size while both are far below B_n, flat where both are far above.

    Args:
        learning_rate: eta at the batch size S [P²/L].
        batch_size: S, at least 1.
        new_batch_size: S', at least 1.
        noise_scale: B_n, B_noise or else B_simple; inf for the linear rule [sample].
        exponent: x, 1 for SGD; 1/2 is a heuristic for Adam. In (0, 1].

    Returns:
        eta' [P²/L]; keep it below the stability threshold.

    Raises:
        ConfigError: If an argument is outside its range.

    References:
        Derived here; same form as McCandlish et al. 2018, arXiv:1812.06162.

    Example:
        >>> round(rescaled_learning_rate(0.1, 64, 512, 100), 6)
        0.214379
    """
    require(
        not_negative(learning_rate=learning_rate),
        at_least_one(batch_size=batch_size, new_batch_size=new_batch_size),
        fault_in({"noise_scale": noise_scale}, lambda v: v >= 0, "be at least 0"),
        fault_in({"exponent": exponent}, lambda v: 0 < v <= 1, "lie in (0, 1]"),
    )
    if math.isinf(noise_scale):
        return learning_rate * math.pow(new_batch_size / batch_size, exponent)
    factor = (1.0 + noise_scale / batch_size) / (1.0 + noise_scale / new_batch_size)
    return learning_rate * math.pow(factor, exponent)

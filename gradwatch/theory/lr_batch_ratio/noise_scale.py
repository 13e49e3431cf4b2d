"""The gradient noise scale: unbiased estimates of its two parts, and their ratio."""

import math

from gradwatch.errors import ConfigError
from gradwatch.theory.argument import (
    at_least_one,
    finite,
    inside_unit,
    not_negative,
    positive,
    require,
    whole,
)
from gradwatch.theory.gradient_convergence.noise import GradientEstimate


def two_batch_estimate(
    small_square: float, large_square: float, small: float, large: float
) -> GradientEstimate:
    """Square of the true gradient and variance per sample from the norms at two batch sizes.

    square = (b |g_b|² - s |g_s|²) / (b - s), variance = (|g_s|² - |g_b|²) / (1/s - 1/b), for s < b.
    The small batch may be part of the large one.

    Args:
        small_square: |g_s|², of the mean gradient of the small batch [(L/P)²].
        large_square: |g_b|², of that of the large batch [(L/P)²].
        small: s, samples, at least 1.
        large: b, samples, above s.

    Returns:
        The estimates, each unbiased; variance is per sample. Average both over steps, then divide.

    Raises:
        ConfigError: If an argument is outside its range.

    References:
        Derived here; McCandlish et al. 2018, arXiv:1812.06162, for its use.

    Example:
        >>> estimate = two_batch_estimate(2, 0.5, 8, 64)
        >>> round(estimate.variance / estimate.square, 6)
        48.0
    """
    require(
        not_negative(small_square=small_square, large_square=large_square),
        at_least_one(small=small, large=large),
    )
    if small >= large:
        raise ConfigError(f"small must be below large, got {small} and {large}")
    return GradientEstimate(
        (large * large_square - small * small_square) / (large - small),
        (small_square - large_square) / (1.0 / small - 1.0 / large),
    )


def microbatch_norm_estimate(
    mean_square: float, square_of_mean: float, count: int, microbatch_size: float
) -> GradientEstimate:
    """The same from K micro-batches of one step, with 2 to 3 times less spread.

    variance = m K/(K-1) (M - |g|²), square = |g|² - variance / (K m).

    Args:
        mean_square: M, mean of |g_k|² over the micro-batches [(L/P)²].
        square_of_mean: |g|², of their mean gradient [(L/P)²].
        count: K, at least 2.
        microbatch_size: m, samples, at least 1.

    Returns:
        The estimates; variance is per sample.

    Raises:
        ConfigError: If an argument is outside its range.

    References:
        Derived here.

    Example:
        >>> estimate = microbatch_norm_estimate(1.5, 0.6, 4, 16)
        >>> round(estimate.variance, 9), round(estimate.square, 9)
        (19.2, 0.3)
    """
    require(
        not_negative(mean_square=mean_square, square_of_mean=square_of_mean),
        whole(2, count=count),
        at_least_one(microbatch_size=microbatch_size),
    )
    variance = microbatch_size * count / (count - 1) * (mean_square - square_of_mean)
    return GradientEstimate(square_of_mean - variance / (count * microbatch_size), variance)


def adam_estimate(
    second_moment_sum: float,
    first_moment_square_sum: float,
    beta1: float,
    batch_size: float,
    step: int | None = None,
) -> GradientEstimate:
    """The same from Adam's state, at no cost, while the gradient is about constant.

    r = (1 - b1)(1 + b1^t) / ((1 + b1)(1 - b1^t)) is the share of the noise left in m_hat after t
    steps; noise = (V - M) / (1 - r), square = M - r noise, variance = B noise.

    Args:
        second_moment_sum: V, sum over the parameters of v_hat, bias corrected [(L/P)²].
        first_moment_square_sum: M, sum of m_hat², bias corrected [(L/P)²].
        beta1: b1, in (0, 1).
        batch_size: B, at least 1.
        step: t, steps taken, at least 2; None for very many.

    Returns:
        The estimates; variance is per sample, and too large while the gradient drifts. Not for
        AMSGrad.

    Raises:
        ConfigError: If an argument is outside its range.

    References:
        Derived here.

    Example:
        >>> estimate = adam_estimate(3, 1, 0.9, 32)
        >>> round(estimate.variance, 6), round(estimate.square, 6)
        (67.555556, 0.888889)
    """
    require(
        not_negative(
            second_moment_sum=second_moment_sum, first_moment_square_sum=first_moment_square_sum
        ),
        inside_unit(beta1=beta1),
        at_least_one(batch_size=batch_size),
        "" if step is None else whole(2, step=step),
    )
    decayed = 0.0 if step is None else beta1**step
    left = (1.0 - beta1) * (1.0 + decayed) / ((1.0 + beta1) * (1.0 - decayed))
    noise = (second_moment_sum - first_moment_square_sum) / (1.0 - left)
    return GradientEstimate(first_moment_square_sum - left * noise, batch_size * noise)


def curvature_estimate(cross: float, diagonal: float, batch_size: float) -> tuple[float, float]:
    """G^T H G and tr(H Sigma) from two batches of equal size and one Hessian-vector product.

    With v = H g_1, H from a third batch: G^T H G = g_2 . v, tr(H Sigma) = B (g_1 . v - g_2 . v).

    Args:
        cross: g_2 . v [L³/P⁴].
        diagonal: g_1 . v [L³/P⁴].
        batch_size: B, samples in each of the two batches, at least 1.

    Returns:
        Both, unbiased [L³/P⁴]; tr(H Sigma) is per sample.

    Raises:
        ConfigError: If an argument is outside its range.

    References:
        Derived here.

    Example:
        >>> curvature_estimate(0.25, 0.75, 16)
        (0.25, 8.0)
    """
    require(finite(cross=cross, diagonal=diagonal), at_least_one(batch_size=batch_size))
    return cross, batch_size * (diagonal - cross)


def simple_noise_scale(variance: float, square: float) -> float:
    """B_simple = tr(Sigma) / |G|², the largest batch size that is of use.

    Divide averages; the average of ratios is too large by 25 to 35 %.

    Args:
        variance: tr(Sigma), per sample, averaged over steps [(L/P)²].
        square: |G|², averaged over steps [(L/P)²].

    Returns:
        B_simple, samples; inf if the square is not above 0, as an estimate of little signal is;
        negative if the variance is.

    Raises:
        ConfigError: If an argument is not finite.

    References:
        McCandlish et al. 2018, arXiv:1812.06162.

    Example:
        >>> simple_noise_scale(6.0, 0.125)
        48.0
    """
    require(finite(variance=variance, square=square))
    return variance / square if square > 0.0 else math.inf


def curvature_noise_scale(noise_curvature: float, gradient_curvature: float) -> float:
    """B_noise = tr(H Sigma) / (G^T H G), the batch size that halves the optimal step.

    It equals B_simple only if H is a multiple of the identity; expect factors of a few.

    Args:
        noise_curvature: tr(H Sigma), per sample [L³/P⁴].
        gradient_curvature: G^T H G, above 0 [L³/P⁴].

    Returns:
        B_noise, samples.

    Raises:
        ConfigError: If an argument is outside its range.

    References:
        McCandlish et al. 2018, arXiv:1812.06162; form derived here.

    Example:
        >>> round(curvature_noise_scale(10.2025, 0.21723), 2)
        46.97
    """
    require(
        finite(noise_curvature=noise_curvature), positive(gradient_curvature=gradient_curvature)
    )
    return noise_curvature / gradient_curvature

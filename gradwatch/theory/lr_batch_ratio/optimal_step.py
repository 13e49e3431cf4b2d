"""What one step of SGD gains in a quadratic model of the loss, and the step that gains most."""

from gradwatch.theory.argument import (
    at_least_one,
    finite,
    momentum_rate,
    not_negative,
    positive,
    require,
)
from gradwatch.theory.gradient_convergence.bound import BEYOND, Split
from gradwatch.theory.lr_batch_ratio.efficiency import step_efficiency


def expected_loss_change(
    learning_rate: float,
    square: float,
    gradient_curvature: float,
    noise_curvature: float,
    batch_size: float,
) -> float:
    """Expected change of the loss by one step: -e |G|² + e²/2 (G^T H G + tr(H Sigma)/B).

    Args:
        learning_rate: e of plain SGD [P²/L].
        square: |G|², of the true gradient [(L/P)²].
        gradient_curvature: G^T H G [L³/P⁴].
        noise_curvature: tr(H Sigma), per sample [L³/P⁴].
        batch_size: B, at least 1.

    Returns:
        The change [L]; 0 at twice the optimal step.

    Raises:
        ConfigError: If an argument is outside its range.

    References:
        Derived here; same form as McCandlish et al. 2018, arXiv:1812.06162.

    Example:
        >>> expected_loss_change(0.5, 1.0, 1.0, 16.0, 16)
        -0.25
    """
    require(
        not_negative(learning_rate=learning_rate, square=square),
        finite(gradient_curvature=gradient_curvature, noise_curvature=noise_curvature),
        at_least_one(batch_size=batch_size),
    )
    bend = gradient_curvature + noise_curvature / batch_size
    return -learning_rate * square + learning_rate**2 / 2.0 * bend


def stall_ratio(
    learning_rate: float,
    square: float,
    gradient_curvature: float,
    noise_curvature: float,
    batch_size: float,
    momentum: float = 0.0,
) -> float:
    """Loss that a step adds over the loss that it removes: e (G^T H G + tr(H Sigma)/B) / (2 |G|²).

    At 1 or more the loss does not fall in expectation. With heavy ball e is lr / (1 - beta), a
    heuristic.

    Args:
        learning_rate: learning rate [P²/L].
        square: |G|², above 0 [(L/P)²].
        gradient_curvature: G^T H G [L³/P⁴].
        noise_curvature: tr(H Sigma), per sample [L³/P⁴].
        batch_size: B, at least 1.
        momentum: beta, in [0, 1).

    Returns:
        The ratio, a pure number.

    Raises:
        ConfigError: If an argument is outside its range.

    References:
        Derived here.

    Example:
        >>> round(stall_ratio(0.5, 0.32, 0.217, 10.2, 16), 6)
        0.667578
    """
    require(
        not_negative(learning_rate=learning_rate),
        positive(square=square),
        finite(gradient_curvature=gradient_curvature, noise_curvature=noise_curvature),
        at_least_one(batch_size=batch_size),
        momentum_rate(momentum=momentum),
    )
    bend = gradient_curvature + noise_curvature / batch_size
    return learning_rate / (1.0 - momentum) * bend / (2.0 * square)


def noiseless_step(square: float, gradient_curvature: float) -> float:
    """Learning rate that gains most without noise: e_max = |G|² / (G^T H G).

    Args:
        square: |G|² [(L/P)²].
        gradient_curvature: G^T H G, above 0 [L³/P⁴].

    Returns:
        e_max [P²/L].

    Raises:
        ConfigError: If an argument is outside its range.

    References:
        Derived here; same form as McCandlish et al. 2018, arXiv:1812.06162.

    Example:
        >>> noiseless_step(1.0, 4.0)
        0.25
    """
    require(not_negative(square=square), positive(gradient_curvature=gradient_curvature))
    return square / gradient_curvature


def optimal_step(largest_step: float, noise_scale: float, batch_size: float) -> float:
    """Learning rate that gains most in one step: e_max / (1 + B_noise / B).

    Greedy steps are too small in the long run; do not drive the learning rate there.

    Args:
        largest_step: e_max of `noiseless_step` [P²/L].
        noise_scale: B_noise, or B_simple where that is unknown [sample].
        batch_size: B, at least 1.

    Returns:
        e_opt [P²/L].

    Raises:
        ConfigError: If an argument is outside its range.

    References:
        Derived here; same form as McCandlish et al. 2018, arXiv:1812.06162.

    Example:
        >>> round(optimal_step(0.5, 100, 64), 6)
        0.195122
    """
    require(not_negative(largest_step=largest_step))
    return largest_step * step_efficiency(noise_scale, batch_size)


def best_gain(
    square: float, gradient_curvature: float, noise_scale: float, batch_size: float
) -> float:
    """Loss that the optimal step removes: |G|⁴ / (2 G^T H G) / (1 + B_noise / B).

    Args:
        square: |G|² [(L/P)²].
        gradient_curvature: G^T H G, above 0 [L³/P⁴].
        noise_scale: B_noise [sample].
        batch_size: B, at least 1.

    Returns:
        The gain [L].

    Raises:
        ConfigError: If an argument is outside its range.

    References:
        Derived here; same form as McCandlish et al. 2018, arXiv:1812.06162.

    Example:
        >>> best_gain(1.0, 0.5, 16, 16)
        0.5
    """
    step = optimal_step(noiseless_step(square, gradient_curvature), noise_scale, batch_size)
    return step * square / 2.0


def simple_stationarity_bound(
    loss_gap: float,
    smoothness: float,
    variance: float,
    batch_size: float,
    learning_rate: float,
    steps: float,
) -> Split:
    """Bound on the mean of |G|² in its short form: 2 D / (eta T) + eta beta tr(Sigma) / S.

    At most twice the sharper `gradient_convergence.stationarity_bound`. Only for eta <= 1/beta.

    Args:
        loss_gap: D, loss at the start above the lowest loss [L].
        smoothness: beta, largest curvature along the path [L/P²].
        variance: tr(Sigma), per sample [(L/P)²].
        batch_size: S, at least 1.
        learning_rate: eta, above 0 [P²/L].
        steps: T, at least 1.

    Returns:
        Both parts [(L/P)²]; infinite for eta > 1/beta.

    Raises:
        ConfigError: If an argument is outside its range.

    References:
        Derived here; the standard argument for smooth SGD.

    Example:
        >>> simple_stationarity_bound(1, 2, 0.5, 1, 0.25, 100)
        Split(step_term=0.08, noise_term=0.25)
    """
    require(
        not_negative(loss_gap=loss_gap, smoothness=smoothness, variance=variance),
        positive(learning_rate=learning_rate),
        at_least_one(batch_size=batch_size, steps=steps),
    )
    if learning_rate * smoothness > 1.0:
        return BEYOND
    floor = learning_rate * smoothness * variance / batch_size
    return Split(2.0 * loss_gap / (learning_rate * steps), floor)

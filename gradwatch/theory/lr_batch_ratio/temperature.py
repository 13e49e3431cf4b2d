"""SGD as a Langevin equation: its temperature, and which minima it prefers.

Assumes an isotropic, nearly constant gradient covariance, which networks do not have: a guide.
"""

import math

from gradwatch.errors import ConfigError
from gradwatch.theory.argument import (
    at_least_one,
    finite,
    momentum_rate,
    not_negative,
    positive,
    require,
)


def temperature(learning_rate: float, variance: float, batch_size: float) -> float:
    """Noise level n = eta sigma² / (2 S) of the stationary density exp(-loss/n).

    Args:
        learning_rate: eta of plain SGD [P²/L].
        variance: sigma², of one sample's gradient, per coordinate [(L/P)²].
        batch_size: S, at least 1.

    Returns:
        n [L].

    Raises:
        ConfigError: If an argument is outside its range.

    References:
        Jastrzebski et al. 2018, "Three Factors Influencing Minima in SGD" (ICLR 2018 submission).

    Example:
        >>> temperature(0.1, 2, 32)
        0.003125
    """
    require(
        not_negative(learning_rate=learning_rate, variance=variance),
        at_least_one(batch_size=batch_size),
    )
    return learning_rate * variance / (2.0 * batch_size)


def effective_ratio(learning_rate: float, batch_size: float, momentum: float = 0.0) -> float:
    """Controllable part of the noise level, eta / (S (1 - beta)).

    At equal ratio, equal eta x steps means equal epochs, and training curves agree epoch by epoch
    as long as eta is small against the curvature (`ratio_law_limit`). For SGD only: Adam divides
    the noise out.

    Args:
        learning_rate: eta [P²/L].
        batch_size: S, samples per step, at least 1.
        momentum: beta of heavy ball in PyTorch's form, in [0, 1).

    Returns:
        The ratio [P²/L per sample].

    Raises:
        ConfigError: If an argument is outside its range.

    References:
        Jastrzebski et al. 2018 for eta/S; momentum derived here.

    Example:
        >>> effective_ratio(0.1, 32, 0.5)
        0.00625
    """
    require(
        not_negative(learning_rate=learning_rate),
        at_least_one(batch_size=batch_size),
        momentum_rate(momentum=momentum),
    )
    return learning_rate / (batch_size * (1.0 - momentum))


def minima_ratio(
    determinant: float,
    other_determinant: float,
    loss: float,
    other_loss: float,
    noise_level: float,
) -> float:
    """Weight of one minimum over another, sqrt(det H_B / det H_A) exp((L_B - L_A) / n).

    A direction only: the determinant over a network's many flat directions cannot be measured.

    Args:
        determinant: det H_A, above 0.
        other_determinant: det H_B, above 0.
        loss: L_A [L].
        other_loss: L_B [L].
        noise_level: n of `temperature`, above 0 [L].

    Returns:
        p_A / p_B.

    Raises:
        ConfigError: If an argument is outside its range.

    References:
        Jastrzebski et al. 2018 (ICLR 2018 submission).

    Example:
        >>> round(minima_ratio(2, 18, 0.15, 0, 0.15), 6)
        1.103638
    """
    require(
        positive(
            determinant=determinant, other_determinant=other_determinant, noise_level=noise_level
        ),
        finite(loss=loss, other_loss=other_loss),
    )
    return math.sqrt(other_determinant / determinant) * math.exp((other_loss - loss) / noise_level)


def noise_threshold(
    determinant: float, other_determinant: float, loss: float, other_loss: float
) -> float:
    """Noise level above which the higher minimum A is preferred, if it is flatter.

    n = (L_A - L_B) / log sqrt(det H_B / det H_A).

    Args:
        determinant: det H_A of the higher minimum, above 0.
        other_determinant: det H_B of the lower one, above 0.
        loss: L_A, above L_B [L].
        other_loss: L_B [L].

    Returns:
        n [L]; inf if A is not flatter, as a higher and sharper minimum is never preferred.

    Raises:
        ConfigError: If a determinant is not positive or loss is not above other_loss.

    References:
        Jastrzebski et al. 2018 (ICLR 2018 submission).

    Example:
        >>> round(noise_threshold(2, 18, 0.15, 0), 6)
        0.136536
    """
    require(
        positive(determinant=determinant, other_determinant=other_determinant),
        finite(loss=loss, other_loss=other_loss),
    )
    if loss <= other_loss:
        raise ConfigError(f"loss must be above other_loss, got {loss} and {other_loss}; swap them")
    if determinant >= other_determinant:
        return math.inf
    return (loss - other_loss) / (0.5 * math.log(other_determinant / determinant))

"""Trainings of different networks that have the same bound."""

from typing import NamedTuple

from gradwatch.theory.argument import at_least_one, not_negative, positive, require
from gradwatch.theory.gradient_convergence.bound import Split, stationarity_bound
from gradwatch.theory.gradient_convergence.inversion import step_progress


class Setting(NamedTuple):
    """Constants of a network and how it is trained.

    Attributes:
        loss_gap: D, loss at the start above the lowest loss [L].
        smoothness: L, curvature [L/P²].
        variance: sigma², per sample [(L/P)²].
        batch_size: B, samples per step.
        learning_rate: g of plain SGD [P²/L].
        steps: N.
    """

    loss_gap: float
    smoothness: float
    variance: float
    batch_size: float
    learning_rate: float
    steps: float

    @property
    def bound(self) -> Split:
        """`stationarity_bound` of this setting."""
        return stationarity_bound(*self)


def same_convergence(
    setting: Setting, loss_gap: float, smoothness: float, variance: float
) -> Setting:
    """How to train a network of other constants so that both parts of the bound stay the same.

    g' = g L/L', B' = B sigma'²/sigma², N' = N (L'/L) (D'/D), exactly.

    Args:
        setting: The known training; its loss_gap, smoothness and variance above 0.
        loss_gap: D' of the other network, above 0 [L].
        smoothness: L' of the other network [L/P²].
        variance: sigma'² of the other network, per sample [(L/P)²].

    Returns:
        The other training; batch_size and steps are not rounded, and may be below 1.

    Raises:
        ConfigError: If an argument is outside its range.

    References:
        Derived here.

    Example:
        >>> base = Setting(2.3026, 10, 50, 128, 0.03, 10_000)
        >>> other = same_convergence(base, 2.0, 20, 90)
        >>> other.learning_rate, other.batch_size, round(other.steps, 2)
        (0.015, 230.4, 17371.67)
    """
    require(
        positive(
            loss_gap=loss_gap,
            smoothness=smoothness,
            variance=variance,
            **{f"setting.{name}": value for name, value in setting._asdict().items()},
        ),
        at_least_one(**{"setting.batch_size": setting.batch_size, "setting.steps": setting.steps}),
    )
    return Setting(
        loss_gap,
        smoothness,
        variance,
        batch_size=setting.batch_size * variance / setting.variance,
        learning_rate=setting.learning_rate * setting.smoothness / smoothness,
        steps=setting.steps * smoothness / setting.smoothness * loss_gap / setting.loss_gap,
    )


def pretraining_steps_saved(
    random_gap: float,
    pretrained_gap: float,
    smoothness: float,
    variance: float,
    batch_size: float,
    learning_rate: float,
    target: float,
) -> float | None:
    """Steps that a better start saves: 2 (D_rand - D_pre) / (eps g (2 - L g) - L g² s²).

    Pretraining enters the bound through D only. It pays if it costs fewer steps than this.

    Args:
        random_gap: D_rand, loss gap of a random start [L].
        pretrained_gap: D_pre, loss gap after pretraining [L].
        smoothness: L [L/P²].
        variance: sigma², per sample [(L/P)²].
        batch_size: B, at least 1.
        learning_rate: g, above 0 [P²/L].
        target: eps, above 0 [(L/P)²].

    Returns:
        The steps, negative if pretraining made the start worse; None if no number of steps
        reaches the target.

    Raises:
        ConfigError: If an argument is outside its range.

    References:
        Derived here.

    Example:
        >>> round(pretraining_steps_saved(2.3026, 1.1, 10, 50, 128, 0.01, 0.05), 3)
        4299.799
    """
    require(not_negative(random_gap=random_gap, pretrained_gap=pretrained_gap))
    rate = step_progress(smoothness, variance, batch_size, learning_rate, target)
    return 2.0 * (random_gap - pretrained_gap) / rate if rate > 0.0 else None

"""Settings of a training from known constants of a network.

The target for the mean square of the gradient is shared out: half of it for the noise floor, which
learning rate and batch size set, half for the part that shrinks with the steps.
"""

from collections.abc import Mapping
from typing import NamedTuple

from gradwatch.errors import ConfigError
from gradwatch.theory.argument import inside_unit, positive, require
from gradwatch.theory.gradient_convergence import (
    Setting,
    batch_size_for_floor,
    batch_size_for_target,
    best_learning_rate,
    keep_rate_for_target,
    learning_rate_for_floor,
    mask_law,
    same_convergence,
    steps_for_target,
)

FLOOR_SHARE = 0.5  # of the target, for the noise floor
SAFE_PRODUCT = 0.5  # of learning rate and curvature, which grows during training
LARGEST_MOVE = 0.2  # of a keep rate: the effect of dropout on generalisation is not modelled


class Constants(NamedTuple):
    """What the bound needs to know of a network.

    Attributes:
        loss_gap: loss at the start above the lowest loss [L].
        smoothness: top eigenvalue of the Hessian [L/P²].
        variance: of the gradient of one sample, trace of the covariance [(L/P)²].
    """

    loss_gap: float
    smoothness: float
    variance: float


def learning_rate(
    *,
    smoothness: float,
    variance: float,
    batch_size: float,
    target: float | None = None,
    loss_gap: float | None = None,
    steps: float | None = None,
) -> float:
    """The learning rate of plain SGD for a target, or the best one for a number of steps.

    For a target: that whose noise floor is half of it, at most 0.5/L. For steps: that with the
    smallest bound.

    Args:
        smoothness: L, top eigenvalue of the Hessian [L/P²].
        variance: of the gradient of one sample [(L/P)²].
        batch_size: samples per step.
        target: wanted mean square of the gradient [(L/P)²]; or else give loss_gap and steps.
        loss_gap: loss at the start above the lowest loss [L].
        steps: planned steps.

    Returns:
        The learning rate [P²/L]; with momentum m take (1 - m) of it, a heuristic.

    Raises:
        ConfigError: if not exactly one way is given, or a number is out of its range.

    Example:
        >>> round(learning_rate(smoothness=10, variance=50, batch_size=128, target=0.02), 6)
        0.004992
        >>> round(
        ...     learning_rate(
        ...         smoothness=10, variance=50, batch_size=128, loss_gap=2.3, steps=10_000
        ...     ),
        ...     6,
        ... )
        0.010279
    """
    if target is not None and loss_gap is None and steps is None:
        require(positive(target=target))
        floor = FLOOR_SHARE * target
        rate = learning_rate_for_floor(smoothness, variance, batch_size, floor)
        return min(rate, SAFE_PRODUCT / smoothness)
    if target is None and loss_gap is not None and steps is not None:
        return best_learning_rate(loss_gap, smoothness, variance, batch_size, steps)
    raise ConfigError(
        f"learning_rate needs either target, or loss_gap and steps; got target={target}, "
        f"loss_gap={loss_gap}, steps={steps}"
    )


def batch_size(
    *,
    smoothness: float,
    variance: float,
    learning_rate: float,
    target: float,
    loss_gap: float | None = None,
    steps: float | None = None,
) -> int | float:
    """The batch size for a target.

    With loss_gap and steps: that whose bound after these steps is the target. Without: that whose
    noise floor is half the target.

    Args:
        smoothness: L, top eigenvalue of the Hessian [L/P²].
        variance: of the gradient of one sample [(L/P)²].
        learning_rate: of plain SGD [P²/L].
        target: wanted mean square of the gradient [(L/P)²].
        loss_gap: loss at the start above the lowest loss [L]; with steps.
        steps: planned steps; with loss_gap.

    Returns:
        Samples per step; inf if no batch size reaches the target.

    Raises:
        ConfigError: if only one of loss_gap and steps is given, or a number is out of its range.

    Example:
        >>> batch_size(smoothness=0.688, variance=1.47, learning_rate=0.3, target=0.01)
        34
        >>> batch_size(
        ...     smoothness=10, variance=50, learning_rate=0.03, target=0.02, loss_gap=2.3, steps=1e4
        ... )
        804
    """
    require(positive(target=target))
    if loss_gap is None and steps is None:
        return batch_size_for_floor(smoothness, variance, learning_rate, FLOOR_SHARE * target)
    if loss_gap is None or steps is None:
        raise ConfigError(
            f"batch_size needs loss_gap and steps together, got loss_gap={loss_gap}, steps={steps}"
        )
    return batch_size_for_target(loss_gap, smoothness, variance, learning_rate, steps, target)


def steps(
    *,
    loss_gap: float,
    smoothness: float,
    variance: float,
    batch_size: float,
    learning_rate: float,
    target: float,
) -> int | float:
    """The steps until the bound is the target.

    Args:
        loss_gap: loss at the start above the lowest loss [L].
        smoothness: L, top eigenvalue of the Hessian [L/P²].
        variance: of the gradient of one sample [(L/P)²].
        batch_size: samples per step.
        learning_rate: of plain SGD [P²/L].
        target: wanted mean square of the gradient [(L/P)²].

    Returns:
        The steps; inf if the noise floor is not below the target, or the learning rate is 2/L or
        more.

    Raises:
        ConfigError: if a number is out of its range.

    Example:
        >>> steps(
        ...     loss_gap=2.3,
        ...     smoothness=10,
        ...     variance=50,
        ...     batch_size=128,
        ...     learning_rate=0.01,
        ...     target=0.05,
        ... )
        8224
    """
    return steps_for_target(loss_gap, smoothness, variance, batch_size, learning_rate, target)


def dropout(
    *,
    current: float,
    mask_variance: float,
    data_variance: float,
    smoothness: float,
    batch_size: float,
    learning_rate: float,
    target: float,
) -> float | None:
    """The largest dropout up to the current one whose noise floor is within half the target.

    It is lowered by 0.2 at most: the law is local, and what dropout does for generalisation is not
    modelled.

    Args:
        current: p of `nn.Dropout`, in (0, 1).
        mask_variance: what the masks add to the variance of one sample's gradient [(L/P)²].
        data_variance: the variance without it [(L/P)²].
        smoothness: L, top eigenvalue of the Hessian [L/P²].
        batch_size: samples per step.
        learning_rate: of plain SGD [P²/L].
        target: wanted mean square of the gradient [(L/P)²].

    Returns:
        p; None if the data alone are too noisy for the target.

    Raises:
        ConfigError: if a number is out of its range.

    Example:
        >>> p = dropout(
        ...     current=0.7,
        ...     mask_variance=20.4,
        ...     data_variance=9.5,
        ...     smoothness=1.0,
        ...     batch_size=32,
        ...     learning_rate=0.3,
        ...     target=0.24,
        ... )
        >>> round(p, 2)
        0.58
    """
    require(inside_unit(current=current), positive(target=target))
    law = mask_law(mask_variance, 1.0 - current)
    floor = FLOOR_SHARE * target
    keep = keep_rate_for_target(law, data_variance, smoothness, batch_size, learning_rate, floor)
    if keep is None:
        return None
    return max(min(current, 1.0 - keep), current - LARGEST_MOVE, 0.0)


def same_convergence_family(
    *, base: Setting, others: Mapping[str, Constants]
) -> dict[str, Setting]:
    """How to train other networks so that they reach the same bound as a known training.

    Args:
        base: the known training, a `theory.gradient_convergence.Setting`.
        others: name and constants of each other network, measured as those of the base were.

    Returns:
        Name and setting; batch sizes and steps are not rounded.

    Raises:
        ConfigError: if there are no others, one is of another type, or a number is out of its
            range.

    Example:
        >>> base = Setting(2.3, 10, 50, batch_size=128, learning_rate=0.03, steps=10_000)
        >>> wide = same_convergence_family(base=base, others={"wide": Constants(2.3, 20, 100)})
        >>> wide["wide"].learning_rate, wide["wide"].batch_size, wide["wide"].steps
        (0.015, 256.0, 20000.0)
    """
    if not isinstance(base, Setting):
        raise ConfigError(
            "base must be a gradwatch.theory.gradient_convergence.Setting, got a "
            f"{type(base).__name__}"
        )
    if not isinstance(others, Mapping) or not others:
        raise ConfigError(f"others must map at least one name to its Constants, got {others!r}")
    return {name: same_convergence(base, *_constants(name, of)) for name, of in others.items()}


def _constants(name: str, values: Constants) -> Constants:
    if not isinstance(values, Constants):
        raise ConfigError(f"others[{name!r}] must be gradwatch.plan.Constants, got {values!r}")
    return values

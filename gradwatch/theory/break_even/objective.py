"""Whether the loss whose curvature is measured is the one that the steps follow."""

import math
from typing import Final

LARGEST_SCALE: Final = 2.0
"""Factor between the squares of the two gradients up to which noise explains it."""


def same_gradient(scale: float) -> bool:
    """Whether steps go along the gradient of the loss that is evaluated for the curvature.

    Micro-batches that are added up and not divided, a loss that is a sum over the samples, or
    another loss than that of the training make the steps longer or shorter than the curvature and
    the learning rate together say: the stability ratio is then wrong by the square root of `scale`.

    Args:
        scale: squared norm of the gradient of a step over that of the evaluated loss [1]; NaN if
            unknown.

    Returns:
        True within a factor of 2; False as well where it is unknown.

    References:
        derived; the scale is 1 in expectation where both are one loss.

    Example:
        >>> same_gradient(1.3), same_gradient(64.0), same_gradient(math.nan)
        (True, False, False)
    """
    return 1.0 / LARGEST_SCALE <= scale <= LARGEST_SCALE


def another_gradient(scale: float) -> bool:
    """Whether steps are known to go along another gradient than that of the evaluated loss.

    Args:
        scale: as for `same_gradient`.

    Returns:
        True outside a factor of 2; False where it is unknown.

    Example:
        >>> another_gradient(1.3), another_gradient(64.0), another_gradient(math.nan)
        (False, True, False)
    """
    return not math.isnan(scale) and not same_gradient(scale)

"""All inputs of a subspace at once: explicit bounds, vacuous at the dimension of images."""

import math
from typing import NamedTuple

from gradwatch.theory.argument import inside_unit, whole
from gradwatch.theory.norm_preservation.depth_bound import minimum, smallest
from gradwatch.theory.norm_preservation.one_layer import tail_exponent


class NormBounds(NamedTuple):
    """Bounds lower <= ||h|| / ||x|| <= upper on a ratio of norms (not squared)."""

    lower: float
    upper: float


def _tolerance_at_rate(rate: float) -> float:
    """Solve c_up(eps) = rate."""
    epsilon = math.sqrt(32.0 * rate / 3.0)
    for _ in range(50):  # convex: one step overshoots, the others descend on the solution
        root = math.sqrt(1.0 + epsilon)
        slope = epsilon * (root + 2.0) / (4.0 * root * (1.0 + root) ** 2)
        epsilon -= (tail_exponent(epsilon) - rate) / slope
    return epsilon


def subspace_bounds(width: int, dimension: int, delta: float) -> NormBounds:
    """Bounds on ||h|| / ||x|| after one layer for all x of a d-dimensional subspace at once.

    sqrt(1-eps1) - Lip Delta <= ||h||/||x|| <= sqrt(1+eps1) + Lip Delta, Lip = sqrt(2 (1+eps1)) /
    (1-Delta), m c_up(eps1) = log 2 + d log(1 + 2/Delta) + log(2/delta): a net of 2 (1+2/Delta)^d
    points, with the Delta of the smallest upper bound. Explicit but vacuous at realistic sizes: raw
    images (d = 784) need 263 000 units for 50 %. Do not show it by default.

    Args:
        width: m of a fan-out He ReLU layer.
        dimension: d.
        delta: Failure probability, in (0, 1).

    Returns:
        Both bounds, the lower one at least 0.

    Raises:
        ValueError: If width or dimension is not a count or delta is outside (0, 1).

    References:
        Constants derived here, for the claim of Arpit & Bengio 2019, arXiv:1901.03611, abstract.

    Example:
        >>> round(subspace_bounds(4096, 2, 0.05).upper ** 2 - 1, 4)
        0.2354
    """
    if fault := whole(width=width, dimension=dimension) or inside_unit(delta=delta):
        raise ValueError(fault)

    def bounds(mesh: float) -> NormBounds:
        points = math.log(2.0) + dimension * math.log1p(2.0 / mesh)
        epsilon = _tolerance_at_rate((points + math.log(2.0 / delta)) / width)
        slack = math.sqrt(2.0 * (1.0 + epsilon)) / (1.0 - mesh) * mesh
        lower = math.sqrt(max(0.0, 1.0 - epsilon)) - slack
        return NormBounds(max(0.0, lower), math.sqrt(1.0 + epsilon) + slack)

    log_mesh = minimum(lambda t: bounds(math.exp(t)).upper, math.log(1e-9), math.log(0.9))[0]
    return bounds(math.exp(log_mesh))


def subspace_width(epsilon: float, dimension: int, delta: float) -> int:
    """Width at which `subspace_bounds` keeps the squared norm ratio within 1 +- eps.

    Explicit but vacuous at realistic sizes, as they are: d = 10 at 10 % needs 93 700 units.

    Args:
        epsilon: eps, tolerance on the squared norm, in (0, 1).
        dimension: d.
        delta: Failure probability, in (0, 1).

    Returns:
        Units of the layer.

    Raises:
        ValueError: If epsilon or delta is outside (0, 1), or dimension is not a count.

    References:
        Derived here.

    Example:
        >>> subspace_width(0.5, 2, 0.05)
        946
    """
    if fault := inside_unit(epsilon=epsilon, delta=delta) or whole(dimension=dimension):
        raise ValueError(fault)

    def enough(width: int) -> bool:
        lower, upper = subspace_bounds(width, dimension, delta)
        return upper**2 <= 1.0 + epsilon and lower**2 >= 1.0 - epsilon

    return smallest(enough, 1, math.ceil(10.0 * dimension / epsilon**2))

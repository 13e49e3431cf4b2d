"""Activations: second moment, gain and relative variance, in closed form or by quadrature."""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from gradwatch.theory.argument import fault_in, not_negative
from gradwatch.theory.norm_preservation.vector import Vector


class ActivationLaw(NamedTuple):
    """What an activation does to the norm of a standard normal pre-activation.

    Attributes:
        name: The activation, as in `known_activations`.
        second_moment: m2 = E phi(z)^2.
        gain: 1 / sqrt(m2), the factor on the weights that preserves the mean square.
        kappa: (E phi(z)^4 - m2^2) / m2^2, so that Var(rho) = kappa / m.
        homogeneous: Whether phi(c a) = c phi(a) for c > 0. Only then is preservation exact at every
            scale; for the others a pre-activation of variance 1, that is an input of mean
            square m2, is a fixed point, and the law holds near it.
    """

    name: str
    second_moment: float
    gain: float
    kappa: float
    homogeneous: bool


def _gelu(a: Vector) -> Vector:
    return np.asarray(0.5 * a * np.array([math.erfc(-x / math.sqrt(2.0)) for x in a]))


def _gelu_tanh(a: Vector) -> Vector:
    return np.asarray(0.5 * a * (1.0 + np.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3))))


def _silu(a: Vector) -> Vector:
    return np.asarray(0.5 * a * (1.0 + np.tanh(0.5 * a)))


def _elu(a: Vector) -> Vector:
    return np.where(a > 0, a, np.expm1(np.minimum(a, 0.0)))


_CURVED: dict[str, Callable[[Vector], Vector]] = {
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "silu": _silu,
    "tanh": np.tanh,
    "elu": _elu,
}
_KNOWN = ("relu", "leaky_relu", *_CURVED, "identity")
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(48)


def known_activations() -> tuple[str, ...]:
    """Names that `activation_law` knows.

    Returns:
        The names; "gelu" is the exact form, "gelu_tanh" its approximation, "elu" has alpha = 1.
    """
    return _KNOWN


def _activation_fault(name: str, negative_slope: float) -> str:
    if name not in _KNOWN:
        return f"name must be one of {', '.join(_KNOWN)}, got {name!r}"
    return fault_in({"negative_slope": negative_slope}, math.isfinite, "be finite")


def _slope(name: str, negative_slope: float) -> float | None:
    """Slope below 0 of a homogeneous activation, None for a curved one."""
    return {"relu": 0.0, "leaky_relu": negative_slope, "identity": 1.0}.get(name)


@lru_cache(maxsize=1024)
def _curved_moment(name: str, mean_square: float, power: int) -> float:
    """E phi(sqrt(q) z)^power by Gauss-Legendre quadrature.

    Panels halve towards 0 until the innermost is about as wide as the bend of the activation, which
    sits at z ~ 1 / sqrt(q). Beyond |z| = 12 the normal density has less than 1e-30 of its weight.
    """
    halvings = max(3, math.ceil(math.log2(12.0 * math.sqrt(mean_square) + 1.0)))
    edges = np.concatenate([[0.0], 12.0 * 0.5 ** np.arange(halvings, -1, -1)])
    half_widths = np.diff(edges)[:, None] / 2.0
    z = ((edges[:-1] + edges[1:])[:, None] / 2.0 + half_widths * _NODES).ravel()
    density = (half_widths * _WEIGHTS).ravel() * np.exp(-0.5 * z**2) / math.sqrt(2.0 * math.pi)
    scaled = math.sqrt(mean_square) * z
    phi = _CURVED[name]
    return float(density @ (phi(scaled) ** power + phi(-scaled) ** power))


def activation_second_moment(
    name: str, mean_square: float, *, negative_slope: float = 0.01
) -> float:
    """Mean square after an activation, E phi(sqrt(q) z)^2, for a normal pre-activation.

    Args:
        name: One of `known_activations`.
        mean_square: q, variance of the pre-activation.
        negative_slope: Slope below 0, read for "leaky_relu" only.

    Returns:
        The expectation, relative error below 1e-9; q (1 + slope^2) / 2 for a homogeneous phi.

    Raises:
        ValueError: If name is unknown, or a number is not finite or mean_square negative.

    References:
        Derived here; closed form of leaky ReLU as in He et al. 2015, arXiv:1502.01852.

    Example:
        >>> activation_second_moment("relu", 3.0)
        1.5
    """
    if fault := _activation_fault(name, negative_slope) or not_negative(mean_square=mean_square):
        raise ValueError(fault)
    slope = _slope(name, negative_slope)
    if slope is None:
        return _curved_moment(name, mean_square, 2)
    return mean_square * (1.0 + slope**2) / 2.0


def activation_law(name: str, *, negative_slope: float = 0.01) -> ActivationLaw:
    """Law of an activation at q = 1: m2 = E phi(z)^2, gain^2 = 1/m2, kappa = (m4 - m2^2) / m2^2.

    Args:
        name: One of `known_activations`.
        negative_slope: Slope below 0, read for "leaky_relu" only.

    Returns:
        The law; closed form for a homogeneous phi, quadrature to 1e-9 for the others.

    Raises:
        ValueError: If name is unknown or negative_slope is not finite.

    References:
        Derived here; gain of ReLU and leaky ReLU as in He et al. 2015, arXiv:1502.01852.

    Example:
        >>> activation_law("relu").kappa
        5.0
    """
    if fault := _activation_fault(name, negative_slope):
        raise ValueError(fault)
    slope = _slope(name, negative_slope)
    if slope is None:
        second, fourth = _curved_moment(name, 1.0, 2), _curved_moment(name, 1.0, 4)
    else:
        second, fourth = (1.0 + slope**2) / 2.0, 1.5 * (1.0 + slope**4)
    kappa = fourth / second**2 - 1.0
    return ActivationLaw(name, second, math.sqrt(1.0 / second), kappa, slope is not None)

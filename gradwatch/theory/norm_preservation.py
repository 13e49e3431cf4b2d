"""Norm preservation at initialisation: laws for activations and gradients of a fresh network.

A bias-free ReLU network with He weights keeps the norm of its activations and of its weight
gradients up to random factors (Arpit & Bengio 2019, arXiv:1901.03611, abstract). This module holds
the exact law of those factors and what follows from it. The theorems of that paper are not quoted:
"derived here" marks a statement derived for this package and checked by simulation.

Symbols: m width, n fan-in, L depth, rho = ||h_l||^2 / ||h_(l-1)||^2 the factor of one layer, R_l
the product of the first l factors, q = ||h||^2 / m the mean square, phi the activation, z a
standard normal number, N examples, delta a failure probability. Norms are Euclidean; factors,
their variances, and probabilities are pure numbers. A count is a whole number of at least 1.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "ActivationLaw",
    "Moments",
    "NormBounds",
    "activation_law",
    "activation_second_moment",
    "bias_noise_floor",
    "chernoff_rate",
    "default_variance",
    "dropout_factor",
    "gradient_factor",
    "gradient_log_variance",
    "he_variance_fan_in",
    "he_variance_fan_out",
    "known_activations",
    "largest_dropout",
    "layer_moments",
    "layer_tolerance",
    "log_ratio_moments",
    "lower_tail_bound",
    "martingale_width",
    "mean_square_factor",
    "norm_variance",
    "padding_factor",
    "padding_profile",
    "ratio_moment",
    "ratio_variance",
    "relu_square_mgf",
    "residual_factor",
    "squared_norm_factor",
    "subspace_bounds",
    "subspace_width",
    "tail_bound",
    "tail_rate",
    "union_bound",
    "union_width",
    "upper_tail_bound",
    "weight_gradient_norm",
    "width_for_stability",
    "z_score",
]

Vector = NDArray[np.float64]


class Moments(NamedTuple):
    """Mean and variance of a random factor or of its logarithm."""

    mean: float
    variance: float


class NormBounds(NamedTuple):
    """Bounds lower <= ||h|| / ||x|| <= upper on a ratio of norms (not squared)."""

    lower: float
    upper: float


class ActivationLaw(NamedTuple):
    """What an activation does to the norm of a standard normal pre-activation.

    Attributes:
        name: The activation, as in `known_activations`.
        second_moment: m2 = E phi(z)^2.
        gain: 1 / sqrt(m2), the factor on the weights that preserves the mean square.
        kappa: (E phi(z)^4 - m2^2) / m2^2, so that Var(rho) = kappa / m.
        homogeneous: Whether phi(c a) = c phi(a) for c > 0. Only then is preservation exact at every
            scale; for the others q = 1 is a fixed point and the law holds near it.
    """

    name: str
    second_moment: float
    gain: float
    kappa: float
    homogeneous: bool


# --- Arguments ------------------------------------------------------------------------------------


def _fault(values: Mapping[str, float], holds: Callable[[float], bool], need: str) -> str:
    """Describe the first value that breaks its range; empty if there is none."""
    return next((f"{n} must {need}, got {v}" for n, v in values.items() if not holds(v)), "")


def _whole(least: int = 1, **values: float) -> str:
    need = f"be a whole number of at least {least}"
    return _fault(values, lambda v: v >= least and float(v).is_integer(), need)


def _positive(**values: float) -> str:
    return _fault(values, lambda v: 0 < v < math.inf, "be positive and finite")


def _not_negative(**values: float) -> str:
    return _fault(values, lambda v: 0 <= v < math.inf, "be finite and at least 0")


def _inside_unit(**values: float) -> str:
    return _fault(values, lambda v: 0 < v < 1, "lie in (0, 1)")


def _dropout(**values: float) -> str:
    return _fault(values, lambda v: 0 <= v < 1, "lie in [0, 1)")


def _layers(widths: Sequence[int], least: int = 1) -> str:
    entries = {f"widths[{i}]": width for i, width in enumerate(widths)}
    return _whole(least, **entries) if entries else "widths must name at least one layer, got none"


def _layers_with_kappas(widths: Sequence[int], kappas: Sequence[float]) -> str:
    if len(widths) != len(kappas):
        return f"kappas must hold one value per width, got {len(kappas)} for {len(widths)} widths"
    entries = {f"kappas[{i}]": kappa for i, kappa in enumerate(kappas)}
    return _layers(widths) or _not_negative(**entries)


# --- One layer ------------------------------------------------------------------------------------


def relu_square_mgf(t: float) -> float:
    """Moment generating function of one ReLU unit, E exp(t ReLU(z)^2) = 1/2 + 1/2 (1-2t)^(-1/2).

    The factor of a whole fan-out He layer is rho = (2/m) chi2_K with K ~ Binomial(m, 1/2), for
    every input, and E exp(t rho) is the m-th power of this function at 2 t / m.

    Args:
        t: Argument, below 1/2.

    Returns:
        The expectation.

    Raises:
        ValueError: If t is not below 1/2.

    References:
        Derived here.

    Example:
        >>> relu_square_mgf(0.375)
        1.5
    """
    if fault := _fault({"t": t}, lambda v: v < 0.5, "be below 1/2 for the expectation to exist"):
        raise ValueError(fault)
    return 0.5 + 0.5 / math.sqrt(1.0 - 2.0 * t)


def layer_moments(width: int, dropout: float = 0.0) -> Moments:
    """Mean and variance of rho for one fan-out He ReLU layer with inverted dropout p.

    E rho = 1/(1-p) and m Var(rho) = 6/(1-p)^3 - 1/(1-p)^2, so 1 and 5/m without dropout.

    Args:
        width: m, units of the layer.
        dropout: p, probability that a unit is dropped.

    Returns:
        The two moments; exact, and the same for every input.

    Raises:
        ValueError: If width is not a count or dropout is outside [0, 1).

    References:
        Derived here.

    Example:
        >>> layer_moments(100), layer_moments(100, 0.5)
        (Moments(mean=1.0, variance=0.05), Moments(mean=2.0, variance=0.44))
    """
    if fault := _whole(width=width) or _dropout(dropout=dropout):
        raise ValueError(fault)
    keep = 1.0 - dropout
    return Moments(1.0 / keep, (6.0 / keep**3 - 1.0 / keep**2) / width)


def _rate(deviation: float) -> float:
    if abs(deviation) < 1e-4:
        # Both terms of the closed form agree to most of their digits here.
        return deviation**2 * (3 / 32 - 5 * deviation / 96 + 35 * deviation**2 / 1024)
    root = math.sqrt(1.0 + deviation)
    return deviation / 4.0 - math.log1p(0.5 * deviation / (1.0 + root))


def tail_rate(deviation: float) -> float:
    """Exponent c of the closed tail bound of one ReLU layer, c_up(eps), and c_low(eps) at -eps.

    c_up(eps) = eps/4 + log(2 / (1 + sqrt(1+eps))), c_low(eps) = c_up(-eps) >= c_up(eps), near 0
    c = 3 eps^2/32: about 6 % below the best exponent, `chernoff_rate`.

    Args:
        deviation: eps for P(rho > 1 + eps), -eps for P(rho < 1 - eps); above -1.

    Returns:
        c, so that the probability is at most exp(-m c).

    Raises:
        ValueError: If deviation is not finite or not above -1.

    References:
        Chernoff's bound at t = eps / (2 (1+eps)); derived here.

    Example:
        >>> round(tail_rate(0.5), 6), round(tail_rate(-0.5), 6)
        (0.018505, 0.033347)
    """
    if fault := _fault({"deviation": deviation}, lambda v: -1 < v < math.inf, "lie in (-1, inf)"):
        raise ValueError(fault)
    return _rate(deviation)


def chernoff_rate(ratio: float) -> float:
    """Best Chernoff exponent of one ReLU layer, sup_t t a/2 - log E exp(t ReLU(z)^2).

    The supremum is at u = (1-2t)^(-1/2) with 2 u^3 = a (u + 1). Near a = 1 it is (a-1)^2 / 10.

    Args:
        ratio: a, the level that rho exceeds (a > 1) or falls below (a < 1).

    Returns:
        The exponent per unit of width; absolute error about 1e-16.

    Raises:
        ValueError: If ratio is not positive and finite.

    References:
        Cramer-Chernoff; derived here.

    Example:
        >>> round(chernoff_rate(1.5), 6)
        0.019506
    """
    if fault := _positive(ratio=ratio):
        raise ValueError(fault)
    root = max(1.0, ratio)
    while (step := (2 * root**3 - ratio * (root + 1)) / (6 * root**2 - ratio)) > 1e-15 * root:
        root -= step  # convex and started above the root, so Newton's steps never overshoot
    return max(0.0, ratio * (1.0 - root**-2) / 4.0 - math.log1p((root - 1.0) / 2.0))


def tail_bound(width: int, deviation: float, samples: int = 1) -> float:
    """One-sided bound N exp(-m c) on P(some rho lies beyond 1 + deviation) after one layer.

    Args:
        width: m.
        deviation: eps for the upper tail, -eps for the lower; above -1.
        samples: N, fixed examples the statement is uniform over.

    Returns:
        A probability, at most 1.

    Raises:
        ValueError: If width or samples is not a count, or deviation is not above -1.

    References:
        Derived here; see `tail_rate`.

    Example:
        >>> round(tail_bound(100, 0.5), 4), round(tail_bound(100, -0.5), 4)
        (0.1572, 0.0356)
    """
    if fault := _whole(width=width, samples=samples):
        raise ValueError(fault)
    return min(1.0, samples * math.exp(-width * tail_rate(deviation)))


def union_bound(width: int, epsilon: float, samples: int = 1) -> float:
    """Two-sided bound 2 N exp(-m c_up(eps)) on P(some |rho - 1| > eps) after one layer.

    Args:
        width: m.
        epsilon: eps, tolerance on the squared norm, in (0, 1).
        samples: N, fixed examples.

    Returns:
        A probability, at most 1.

    Raises:
        ValueError: If width or samples is not a count, or epsilon is outside (0, 1).

    References:
        Union bound over both tails, as c_low >= c_up; derived here.
    """
    if fault := _whole(width=width, samples=samples) or _inside_unit(epsilon=epsilon):
        raise ValueError(fault)
    return min(1.0, 2.0 * samples * math.exp(-width * _rate(epsilon)))


# --- Many layers: explicit bounds -----------------------------------------------------------------


def layer_tolerance(epsilon: float, depth: int) -> float:
    """Share of one layer in a tolerance, eps_l = (1+eps)^(1/L) - 1.

    Args:
        epsilon: eps, in (0, 1).
        depth: L.

    Returns:
        eps_l; L layers inside 1 +- eps_l stay inside 1 +- eps.

    Raises:
        ValueError: If epsilon is outside (0, 1) or depth is not a count.

    References:
        Derived here.
    """
    if fault := _inside_unit(epsilon=epsilon) or _whole(depth=depth):
        raise ValueError(fault)
    return math.expm1(math.log1p(epsilon) / depth)


def union_width(epsilon: float, depth: int, samples: int, delta: float) -> int:
    """Width that keeps all norms, by splitting eps: m >= log(2NL/delta) / c_up(eps_l).

    Explicit and sound but vacuous at realistic sizes: eps_l ~ eps/L, so m grows like L^2/eps^2 (two
    million units for 10 % at L = 10, N = 50 000). Never advise a width from it; see
    `width_for_stability`.

    Args:
        epsilon: eps, tolerance on the squared norm, in (0, 1).
        depth: L, fan-out He ReLU layers.
        samples: N, fixed examples.
        delta: Failure probability, in (0, 1).

    Returns:
        Units per layer such that every ||h_l||^2 is within (1 +- eps) ||x||^2.

    Raises:
        ValueError: If epsilon or delta is outside (0, 1), or depth or samples is not a count.

    References:
        Derived here, for the claim of Arpit & Bengio 2019, arXiv:1901.03611, abstract.

    Example:
        >>> union_width(0.1, 1, 1, 0.05)
        4152
    """
    if fault := _inside_unit(epsilon=epsilon, delta=delta) or _whole(depth=depth, samples=samples):
        raise ValueError(fault)
    rate = _rate(layer_tolerance(epsilon, depth))
    return math.ceil(math.log(2.0 * samples * depth / delta) / rate)


def _log_sum_exp(terms: Vector) -> float:
    top = float(terms.max())
    return top + math.log(float(np.exp(terms - top).sum()))


def _log_binomial(width: int) -> Vector:
    counts = np.arange(1, width + 1)
    logs = np.concatenate([[0.0], np.cumsum(np.log((width + 1 - counts) / counts))])
    return np.asarray(logs - width * math.log(2.0))


def _log_gamma_ratio(first: int, last: int, order: float) -> Vector:
    """Give log Gamma(k/2 + order) / Gamma(k/2) for k = first..last."""
    steps = np.log1p(order / (np.arange(first, last + 1) / 2.0))
    ratios = np.empty_like(steps)
    for offset in range(min(2, len(steps))):
        # Gamma(x + 1) = x Gamma(x) turns the ratio into a running sum over every other k.
        start = (first + offset) / 2.0
        ratios[offset] = math.lgamma(start + order) - math.lgamma(start)
        ratios[offset + 2 :: 2] = ratios[offset] + np.cumsum(steps[offset:-2:2])
    return ratios


def _log_moment(width: int, lowest: int = 1) -> Callable[[float], float]:
    """Give s -> log E[rho^s; K >= lowest], K the number of active units."""
    log_weights = _log_binomial(width)[lowest:]

    def log_moment(order: float) -> float:
        terms = log_weights + _log_gamma_ratio(lowest, width, order)
        return order * math.log(4.0 / width) + _log_sum_exp(terms)

    return log_moment


def ratio_moment(width: int, order: float) -> float:
    """Moment E rho^s of one fan-out He ReLU layer.

    (4/m)^s sum_k Binom(m,k) 2^(-m) Gamma(k/2+s) / Gamma(k/2), summed by log-sum-exp.

    Args:
        width: m.
        order: s, positive.

    Returns:
        The moment; 1 at s = 1, 1 + 5/m at s = 2.

    Raises:
        ValueError: If width is not a count or order is not positive.

    References:
        Derived here.

    Example:
        >>> round(ratio_moment(64, 2.0), 9)
        1.078125
    """
    if fault := _whole(width=width) or _positive(order=order):
        raise ValueError(fault)
    return math.exp(_log_moment(width)(order))


def _minimum(function: Callable[[float], float], low: float, high: float) -> tuple[float, float]:
    """Find (argument, value) of the minimum of a unimodal function by golden section."""
    golden = (math.sqrt(5.0) - 1.0) / 2.0
    left, right = high - golden * (high - low), low + golden * (high - low)
    at_left, at_right = function(left), function(right)
    for _ in range(40):  # leaves 1e-8 of the interval, where the value is flat to 1e-16
        if at_left < at_right:
            high, right, at_right = right, left, at_left
            left = high - golden * (high - low)
            at_left = function(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + golden * (high - low)
            at_right = function(right)
    return (left, at_left) if at_left < at_right else (right, at_right)


def upper_tail_bound(widths: Sequence[int], threshold: float) -> float:
    """Bound on P(max_l R_l >= a) for fan-out He ReLU layers, inf_(s>=1) a^(-s) prod E rho_l^s.

    The factors are independent and R_l is a martingale of mean 1, so Doob's inequality covers all
    layers at once, without splitting eps.

    Args:
        widths: m_1..m_L.
        threshold: a, above 1.

    Returns:
        A probability for one fixed example, at most 1; multiply by N for N examples.

    Raises:
        ValueError: If a width is not a count or threshold is not above 1.

    References:
        Doob's maximal inequality; derived here.

    Example:
        >>> round(upper_tail_bound([256] * 10, 1.5), 4)
        0.5201
    """
    above_one = _fault({"threshold": threshold}, lambda v: 1 < v < math.inf, "lie in (1, inf)")
    if fault := _layers(widths) or above_one:
        raise ValueError(fault)
    layers = [(count, _log_moment(width)) for width, count in Counter(widths).items()]

    def exponent(order: float) -> float:
        log_moments = sum(count * log_moment(order) for count, log_moment in layers)
        return log_moments - order * math.log(threshold)

    high = 2.0
    while exponent(2.0 * high) < exponent(high):
        high *= 2.0
    return min(1.0, math.exp(_minimum(exponent, 1.0, 2.0 * high)[1]))


def lower_tail_bound(widths: Sequence[int], threshold: float) -> float:
    """Bound on P(min_l R_l <= b) for fan-out He ReLU layers.

    sum_l P(K_l <= k0) + inf_s b^s prod E[rho_l^(-s) | K_l > k0], k0 = floor(m_l/4), 0 < s < k0/2,
    with K_l ~ Binomial(m_l, 1/2) active units: without the conditioning E rho^(-s) is infinite.

    Args:
        widths: m_1..m_L, each at least 4 so that k0 >= 1.
        threshold: b, in (0, 1).

    Returns:
        A probability for one fixed example, at most 1; multiply by N for N examples.

    Raises:
        ValueError: If a width is not a whole number of at least 4, threshold is outside (0, 1), or
            a conditional moment is below 1, where Doob's inequality does not apply.

    References:
        Doob's maximal inequality; derived here.

    Example:
        >>> round(lower_tail_bound([256] * 10, 0.5), 4)
        0.4186
    """
    if fault := _layers(widths, least=4) or _inside_unit(threshold=threshold):
        raise ValueError(fault)
    layers = Counter(widths)
    dead = {
        width: math.exp(_log_sum_exp(_log_binomial(width)[: width // 4 + 1])) for width in layers
    }
    partial = {width: _log_moment(width, width // 4 + 1) for width in layers}

    def log_moment(width: int, order: float) -> float:
        return partial[width](-order) - math.log1p(-dead[width])

    def exponent(order: float) -> float:
        log_moments = sum(count * log_moment(width, order) for width, count in layers.items())
        return log_moments + order * math.log(threshold)

    order, value = _minimum(exponent, 0.0, min(width // 4 for width in layers) / 2.0)
    if (least := min(log_moment(width, order) for width in layers)) < -1e-9:
        raise ValueError(
            f"widths must give E[rho^(-s) | K > k0] >= 1, got {math.exp(least)} at s = {order}; "
            "use wider layers"
        )
    failures = sum(count * dead[width] for width, count in layers.items())
    return min(1.0, failures + math.exp(value))


def _smallest(holds: Callable[[int], bool], least: int, guess: int) -> int:
    """Find the smallest number of at least `least` that holds, for a statement that stays true."""
    low, high = least - 1, max(least, guess)
    while not holds(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def martingale_width(epsilon: float, depth: int, samples: int, delta: float) -> int:
    """Width that keeps all norms, by Doob: N (upper tail at 1+eps + lower at 1-eps) <= delta.

    About 13 times below `union_width` at L = 10 and 5 to 25 % below 10 L log(2N/delta) /
    log(1+eps)^2, what a normal law would ask. Still vacuous at realistic sizes (152 000 units for
    10 % at L = 10, N = 50 000): never advise a width from it; see `width_for_stability`.

    Args:
        epsilon: eps, tolerance on the squared norm, in (0, 1).
        depth: L, fan-out He ReLU layers.
        samples: N, fixed examples.
        delta: Failure probability, in (0, 1).

    Returns:
        Units per layer, at least 4; takes seconds when the answer is above 1e5.

    Raises:
        ValueError: If epsilon or delta is outside (0, 1), or depth or samples is not a count.

    References:
        Derived here.

    Example:
        >>> martingale_width(0.5, 3, 1437, 0.05)
        1737
    """
    if fault := _inside_unit(epsilon=epsilon, delta=delta) or _whole(depth=depth, samples=samples):
        raise ValueError(fault)
    limit = delta / samples

    def enough(width: int) -> bool:
        upper = upper_tail_bound([width] * depth, 1.0 + epsilon)
        return upper <= limit and upper + lower_tail_bound([width] * depth, 1.0 - epsilon) <= limit

    normal = 10.0 * depth * math.log(2.0 / limit) / math.log1p(epsilon) ** 2
    return _smallest(enough, 4, math.ceil(normal))


# --- Many layers: the practical law ---------------------------------------------------------------


def norm_variance(widths: Sequence[int], kappas: Sequence[float]) -> float:
    """Variance of the log squared norm, V = sum_l kappa_l / m_l.

    Args:
        widths: m_1..m_L.
        kappas: kappa of the activation of each layer (5 for ReLU), see `ActivationLaw`.

    Returns:
        V; a norm (not squared) has log standard deviation sqrt(V) / 2 between initialisations.

    Raises:
        ValueError: If the lengths differ or are 0, a width is not a count, or a kappa is negative.

    References:
        Derived here; the sum of 1/m_l is that of Hanin & Rolnick 2018, arXiv:1803.01719.

    Example:
        >>> norm_variance([64, 512, 128, 1024], [5.0] * 4)
        0.1318359375
    """
    if fault := _layers_with_kappas(widths, kappas):
        raise ValueError(fault)
    return sum(kappa / width for width, kappa in zip(widths, kappas, strict=True))


def ratio_variance(widths: Sequence[int], kappas: Sequence[float]) -> float:
    """Exact variance of the squared norm ratio, Var R_L = prod(1 + kappa_l/m_l) - 1.

    Args:
        widths: m_1..m_L.
        kappas: kappa of each layer; exact if the activations are homogeneous.

    Returns:
        The variance; the mean of R_L is 1.

    Raises:
        ValueError: If the lengths differ or are 0, a width is not a count, or a kappa is negative.

    References:
        Derived here.

    Example:
        >>> round(ratio_variance([100, 100], [5.0, 5.0]), 4)
        0.1025
    """
    if fault := _layers_with_kappas(widths, kappas):
        raise ValueError(fault)
    logs = (math.log1p(kappa / width) for width, kappa in zip(widths, kappas, strict=True))
    return math.expm1(sum(logs))


def log_ratio_moments(variance: float) -> Moments:
    """Normal law of log R_L: mean -V/2, variance V.

    Deep narrow networks typically shrink, although the mean of R_L is 1: the median of the norm
    ratio is exp(-V/4). Test logarithms, not means.

    Args:
        variance: V of `norm_variance`.

    Returns:
        Mean and variance of the logarithm of the squared norm ratio.

    Raises:
        ValueError: If variance is negative or not finite.

    References:
        Derived here; asymptotic in the widths.
    """
    if fault := _not_negative(variance=variance):
        raise ValueError(fault)
    return Moments(-variance / 2.0, variance)


def z_score(log_factor: float, variance: float) -> float:
    """Deviation of a measured squared norm ratio from its law, z = (log R + V/2) / sqrt(V).

    Args:
        log_factor: log R, natural logarithm of the squared norm ratio over the expected factor.
        variance: V of `norm_variance`, positive.

    Returns:
        z, close to standard normal; P(|z| > 4) is about 2e-4 at six layers of 64 units.

    Raises:
        ValueError: If variance is not positive and finite.

    References:
        Derived here.

    Example:
        >>> round(z_score(math.log(0.25), 0.5), 4)
        -1.607
    """
    if fault := _positive(variance=variance):
        raise ValueError(fault)
    return (log_factor + variance / 2.0) / math.sqrt(variance)


def width_for_stability(depth: int, tau: float, kappa: float = 5.0) -> int:
    """Width at which V = kappa L / m is tau^2: m >= kappa L / tau^2.

    Args:
        depth: L.
        tau: Standard deviation allowed to the log squared norm; norms then vary by e^(tau/2).
        kappa: kappa of the activation, 5 for ReLU.

    Returns:
        Units per layer.

    Raises:
        ValueError: If depth is not a count, or tau or kappa is not positive.

    References:
        Derived here.

    Example:
        >>> width_for_stability(10, 0.5)
        200
    """
    if fault := _whole(depth=depth) or _positive(tau=tau, kappa=kappa):
        raise ValueError(fault)
    # A rounding error in the last digit must not cost a unit.
    return math.ceil(kappa * depth / tau**2 * (1.0 - 1e-12))


# --- Activations ----------------------------------------------------------------------------------


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
    return _fault({"negative_slope": negative_slope}, math.isfinite, "be finite")


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
    if fault := _activation_fault(name, negative_slope) or _not_negative(mean_square=mean_square):
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


# --- Initialisations ------------------------------------------------------------------------------


def mean_square_factor(weight_variance: float, fan_in: int, second_moment: float) -> float:
    """Expected factor of the mean square over one layer, E q_l / q_(l-1) = n sigma^2 m2.

    Args:
        weight_variance: sigma^2 of one weight.
        fan_in: n, inputs of one unit.
        second_moment: m2; for a curved phi at pre-activation variance v = n sigma^2 q_(l-1), use
            `activation_second_moment(name, v) / v`.

    Returns:
        The factor; 1 for fan-in He, 1/6 for PyTorch's default and ReLU.

    Raises:
        ValueError: If a variance or moment is negative or not finite, or fan_in is not a count.

    References:
        He et al. 2015, arXiv:1502.01852, the forward argument.

    Example:
        >>> mean_square_factor(2 / 512, 512, 0.5)
        1.0
    """
    variances = _not_negative(weight_variance=weight_variance, second_moment=second_moment)
    if fault := variances or _whole(fan_in=fan_in):
        raise ValueError(fault)
    return fan_in * weight_variance * second_moment


def squared_norm_factor(weight_variance: float, width: int, second_moment: float) -> float:
    """Expected factor of the squared norm over one layer, E rho = m sigma^2 m2.

    Args:
        weight_variance: sigma^2 of one weight.
        width: m, units of the layer.
        second_moment: m2, as in `mean_square_factor`.

    Returns:
        The factor; 1 for fan-out He, m/n for fan-in He.

    Raises:
        ValueError: If a variance or moment is negative or not finite, or width is not a count.

    References:
        Derived here.
    """
    variances = _not_negative(weight_variance=weight_variance, second_moment=second_moment)
    if fault := variances or _whole(width=width):
        raise ValueError(fault)
    return width * weight_variance * second_moment


def he_variance_fan_in(fan_in: int) -> float:
    """Weight variance 2/n that preserves the mean square q through ReLU.

    Args:
        fan_in: n, inputs of one unit.

    Returns:
        Variance of one weight, the default of PyTorch's `kaiming_normal_`.

    Raises:
        ValueError: If fan_in is not a count.

    References:
        He et al. 2015, arXiv:1502.01852.
    """
    if fault := _whole(fan_in=fan_in):
        raise ValueError(fault)
    return 2.0 / fan_in


def he_variance_fan_out(fan_out: int) -> float:
    """Weight variance 2/m that preserves the squared norm ||h||^2 through ReLU.

    Args:
        fan_out: m, units of the layer.

    Returns:
        Variance of one weight.

    Raises:
        ValueError: If fan_out is not a count.

    References:
        Arpit & Bengio 2019, arXiv:1901.03611, the authors' experiment scripts.
    """
    if fault := _whole(fan_out=fan_out):
        raise ValueError(fault)
    return 2.0 / fan_out


def default_variance(fan_in: int) -> float:
    """Weight variance 1/(3n) of a freshly built PyTorch Linear or Conv.

    With ReLU the mean square q shrinks by 1/6 per layer, down to `bias_noise_floor`.

    Args:
        fan_in: n, inputs of one unit.

    Returns:
        Variance of one weight under `kaiming_uniform_(a=sqrt(5))`.

    Raises:
        ValueError: If fan_in is not a count.

    References:
        PyTorch, `torch.nn.Linear.reset_parameters`; derived here.
    """
    if fault := _whole(fan_in=fan_in):
        raise ValueError(fault)
    return 1.0 / (3.0 * fan_in)


def bias_noise_floor(fan_in: int) -> float:
    """Mean square q* = 1/(5n) at which PyTorch's default ReLU layers settle.

    Biases of variance 1/(3n) feed what the weights lose: q = (q + 1/n) / 6.

    Args:
        fan_in: n, inputs of one unit.

    Returns:
        The fixed point of the mean square.

    Raises:
        ValueError: If fan_in is not a count.

    References:
        Derived here.

    Example:
        >>> bias_noise_floor(100)
        0.002
    """
    if fault := _whole(fan_in=fan_in):
        raise ValueError(fault)
    return 1.0 / (5.0 * fan_in)


# --- Dropout, residual branches, padding ----------------------------------------------------------


def dropout_factor(p: float) -> float:
    """Expected factor 1/(1-p) of the squared norm under inverted dropout.

    Multiplying sigma^2 of the layer by 1-p undoes it.

    Args:
        p: Probability that a unit is dropped, in [0, 1).

    Returns:
        The factor; its variance is in `layer_moments`.

    Raises:
        ValueError: If p is outside [0, 1).

    References:
        Derived here.
    """
    if fault := _dropout(p=p):
        raise ValueError(fault)
    return 1.0 / (1.0 - p)


def largest_dropout(depth: int, growth: float = 2.0) -> float:
    """Largest dropout that keeps prod 1/(1-p) below G: p <= 1 - G^(-1/L).

    Args:
        depth: L, layers with dropout and no normalisation.
        growth: G, allowed factor of the squared norm, above 1.

    Returns:
        p.

    Raises:
        ValueError: If depth is not a count or growth is not above 1.

    References:
        Derived here.

    Example:
        >>> round(largest_dropout(12), 4)
        0.0561
    """
    above_one = _fault({"growth": growth}, lambda v: 1 < v < math.inf, "lie in (1, inf)")
    if fault := _whole(depth=depth) or above_one:
        raise ValueError(fault)
    return -math.expm1(-math.log(growth) / depth)


def residual_factor(alpha: float, branch_ratio: float = 1.0, depth: int = 1) -> float:
    """Expected factor (1 + alpha^2 f)^L of the squared norm over L blocks h <- h + alpha F(h).

    Args:
        alpha: Scale of the branch.
        branch_ratio: f = E ||F(h)||^2 / ||h||^2, 1 if the branch preserves the norm.
        depth: L, residual blocks; 1 for the factor per block.

    Returns:
        The factor, if the last layer of F has a sign-symmetric law.

    Raises:
        ValueError: If alpha is not finite, branch_ratio is negative or not finite, or depth is no
            count.

    References:
        Derived here.

    Example:
        >>> residual_factor(1.0, depth=10)
        1024.0
    """
    finite = _fault({"alpha": alpha}, math.isfinite, "be finite")
    if fault := finite or _not_negative(branch_ratio=branch_ratio) or _whole(depth=depth):
        raise ValueError(fault)
    return (1.0 + alpha**2 * branch_ratio) ** depth


def padding_profile(
    profile: Vector, kernel: int, padding: int, stride: int = 1, dilation: int = 1
) -> Vector:
    """Mean square along one dimension after a zero-padded convolution that preserves the rest.

    Each output is the mean of the kernel's taps, those outside the map counting 0. Zeros weaken the
    edges, and weak edges lose less: repeat this once per layer for the factor of a stack. The
    L-th power of `padding_factor` is too small (0.175 instead of 0.353 for ten 3x3 layers at 8x8).

    Args:
        profile: (size,), mean square at each position.
        kernel: Taps of the kernel.
        padding: Zeros on either side.
        stride: Step between outputs.
        dilation: Step between taps.

    Returns:
        (outputs,), mean square at each output position; the dimensions of a map multiply.

    Raises:
        ValueError: If profile is not a vector, kernel, stride or dilation is not a count, padding
            is not a whole number of at least 0, or the kernel does not fit.

    References:
        Derived here.

    Example:
        >>> padding_profile(np.array([3.0, 3.0, 3.0]), 3, 1).tolist()
        [2.0, 3.0, 2.0]
    """
    counts = _whole(kernel=kernel, stride=stride, dilation=dilation) or _whole(0, padding=padding)
    shape = "" if profile.ndim == 1 else f"profile must have shape (size,), got {profile.shape}"
    if fault := counts or shape:
        raise ValueError(fault)
    last_start = len(profile) + padding - dilation * (kernel - 1) - 1
    starts = np.arange(-padding, last_start + 1, stride)
    if not (len(profile) and len(starts)):
        raise ValueError(
            f"kernel must fit into the padded map, got kernel {kernel}, dilation {dilation}, "
            f"size {len(profile)}, padding {padding}"
        )
    taps = starts[:, None] + dilation * np.arange(kernel)
    inside = (taps >= 0) & (taps < len(profile))
    values = np.where(inside, profile[np.where(inside, taps, 0)], 0.0)
    return np.asarray(values.mean(axis=1))


def padding_factor(
    size: int, kernel: int, padding: int, stride: int = 1, dilation: int = 1
) -> float:
    """Share of kernel taps inside the map, the factor of q by zero padding in one dimension.

    (3H-2)/(3H) for kernel 3, padding 1, stride 1; multiply over the dimensions of the map. It holds
    for one layer on a uniform map; see `padding_profile` for a stack.

    Args:
        size: H, positions of the map in this dimension.
        kernel: Taps of the kernel.
        padding: Zeros on either side.
        stride: Step between outputs.
        dilation: Step between taps.

    Returns:
        The mean share, in [0, 1].

    Raises:
        ValueError: If size, kernel, stride or dilation is not a count, padding is not a whole
            number of at least 0, or the kernel does not fit.

    References:
        Derived here.

    Example:
        >>> padding_factor(8, 3, 1) == 22 / 24
        True
    """
    if fault := _whole(size=size):
        raise ValueError(fault)
    return float(padding_profile(np.ones(size), kernel, padding, stride, dilation).mean())


# --- Gradients ------------------------------------------------------------------------------------


def weight_gradient_norm(inputs: Vector, errors: Vector) -> float:
    """Norm of the weight gradient of one example, ||dl/dW||_F = ||h|| ||delta||, exactly.

    With T positions that share the weight it is ||sum_t delta_t h_t^T||_F =
    sqrt(sum((H H^T) * (D D^T))). The gradient of a batch is not such a product.

    Args:
        inputs: h, (n,) or (T, n), input of the layer.
        errors: delta, (m,) or (T, m), derivative of the example's own loss with respect to the
            pre-activation.

    Returns:
        The Frobenius norm, in the unit of loss over weight.

    Raises:
        ValueError: If an array has more than two dimensions or the numbers of positions differ.

    References:
        Arpit & Bengio 2019, arXiv:1901.03611, abstract, for its use; identity derived here.

    Example:
        >>> weight_gradient_norm(np.array([3.0, 4.0]), np.array([0.0, 2.0]))
        10.0
    """
    h, delta = np.atleast_2d(inputs).astype(float), np.atleast_2d(errors).astype(float)
    if h.ndim != 2 or delta.ndim != 2 or len(h) != len(delta):
        raise ValueError(
            "inputs and errors must be (n,) and (m,) or (T, n) and (T, m), "
            f"got {np.shape(inputs)} and {np.shape(errors)}"
        )
    return math.sqrt(max(0.0, float(np.sum((h @ h.T) * (delta @ delta.T)))))


def gradient_factor(depth: int, layer: int, alignment: float, width: int) -> float:
    """Expected E ||delta_l||^2 / ||delta_L||^2 = 1 + (L-l) (c2 - 2/m), to first order.

    a_l . delta_l is conserved along the depth, so an error aligned with the last activation grows
    towards the input. By the claim of the paper, ||dl/dW_l|| = ||x|| ||delta_L||, it is 1.

    Args:
        depth: L, bias-free fan-out He ReLU layers of equal width.
        layer: l, from 1 to L.
        alignment: c2, squared cosine of the angle between h_L and delta_L; 2/m if unaligned.
        width: m.

    Returns:
        The factor of the squared gradient norm.

    Raises:
        ValueError: If depth, layer or width is not a count, layer is above depth, alignment is
            outside [0, 1], or the first-order form is not positive (too deep for the width).

    References:
        Derived here, for the claim of Arpit & Bengio 2019, arXiv:1901.03611, abstract.

    Example:
        >>> round(gradient_factor(10, 5, 0.082, 100), 3)
        1.31
    """
    counts = _whole(depth=depth, layer=layer, width=width)
    counts = counts or _fault({"layer": layer}, lambda v: v <= depth, f"be at most depth {depth}")
    if fault := counts or _fault({"alignment": alignment}, lambda v: 0 <= v <= 1, "lie in [0, 1]"):
        raise ValueError(fault)
    factor = 1.0 + (depth - layer) * (alignment - 2.0 / width)
    if factor <= 0.0:
        raise ValueError(
            f"width must be large against depth for the first-order form, got {width} and {depth}"
        )
    return factor


def gradient_log_variance(depth: int, width: int) -> float:
    """Variance of the log squared weight gradient, about 5 (L-1) / m at every layer.

    Args:
        depth: L, fan-out He ReLU layers of equal width.
        width: m.

    Returns:
        The variance between initialisations.

    Raises:
        ValueError: If depth or width is not a count.

    References:
        Derived here.

    Example:
        >>> gradient_log_variance(11, 100)
        0.5
    """
    if fault := _whole(depth=depth, width=width):
        raise ValueError(fault)
    return 5.0 * (depth - 1) / width


# --- Infinitely many inputs -----------------------------------------------------------------------


def _tolerance_at_rate(rate: float) -> float:
    """Solve c_up(eps) = rate."""
    epsilon = math.sqrt(32.0 * rate / 3.0)
    for _ in range(50):  # convex: one step overshoots, the others descend on the solution
        root = math.sqrt(1.0 + epsilon)
        slope = epsilon * (root + 2.0) / (4.0 * root * (1.0 + root) ** 2)
        epsilon -= (_rate(epsilon) - rate) / slope
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
    if fault := _whole(width=width, dimension=dimension) or _inside_unit(delta=delta):
        raise ValueError(fault)

    def bounds(mesh: float) -> NormBounds:
        points = math.log(2.0) + dimension * math.log1p(2.0 / mesh)
        epsilon = _tolerance_at_rate((points + math.log(2.0 / delta)) / width)
        slack = math.sqrt(2.0 * (1.0 + epsilon)) / (1.0 - mesh) * mesh
        lower = math.sqrt(max(0.0, 1.0 - epsilon)) - slack
        return NormBounds(max(0.0, lower), math.sqrt(1.0 + epsilon) + slack)

    log_mesh = _minimum(lambda t: bounds(math.exp(t)).upper, math.log(1e-9), math.log(0.9))[0]
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
    if fault := _inside_unit(epsilon=epsilon, delta=delta) or _whole(dimension=dimension):
        raise ValueError(fault)

    def enough(width: int) -> bool:
        lower, upper = subspace_bounds(width, dimension, delta)
        return upper**2 <= 1.0 + epsilon and lower**2 >= 1.0 - epsilon

    return _smallest(enough, 1, math.ceil(10.0 * dimension / epsilon**2))

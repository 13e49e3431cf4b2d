"""Many layers: explicit bounds on the tails, and the widths that they ask for.

Sound, and vacuous at realistic sizes; `chain` has the law to use in practice.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from gradwatch.theory.argument import fault_in, inside_unit, positive, whole
from gradwatch.theory.norm_preservation.argument import layer_widths
from gradwatch.theory.norm_preservation.one_layer import tail_exponent
from gradwatch.theory.norm_preservation.vector import Vector


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
    if fault := inside_unit(epsilon=epsilon) or whole(depth=depth):
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
    if fault := inside_unit(epsilon=epsilon, delta=delta) or whole(depth=depth, samples=samples):
        raise ValueError(fault)
    rate = tail_exponent(layer_tolerance(epsilon, depth))
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
    if fault := whole(width=width) or positive(order=order):
        raise ValueError(fault)
    return math.exp(_log_moment(width)(order))


def minimum(function: Callable[[float], float], low: float, high: float) -> tuple[float, float]:
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
    above_one = fault_in({"threshold": threshold}, lambda v: 1 < v < math.inf, "lie in (1, inf)")
    if fault := layer_widths(widths) or above_one:
        raise ValueError(fault)
    layers = [(count, _log_moment(width)) for width, count in Counter(widths).items()]

    def exponent(order: float) -> float:
        log_moments = sum(count * log_moment(order) for count, log_moment in layers)
        return log_moments - order * math.log(threshold)

    high = 2.0
    while exponent(2.0 * high) < exponent(high):
        high *= 2.0
    return min(1.0, math.exp(minimum(exponent, 1.0, 2.0 * high)[1]))


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
    if fault := layer_widths(widths, least=4) or inside_unit(threshold=threshold):
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

    order, value = minimum(exponent, 0.0, min(width // 4 for width in layers) / 2.0)
    if (least := min(log_moment(width, order) for width in layers)) < -1e-9:
        raise ValueError(
            f"widths must give E[rho^(-s) | K > k0] >= 1, got {math.exp(least)} at s = {order}; "
            "use wider layers"
        )
    failures = sum(count * dead[width] for width, count in layers.items())
    return min(1.0, failures + math.exp(value))


def smallest(holds: Callable[[int], bool], least: int, guess: int) -> int:
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
    if fault := inside_unit(epsilon=epsilon, delta=delta) or whole(depth=depth, samples=samples):
        raise ValueError(fault)
    limit = delta / samples

    def enough(width: int) -> bool:
        upper = upper_tail_bound([width] * depth, 1.0 + epsilon)
        return upper <= limit and upper + lower_tail_bound([width] * depth, 1.0 - epsilon) <= limit

    normal = 10.0 * depth * math.log(2.0 / limit) / math.log1p(epsilon) ** 2
    return smallest(enough, 4, math.ceil(normal))

"""Norm preservation: reference values, brute-force checks, properties and errors.

Reference numbers were computed independently in float64 (or with 80 digits where said) and are
copied here; everything else is checked against brute force.
"""

import itertools
import math
from collections.abc import Callable
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradwatch.theory import norm_preservation as theory
from gradwatch.theory.norm_preservation import depth_bound

EXACT = 1e-12
NAMES = ("relu", "leaky_relu", "gelu", "gelu_tanh", "silu", "tanh", "elu", "identity")

widths = st.integers(min_value=1, max_value=4000)
depths = st.integers(min_value=1, max_value=40)
tolerances = st.floats(min_value=0.01, max_value=0.99)


# --- Reference values --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("deviation", "rate", "relative"),
    [
        (1e-6, 9.374994791670085e-14, 1e-8),  # 80-digit arithmetic
        (0.01, 9.323256021254861e-06, 1e-9),
        (0.1, 0.0008886059575062034, 1e-11),
        (0.25, 0.005158885941080278, EXACT),
        (0.5, 0.018504936059329125, EXACT),
        (1.0, 0.061773593540402266, EXACT),
        (2.0, 0.1880946418175643, EXACT),
        (-0.01, 9.427427610095556e-06, 1e-9),
        (-0.1, 0.0009932678249013269, 1e-11),
        (-0.5, 0.03334718382037494, EXACT),
        (-0.9, 0.19337728815159996, EXACT),
    ],
)
def test_tail_rate(deviation: float, rate: float, relative: float) -> None:
    assert theory.tail_rate(deviation) == pytest.approx(rate, rel=relative, abs=0)


@pytest.mark.parametrize(
    ("ratio", "rate"),
    [(1.1, 0.00094507868674), (0.9, 0.00106301700944), (1.5, 0.01950578074706)],
)
def test_chernoff_rate(ratio: float, rate: float) -> None:
    assert theory.chernoff_rate(ratio) == pytest.approx(rate, abs=1e-13)


@pytest.mark.parametrize(
    ("epsilon", "depth", "share"),
    [(0.1, 10, 0.009576582776887025), (0.5, 4, 0.10668191970032159)],
)
def test_layer_tolerance(epsilon: float, depth: int, share: float) -> None:
    assert theory.layer_tolerance(epsilon, depth) == pytest.approx(share, rel=EXACT)


@pytest.mark.parametrize(
    ("epsilon", "depth", "samples", "delta", "width"),
    [
        (0.1, 1, 1, 0.05, 4152),
        (0.1, 10, 1000, 0.05, 1508250),
        (0.1, 10, 50000, 0.05, 1965666),
        (0.5, 10, 50000, 0.05, 107124),
        (0.5, 3, 1437, 0.05, 6629),
        (0.2, 5, 100, 0.01, 90873),
    ],
)
def test_union_width(epsilon: float, depth: int, samples: int, delta: float, width: int) -> None:
    assert theory.union_width(epsilon, depth, samples, delta) == width


@pytest.mark.parametrize(
    ("epsilon", "depth", "samples", "delta", "width"),
    [
        (0.1, 1, 1, 0.05, 3691),
        (0.5, 10, 50000, 0.05, 8143),
        (0.5, 3, 1437, 0.05, 1737),
        (0.2, 10, 1, 0.05, 9400),
        (0.2, 5, 100, 0.01, 13542),
        pytest.param(0.1, 10, 1000, 0.05, 109442, marks=pytest.mark.slow),
        pytest.param(0.1, 10, 50000, 0.05, 151595, marks=pytest.mark.slow),
    ],
)
def test_martingale_width(
    epsilon: float, depth: int, samples: int, delta: float, width: int
) -> None:
    assert theory.martingale_width(epsilon, depth, samples, delta) == pytest.approx(width, abs=1)


def test_martingale_width_starts_at_the_smallest_layer_with_a_lower_tail() -> None:
    failures = [
        theory.upper_tail_bound([m], 1.99) + theory.lower_tail_bound([m], 0.01) for m in (4, 5)
    ]
    assert failures[0] > 0.9 > failures[1]
    assert theory.martingale_width(0.99, 1, 1, 0.9) == 5
    assert theory.martingale_width(0.99, 1, 1, (failures[0] + 1) / 2) == 4


def test_martingale_width_is_the_normal_width_up_to_a_quarter_and_far_below_the_union_width() -> (
    None
):
    normal = 10 * 10 * math.log(2 / 0.05) / math.log(1.2) ** 2
    width = theory.martingale_width(0.2, 10, 1, 0.05)
    assert 0.75 * normal < width < 0.95 * normal
    assert 107124 / theory.martingale_width(0.5, 10, 50000, 0.05) == pytest.approx(13, abs=0.5)


@pytest.mark.parametrize(("order", "moment"), [(1, 1.0), (2, 1.078125), (3, 1.2451171875)])
def test_ratio_moment(order: float, moment: float) -> None:
    assert theory.ratio_moment(64, order) == pytest.approx(moment, rel=EXACT)


def test_martingale_tails() -> None:
    layers = [256] * 10
    assert theory.upper_tail_bound(layers, 1.5) == pytest.approx(0.520054, abs=1e-6)
    assert theory.lower_tail_bound(layers, 0.5) == pytest.approx(0.418552, abs=1e-6)


@pytest.mark.parametrize(
    ("layers", "variance"),
    [
        ([100] * 10, 0.628894626777442),
        ([256] * 4, 0.08044376620091498),
        ([64, 512, 128, 1024], 0.13670242973603308),
    ],
)
def test_ratio_variance(layers: list[int], variance: float) -> None:
    assert theory.ratio_variance(layers, [5.0] * len(layers)) == pytest.approx(variance, rel=EXACT)


@pytest.mark.parametrize(("width", "spread"), [(256, 0.44), (4096, 0.11)])
def test_norm_variance(width: int, spread: float) -> None:
    assert theory.norm_variance([64, 512, 128, 1024], [5.0] * 4) == 0.1318359375
    variance = theory.norm_variance([width] * 10, [5.0] * 10)
    assert math.sqrt(variance) == pytest.approx(spread, abs=0.005)
    assert theory.log_ratio_moments(variance) == (-25 / width, 50 / width)


@pytest.mark.parametrize(("ratio", "z"), [(0.25, -1.6069628963438), (0.01, -6.1591407434673)])
def test_z_score(ratio: float, z: float) -> None:
    assert theory.z_score(math.log(ratio), 0.5) == pytest.approx(z, rel=EXACT)


@pytest.mark.parametrize(
    ("name", "slope", "second", "gain_squared", "kappa", "homogeneous"),
    [
        ("relu", 0.01, 0.5, 2.0, 5.0, True),
        ("leaky_relu", 0.01, 0.50005, 1.999800, 4.99880, True),
        ("leaky_relu", 0.2, 0.52, 1.923077, 4.556213, True),
        ("gelu", 0.01, 0.4252214826, 2.351715614, 6.215614, False),
        ("gelu_tanh", 0.01, 0.4251937110, 2.351869216, 6.217834, False),
        ("silu", 0.01, 0.3557755198, 2.810761124, 6.261746, False),
        ("tanh", 0.01, 0.3942944904, 2.536175433, 0.627291, False),
        ("elu", 0.01, 0.6449454175, 1.550518808, 2.776022, False),
        ("identity", 0.01, 1.0, 1.0, 2.0, True),
    ],
)
def test_activation_law(
    name: str, slope: float, second: float, gain_squared: float, kappa: float, homogeneous: bool
) -> None:
    law = theory.activation_law(name, negative_slope=slope)
    assert law.name == name
    assert law.second_moment == pytest.approx(second, abs=6e-11)
    assert law.gain**2 == pytest.approx(gain_squared, abs=6e-7)
    assert law.kappa == pytest.approx(kappa, abs=6e-6)
    assert law.homogeneous is homogeneous


def test_known_activations_are_those_of_the_table() -> None:
    assert theory.known_activations() == NAMES


@pytest.mark.parametrize(
    ("epsilon", "dimension", "width"),
    [(0.5, 2, 946), (0.5, 10, 3634), (0.5, 784, 263168), (0.1, 10, 93696)],
)
def test_subspace_width(epsilon: float, dimension: int, width: int) -> None:
    # The reference used a coarse grid of meshes, so the true optimum is up to 0.1 % below it.
    found = theory.subspace_width(epsilon, dimension, 0.05)
    assert 0.999 * width <= found <= width


def test_subspace_bounds() -> None:
    assert theory.subspace_bounds(4096, 2, 0.05).upper ** 2 - 1 == pytest.approx(0.2354, abs=5e-5)


def test_default_initialisation_shrinks_by_a_sixth_down_to_the_bias_floor() -> None:
    factor = theory.mean_square_factor(theory.default_variance(512), 512, 0.5)
    assert factor**6 == pytest.approx(2.1433470507544573e-05, rel=EXACT)
    fan_in, q = 50, 1.0
    for _ in range(40):
        # ReLU halves; weights and biases have variance 1 / (3 fan_in).
        q = 0.5 * (fan_in * q / (3 * fan_in) + 1 / (3 * fan_in))
    assert theory.bias_noise_floor(fan_in) == pytest.approx(q, rel=EXACT)


@pytest.mark.parametrize(
    ("size", "ten_layers"),
    [(8, 0.17548046728482738), (32, 0.6563453476607141), (224, 0.9421294789254174)],
)
def test_padding_factor_of_one_layer_to_the_tenth_power(size: int, ten_layers: float) -> None:
    assert theory.padding_factor(size, 3, 1) ** 20 == pytest.approx(ten_layers, rel=EXACT)


def test_numbers_of_the_rules() -> None:
    assert theory.width_for_stability(10, 0.5) == 200
    assert theory.width_for_stability(10, 0.2) == 1250
    assert theory.width_for_stability(3, 0.3, kappa=6.0) == 200
    assert theory.largest_dropout(12) == pytest.approx(0.0561, abs=5e-5)
    assert theory.layer_moments(1, 0.5) == pytest.approx((2.0, 44.0))
    assert theory.layer_moments(100) == pytest.approx((1.0, 0.05))
    assert theory.dropout_factor(0.75) == 4.0
    assert theory.residual_factor(1.0) == 2.0
    assert theory.residual_factor(1.0, depth=10) == 1024.0
    assert theory.residual_factor(math.sqrt(0.1), depth=10) == pytest.approx(2.594, abs=5e-4)
    assert theory.residual_factor(0.1, depth=10) == pytest.approx(1.105, abs=5e-4)
    assert theory.residual_factor(0.5, branch_ratio=8.0) == 3.0
    assert theory.gradient_log_variance(11, 200) == 0.25


def test_gradient_factor() -> None:
    assert theory.gradient_factor(10, 10, 0.3, 100) == 1.0
    assert theory.gradient_factor(10, 1, 2 / 100, 100) == pytest.approx(1.0)
    assert theory.gradient_factor(10, 5, 0.0824, 100) == pytest.approx(1.312)
    assert theory.gradient_factor(10, 1, 0.0824, 100) == pytest.approx(1.5616)


# --- Brute force -------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 2, 7, 30])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_ratio_moment_against_exact_fractions(width: int, order: int) -> None:
    """E (chi2_k)^s = k (k+2) .. (k+2s-2) in exact arithmetic."""
    moment = (
        sum(
            Fraction(math.comb(width, k), 2**width) * math.prod(k + 2 * i for i in range(order))
            for k in range(width + 1)
        )
        * Fraction(2, width) ** order
    )
    assert theory.ratio_moment(width, order) == pytest.approx(float(moment), rel=EXACT)


def test_half_integer_moment_against_the_half_normal() -> None:
    """One unit: E rho^(1/2) = sqrt(4) E ReLU(z) / sqrt(2) = 1 / sqrt(pi)."""
    assert theory.ratio_moment(1, 0.5) == pytest.approx(1 / math.sqrt(math.pi), rel=EXACT)


def moment(width: int, order: float, lowest: int) -> float:
    """E[rho^s; K >= lowest] term by term."""
    terms = (
        math.comb(width, k) * math.exp(math.lgamma(k / 2 + order) - math.lgamma(k / 2))
        for k in range(lowest, width + 1)
    )
    return math.pow(4 / width, order) * math.fsum(terms) / 2.0**width


@pytest.mark.parametrize(
    ("layers", "threshold"), [([64], 0.9), ([16, 40], 0.4), ([7, 5], 0.1), ([64, 64, 200], 0.7)]
)
def test_martingale_tails_against_a_grid_of_orders(layers: list[int], threshold: float) -> None:
    orders = np.linspace(0, min(m // 4 for m in layers) / 2, 801)[1:-1]
    dead = [sum(math.comb(m, k) for k in range(m // 4 + 1)) / 2**m for m in layers]
    lower = sum(dead)
    lower += min(
        threshold**s
        * math.prod(moment(m, -s, m // 4 + 1) / (1 - p) for m, p in zip(layers, dead, strict=True))
        for s in orders
    )
    assert theory.lower_tail_bound(layers, threshold) == pytest.approx(lower, rel=1e-4)
    upper = min(
        threshold**s * math.prod(moment(m, s, 1) for m in layers) for s in np.linspace(1, 9, 801)
    )
    assert theory.upper_tail_bound(layers, 1 / threshold) == pytest.approx(upper, rel=1e-4)


def trapezoid(function: Callable[[np.ndarray], np.ndarray], low: float, high: float) -> float:
    grid = np.linspace(low, high, 400_001)
    values = function(grid)
    return float((values.sum() - (values[0] + values[-1]) / 2) * (grid[1] - grid[0]))


REFERENCE_ACTIVATIONS: dict[str, Callable[[float], float]] = {
    "relu": lambda a: max(a, 0.0),
    "leaky_relu": lambda a: a if a > 0 else 0.01 * a,
    "gelu": lambda a: a * 0.5 * (1 + math.erf(a / math.sqrt(2))),
    "gelu_tanh": lambda a: (
        0.5 * a * (1 + math.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3)))
    ),
    "silu": lambda a: a / (1 + math.exp(-a)),
    "tanh": math.tanh,
    "elu": lambda a: a if a > 0 else math.exp(a) - 1,
    "identity": lambda a: a,
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mean_square", [1e-4, 0.3, 1.0, 40.0])
def test_activation_second_moment_against_the_trapezoidal_rule(
    name: str, mean_square: float
) -> None:
    # The rule is exact to rounding for smooth integrands; each half is smooth up to the joint at 0,
    # whose error is h^2/12 times the jump of the slope, about 1e-9 here.
    phi, scale = np.vectorize(REFERENCE_ACTIVATIONS[name]), math.sqrt(mean_square)

    def integrand(z: np.ndarray) -> np.ndarray:
        density = np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
        return np.asarray(phi(scale * z) ** 2 * density)

    brute = trapezoid(integrand, -10.0, 10.0)
    found = theory.activation_second_moment(name, mean_square)
    assert found == pytest.approx(brute, rel=1e-8, abs=0)


def test_activation_second_moment_limits() -> None:
    """Small inputs see the slope at 0; large ones see ReLU, or the step of a saturated tanh."""
    for name, slope in (("gelu", 0.5), ("silu", 0.5), ("tanh", 1.0), ("elu", 1.0)):
        small = theory.activation_second_moment(name, 1e-12)
        assert small == pytest.approx(slope**2 * 1e-12, rel=1e-5, abs=0)
    for name in ("gelu", "gelu_tanh", "silu", "elu"):
        assert theory.activation_second_moment(name, 1e12) == pytest.approx(5e11, rel=1e-5)
    # E tanh(s z)^2 = 1 - sqrt(2/pi)/s + O(s^-3), as the integral of 1 - tanh^2 is 2.
    saturated = 1 - math.sqrt(2 / math.pi) / 1e6
    assert theory.activation_second_moment("tanh", 1e12) == pytest.approx(saturated, rel=1e-9)
    assert theory.activation_second_moment("gelu", 0.0) == 0.0


def test_relu_square_mgf_against_its_series() -> None:
    """E ReLU(z)^2 = 1/2 and E ReLU(z)^4 = 3/2."""
    t = 1e-3
    first, second = theory.relu_square_mgf(t), theory.relu_square_mgf(-t)
    assert (first - second) / (2 * t) == pytest.approx(0.5, rel=1e-4)
    assert (first + second - 2) / t**2 == pytest.approx(1.5, rel=1e-4)
    grid = trapezoid(
        lambda z: np.exp(0.2 * np.maximum(z, 0) ** 2 - z**2 / 2) / math.sqrt(2 * math.pi), -40, 40
    )
    assert theory.relu_square_mgf(0.2) == pytest.approx(grid, rel=1e-6)


@pytest.mark.parametrize("ratio", [0.05, 0.5, 0.99, 1.0, 1.01, 2.0, 20.0])
def test_chernoff_rate_is_the_supremum(ratio: float) -> None:
    t = np.concatenate([-np.geomspace(1e-7, 1e4, 400_001), 0.5 - np.geomspace(1e-7, 0.5, 400_001)])
    values = t * ratio / 2 - np.log(0.5 + 0.5 / np.sqrt(1 - 2 * t))
    assert theory.chernoff_rate(ratio) == pytest.approx(float(values.max()), abs=1e-8)
    assert theory.chernoff_rate(ratio) >= values.max() - 1e-15


def count_taps(size: int, kernel: int, padding: int, stride: int, dilation: int) -> float:
    shares = []
    start = -padding
    while start + dilation * (kernel - 1) < size + padding:
        inside = [0 <= start + dilation * tap < size for tap in range(kernel)]
        shares.append(sum(inside) / kernel)
        start += stride
    return sum(shares) / len(shares)


def test_padding_factor_by_counting() -> None:
    for size, kernel, padding, stride, dilation in itertools.product(
        (1, 5, 8), (1, 2, 3, 7), (0, 1, 3), (1, 2), (1, 2)
    ):
        if dilation * (kernel - 1) < size + 2 * padding:
            found = theory.padding_factor(size, kernel, padding, stride, dilation)
            assert found == pytest.approx(count_taps(size, kernel, padding, stride, dilation))
    for size in (2, 3, 8, 225):
        expected = (3 * size - 2) / (3 * size)
        assert theory.padding_factor(size, 3, 1) == pytest.approx(expected, rel=EXACT)


def test_padding_profile_of_a_stack_by_matrix_powers() -> None:
    share = (np.eye(8) + np.eye(8, k=1) + np.eye(8, k=-1)) / 3
    profile = np.ones(8)
    for _ in range(10):
        profile = theory.padding_profile(profile, 3, 1)
    expected = np.linalg.matrix_power(share, 10) @ np.ones(8)
    assert profile == pytest.approx(expected, rel=EXACT)
    # Twice the tenth power of one layer's factor, 0.1755.
    assert profile.mean() ** 2 == pytest.approx(0.35303, abs=1e-5)


def test_weight_gradient_norm_is_the_frobenius_norm() -> None:
    generator = np.random.default_rng(0)
    h, delta = generator.standard_normal((6, 4)), generator.standard_normal((6, 3))
    gradient = sum(np.outer(delta[t], h[t]) for t in range(6))
    assert theory.weight_gradient_norm(h, delta) == pytest.approx(np.linalg.norm(gradient))
    one = np.linalg.norm(h[0]) * np.linalg.norm(delta[0])
    assert theory.weight_gradient_norm(h[0], delta[0]) == pytest.approx(one)


@pytest.mark.parametrize(("width", "dimension"), [(4096, 2), (500, 3), (50, 10)])
def test_subspace_bounds_against_a_grid_of_meshes(width: int, dimension: int) -> None:
    uppers, lowers = [], []
    for mesh in np.geomspace(1e-4, 0.5, 2000):
        points = math.log(2) + dimension * math.log(1 + 2 / mesh) + math.log(2 / 0.05)
        low, high = 0.0, 100.0
        for _ in range(60):
            middle = (low + high) / 2
            rate = middle / 4 + math.log(2 / (1 + math.sqrt(1 + middle)))
            low, high = (low, middle) if width * rate > points else (middle, high)
        lip = math.sqrt(2 * (1 + low)) / (1 - mesh)
        uppers.append(math.sqrt(1 + low) + lip * mesh)
        lowers.append(max(0.0, math.sqrt(max(0.0, 1 - low)) - lip * mesh))
    best = int(np.argmin(uppers))
    lower, upper = theory.subspace_bounds(width, dimension, 0.05)
    assert upper == pytest.approx(uppers[best], rel=1e-5)
    assert lower == pytest.approx(lowers[best], rel=5e-3)
    # Any mesh gives a valid upper bound, so only the smallest is right.
    assert upper <= uppers[best] * (1 + 1e-9)


def test_variances_of_the_initialisations() -> None:
    assert theory.he_variance_fan_in(64) * 64 == theory.he_variance_fan_out(64) * 64 == 2.0
    assert theory.default_variance(64) * 64 == pytest.approx(1 / 3)
    # Fan-in He keeps q and scales the squared norm by m/n; fan-out He keeps the squared norm.
    assert theory.mean_square_factor(theory.he_variance_fan_in(64), 64, 0.5) == 1.0
    assert theory.squared_norm_factor(theory.he_variance_fan_in(64), 512, 0.5) == 8.0
    assert theory.squared_norm_factor(theory.he_variance_fan_out(512), 512, 0.5) == 1.0


def test_tail_bounds_of_one_layer() -> None:
    assert theory.tail_bound(100, 0.5) == pytest.approx(0.1572, abs=5e-5)
    assert theory.tail_bound(100, -0.5) == pytest.approx(0.0356, abs=5e-5)
    far = math.exp(-18.504936059329125)
    assert theory.tail_bound(1000, 0.5, samples=7) == pytest.approx(7 * far, abs=0)
    assert theory.union_bound(1000, 0.5, samples=7) == pytest.approx(14 * far, abs=0)


# --- Properties --------------------------------------------------------------------------------


@given(tolerances)
def test_lower_rate_is_above_the_upper_and_both_below_the_best(epsilon: float) -> None:
    upper, lower = theory.tail_rate(epsilon), theory.tail_rate(-epsilon)
    assert 0 < upper <= lower
    assert upper <= theory.chernoff_rate(1 + epsilon) <= 1.07 * upper
    assert lower <= theory.chernoff_rate(1 - epsilon) + 1e-15


near_the_join = st.floats(min_value=9e-5, max_value=1.1e-4)  # of series and closed form


@given(near_the_join | st.floats(min_value=1e-9, max_value=0.9), st.sampled_from([1, -1]))
def test_tail_rate_against_sixty_digits(epsilon: float, sign: int) -> None:
    x = Decimal(sign * epsilon)
    with localcontext(prec=60):
        exact = float(x / 4 + (2 / (1 + (1 + x).sqrt())).ln())
    assert theory.tail_rate(sign * epsilon) == pytest.approx(exact, rel=1e-11, abs=0)


@given(widths, tolerances, st.integers(1, 10**6))
def test_bounds_of_one_layer_are_probabilities_that_fall_with_the_width(
    width: int, epsilon: float, samples: int
) -> None:
    bounds: tuple[Callable[[int], float], ...] = (
        lambda m: theory.union_bound(m, epsilon, samples),
        lambda m: theory.tail_bound(m, epsilon, samples),
        lambda m: theory.tail_bound(m, -epsilon, samples),
    )
    for bound in bounds:
        assert 0 <= bound(width + 1) <= bound(width) <= 1
    assert theory.union_bound(width, epsilon, samples) >= theory.tail_bound(width, -epsilon)


@given(tolerances, depths, st.integers(1, 10**5), st.floats(0.001, 0.999))
def test_union_width_suffices_and_one_unit_less_does_not(
    epsilon: float, depth: int, samples: int, delta: float
) -> None:
    share = theory.layer_tolerance(epsilon, depth)
    assert (1 + share) ** depth == pytest.approx(1 + epsilon)
    assert (1 - share) ** depth >= (1 - epsilon) * (1 - 1e-9)
    width = theory.union_width(epsilon, depth, samples, delta)
    assert theory.union_bound(width, share, samples * depth) <= delta * (1 + 1e-9)
    if width > 1:
        assert theory.union_bound(width - 1, share, samples * depth) >= delta * (1 - 1e-9)


@given(st.lists(st.integers(4, 300), min_size=1, max_size=5), st.floats(0.02, 0.98))
def test_martingale_tails_are_probabilities_that_fall_with_the_threshold(
    layers: list[int], threshold: float
) -> None:
    upper = theory.upper_tail_bound(layers, 1 / threshold)
    assert 0 <= theory.upper_tail_bound(layers, 1.2 / threshold) <= upper <= 1
    # Markov's inequality is the case s = 1 and Chebyshev's form the case s = 2.
    assert upper <= threshold * (1 + 1e-9)
    assert upper <= threshold**2 * math.prod(1 + 5 / m for m in layers) * (1 + 1e-9)
    lower = theory.lower_tail_bound(layers, threshold)
    assert 0 <= theory.lower_tail_bound(layers, 0.8 * threshold) <= lower + 1e-12 <= 1 + 1e-12


@given(st.integers(20, 1000), st.integers(1, 5), st.floats(0.3, 0.9))
def test_martingale_tails_fall_with_the_width_and_rise_with_the_depth(
    width: int, depth: int, threshold: float
) -> None:
    # A fourfold width, because the floor in k0 makes single steps uneven.
    for bound, level in (
        (theory.upper_tail_bound, 1 / threshold),
        (theory.lower_tail_bound, threshold),
    ):
        assert bound([4 * width] * depth, level) <= bound([width] * depth, level) + 1e-9
        assert bound([width] * depth, level) <= bound([width] * (depth + 1), level) + 1e-9


@given(st.floats(0.2, 0.9), st.integers(1, 3), st.integers(1, 1000), st.floats(0.01, 0.5))
def test_martingale_width_suffices_and_is_below_the_union_width(
    epsilon: float, depth: int, samples: int, delta: float
) -> None:
    width = theory.martingale_width(epsilon, depth, samples, delta)

    def failure(units: int) -> float:
        upper = theory.upper_tail_bound([units] * depth, 1 + epsilon)
        return samples * (upper + theory.lower_tail_bound([units] * depth, 1 - epsilon))

    assert failure(width) <= delta * (1 + 1e-9)
    assert failure(width - 1) >= delta * (1 - 1e-9)
    assert width <= max(4, theory.union_width(epsilon, depth, samples, delta))


@given(st.lists(widths, min_size=1, max_size=20), st.floats(0, 10))
def test_variances_of_a_chain(layers: list[int], kappa: float) -> None:
    kappas = [kappa] * len(layers)
    total = theory.norm_variance(layers, kappas)
    assert total == pytest.approx(kappa * sum(1 / m for m in layers))
    assert total <= theory.ratio_variance(layers, kappas) * (1 + 1e-9)
    doubled = [2 * m for m in layers]
    assert theory.norm_variance(doubled, kappas) == pytest.approx(total / 2)
    assert theory.ratio_variance(doubled, kappas) <= theory.ratio_variance(layers, kappas)


@given(st.floats(-50, 50), st.floats(1e-3, 10))
def test_z_score_inverts(log_factor: float, variance: float) -> None:
    mean, spread = theory.log_ratio_moments(variance)
    z = theory.z_score(log_factor, variance)
    assert mean + z * math.sqrt(spread) == pytest.approx(log_factor, abs=1e-9)


@given(depths, st.floats(0.05, 2), st.floats(0.1, 10))
def test_width_for_stability_is_the_smallest(depth: int, tau: float, kappa: float) -> None:
    width = theory.width_for_stability(depth, tau, kappa)
    assert kappa * depth / width <= tau**2 * (1 + 1e-9)
    assert width == 1 or kappa * depth / (width - 1) >= tau**2 * (1 - 1e-9)


@given(depths, st.floats(1.01, 100))
def test_largest_dropout_meets_the_growth(depth: int, growth: float) -> None:
    p = theory.largest_dropout(depth, growth)
    assert theory.dropout_factor(p) ** depth == pytest.approx(growth)


@given(st.sampled_from(NAMES), st.floats(1e-6, 1e6))
def test_mean_square_grows_with_the_pre_activation(name: str, q: float) -> None:
    assert theory.activation_second_moment(name, q) < theory.activation_second_moment(name, 2 * q)


@given(st.floats(-3, 3))
def test_leaky_relu_contains_relu_and_identity(slope: float) -> None:
    law = theory.activation_law("leaky_relu", negative_slope=slope)
    assert law.gain**2 * law.second_moment == pytest.approx(1)
    assert 2 - 1e-9 <= law.kappa <= 5 + 1e-9
    for name, special in (("relu", 0.0), ("identity", 1.0)):
        same = theory.activation_law("leaky_relu", negative_slope=special)
        assert theory.activation_law(name)[1:] == same[1:]


@given(
    st.integers(1, 40), st.integers(1, 5), st.integers(0, 4), st.integers(1, 3), st.integers(1, 3)
)
def test_padding_factor_is_a_share(
    size: int, kernel: int, padding: int, stride: int, dilation: int
) -> None:
    if dilation * (kernel - 1) >= size + 2 * padding:
        with pytest.raises(ValueError, match="kernel must fit"):
            theory.padding_factor(size, kernel, padding, stride, dilation)
        return
    factor = theory.padding_factor(size, kernel, padding, stride, dilation)
    assert 0 <= factor <= 1
    if padding == 0:
        assert factor == 1


@given(st.integers(100, 10**6), st.integers(1, 50), st.floats(0.001, 0.5))
def test_subspace_bounds_bracket_one_and_tighten(width: int, dimension: int, delta: float) -> None:
    lower, upper = theory.subspace_bounds(width, dimension, delta)
    assert 0 <= lower < 1 < upper
    wider = theory.subspace_bounds(10 * width, dimension, delta)
    assert wider.upper < upper
    assert wider.lower >= lower
    assert theory.subspace_bounds(width, dimension + 1, delta).upper > upper


# --- Errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: theory.relu_square_mgf(0.5), "t must be below 1/2 .* got 0.5"),
        (lambda: theory.layer_moments(0), "width must be a whole number of at least 1, got 0"),
        (lambda: theory.layer_moments(10, 1.0), r"dropout must lie in \[0, 1\), got 1.0"),
        (lambda: theory.tail_rate(-1.0), "deviation must lie in"),
        (lambda: theory.tail_rate(math.nan), "deviation must lie in .* got nan"),
        (lambda: theory.chernoff_rate(0.0), "ratio must be positive and finite, got 0.0"),
        (lambda: theory.tail_bound(0, 0.5), "width must be"),
        (lambda: theory.tail_bound(10, -2.0), "deviation must lie in"),
        (lambda: theory.union_bound(10, 0.5, 0), "samples must be"),
        (lambda: theory.union_bound(10, 1.5), r"epsilon must lie in \(0, 1\), got 1.5"),
        (lambda: theory.layer_tolerance(0.0, 3), "epsilon must lie in"),
        (lambda: theory.layer_tolerance(0.5, 0), "depth must be"),
        (lambda: theory.union_width(0.5, 3, 10, 0.0), "delta must lie in"),
        (lambda: theory.union_width(0.5, 3, 0, 0.1), "samples must be"),
        (lambda: theory.martingale_width(1.0, 3, 10, 0.1), "epsilon must lie in"),
        (lambda: theory.martingale_width(0.5, 3, 10, 1.0), "delta must lie in"),
        (lambda: theory.martingale_width(0.5, 0, 10, 0.1), "depth must be"),
        (lambda: theory.ratio_moment(10, 0.0), "order must be positive"),
        (lambda: theory.ratio_moment(0, 1.0), "width must be"),
        (lambda: theory.upper_tail_bound([8], 1.0), "threshold must lie in"),
        (lambda: theory.upper_tail_bound([], 2.0), "widths must name at least one layer"),
        (lambda: theory.upper_tail_bound([8, 0], 2.0), r"widths\[1\] must be .* got 0"),
        (lambda: theory.lower_tail_bound([8], 1.0), "threshold must lie in"),
        (lambda: theory.lower_tail_bound([3], 0.5), r"widths\[0\] must be .* at least 4, got 3"),
        (lambda: theory.norm_variance([8, 8], [5.0]), "kappas must hold .* got 1 for 2"),
        (lambda: theory.norm_variance([], []), "widths must name at least one layer"),
        (lambda: theory.norm_variance([8], [-1.0]), r"kappas\[0\] must be .* got -1.0"),
        (lambda: theory.ratio_variance([8.5], [5.0]), r"widths\[0\] must be .* got 8.5"),  # type: ignore[list-item]
        (lambda: theory.ratio_variance([8], [math.inf]), r"kappas\[0\] must be finite"),
        (lambda: theory.log_ratio_moments(-1.0), "variance must be"),
        (lambda: theory.z_score(0.0, 0.0), "variance must be positive and finite, got 0.0"),
        (lambda: theory.width_for_stability(0, 0.5), "depth must be"),
        (lambda: theory.width_for_stability(5, 0.0), "tau must be positive"),
        (lambda: theory.width_for_stability(5, 0.5, kappa=-1.0), "kappa must be positive"),
        (lambda: theory.activation_law("swish"), "name must be one of relu, .* got 'swish'"),
        (lambda: theory.activation_law("relu", negative_slope=math.nan), "negative_slope must be"),
        (lambda: theory.activation_second_moment("mish", 1.0), "name must be one of"),
        (lambda: theory.activation_second_moment("gelu", -1.0), "mean_square must be"),
        (lambda: theory.mean_square_factor(-1.0, 5, 0.5), "weight_variance must be"),
        (lambda: theory.mean_square_factor(1.0, 0, 0.5), "fan_in must be"),
        (lambda: theory.squared_norm_factor(1.0, 0, 0.5), "width must be"),
        (lambda: theory.squared_norm_factor(1.0, 5, math.inf), "second_moment must be"),
        (lambda: theory.he_variance_fan_in(0), "fan_in must be"),
        (lambda: theory.he_variance_fan_out(-3), "fan_out must be .* got -3"),
        (lambda: theory.default_variance(0), "fan_in must be"),
        (lambda: theory.bias_noise_floor(0), "fan_in must be"),
        (lambda: theory.dropout_factor(-0.1), "p must lie in"),
        (lambda: theory.largest_dropout(0), "depth must be"),
        (lambda: theory.largest_dropout(3, 1.0), "growth must lie in"),
        (lambda: theory.residual_factor(math.inf), "alpha must be finite"),
        (lambda: theory.residual_factor(1.0, -1.0), "branch_ratio must be"),
        (lambda: theory.residual_factor(1.0, depth=0), "depth must be"),
        (lambda: theory.padding_factor(0, 3, 1), "size must be"),
        (lambda: theory.padding_factor(8, 0, 1), "kernel must be"),
        (lambda: theory.padding_factor(8, 3, -1), "padding must be .* at least 0, got -1"),
        (lambda: theory.padding_factor(8, 3, 1, stride=0), "stride must be"),
        (lambda: theory.padding_factor(8, 3, 1, dilation=0), "dilation must be"),
        (lambda: theory.padding_profile(np.ones((2, 2)), 3, 1), r"profile must .* got \(2, 2\)"),
        (lambda: theory.padding_profile(np.ones(0), 1, 1), "kernel must fit .* size 0"),
        (lambda: theory.weight_gradient_norm(np.ones((2, 3)), np.ones((3, 3))), "inputs and"),
        (lambda: theory.weight_gradient_norm(np.ones((2, 2, 3)), np.ones((2, 3))), "inputs and"),
        (lambda: theory.gradient_factor(0, 1, 0.1, 10), "depth must be"),
        (lambda: theory.gradient_factor(5, 6, 0.1, 10), "layer must be at most depth 5, got 6"),
        (lambda: theory.gradient_factor(5, 1, 1.5, 10), "alignment must lie in"),
        (lambda: theory.gradient_factor(51, 1, 0.0, 100), "width must be large .* 100 and 51"),
        (lambda: theory.gradient_log_variance(0, 10), "depth must be"),
        (lambda: theory.subspace_bounds(0, 1, 0.1), "width must be"),
        (lambda: theory.subspace_bounds(10, 1, 1.0), "delta must lie in"),
        (lambda: theory.subspace_width(1.0, 1, 0.1), "epsilon must lie in"),
        (lambda: theory.subspace_width(0.5, 0, 0.1), "dimension must be"),
    ],
)
def test_bad_input(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_lower_tail_refuses_a_conditional_moment_below_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No width reaches this case; a wrong moment must still not pass as a bound."""
    monkeypatch.setattr(depth_bound, "_log_moment", lambda *_: lambda _: -0.6)
    with pytest.raises(ValueError, match=r"widths must give .* use wider layers"):
        theory.lower_tail_bound([64], 0.5)


def test_public_names_exist() -> None:
    assert sorted(set(theory.__all__)) == sorted(theory.__all__)
    assert all(hasattr(theory, name) for name in theory.__all__)

"""Learning-rate/batch ratio: reference values, brute force, properties and errors.

Reference numbers were computed independently in float64 and are copied here.
"""

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradwatch.errors import ConfigError
from gradwatch.theory import gradient_convergence
from gradwatch.theory import lr_batch_ratio as theory

EXACT = 1e-9

positive = st.floats(min_value=1e-3, max_value=1e3)
batches = st.integers(min_value=1, max_value=4096)
momenta = st.floats(min_value=0.0, max_value=0.95)
below_one = st.floats(min_value=1e-3, max_value=0.999)


def exactly(value: float) -> object:
    return pytest.approx(value, rel=EXACT, abs=0)


# --- Reference values --------------------------------------------------------------------------


def test_temperature() -> None:
    assert theory.temperature(0.1, 2, 32) == exactly(0.003125)


def test_competition_of_minima() -> None:
    assert theory.minima_ratio(2, 18, 0.15, 0, 0.15) == exactly(1.103638323514327)
    assert theory.noise_threshold(2, 18, 0.15, 0) == exactly(0.13653588399402558)


@pytest.mark.parametrize(
    ("arguments", "variance", "limit"),
    [
        ((0.1, 1, 1, 8, 0), 0.006578947368421053, 0.00625),
        ((1, 1, 1, 8, 0), 0.125, 0.0625),
        ((0.1, 1, 1, 8, 0.9), 0.06418918918918921, 0.0625),
        ((0.05, 10, 4, 16, 0.9), 0.007196969696969699, 0.00625),
    ],
)
def test_stationary_variance(arguments: tuple[float, ...], variance: float, limit: float) -> None:
    assert theory.stationary_variance(*arguments) == exactly(variance)
    assert theory.stationary_variance_limit(*arguments) == exactly(limit)


def test_learning_rate_limit() -> None:
    assert theory.learning_rate_limit(0.1, 10) == exactly(0.018181818181818184)
    assert theory.learning_rate_limit(0.1, 10, 0.9) == exactly(0.034545454545454546)
    assert theory.ratio_law_limit(0.9, 0.1) == exactly(0.34545454545454546)


@pytest.mark.parametrize(
    ("arguments", "square", "variance", "scale"),
    [
        ((2, 0.5, 8, 64), 0.2857142857142857, 13.714285714285714, 48.0),
        ((1, 0.9, 16, 128), 0.8857142857142858, 1.828571428571428, 2.064516129032257),
        ((10, 1, 1, 32), 0.7096774193548387, 9.290322580645162, 13.090909090909092),
    ],
)
def test_two_batch_estimate(
    arguments: tuple[float, ...], square: float, variance: float, scale: float
) -> None:
    estimate = theory.two_batch_estimate(*arguments)
    assert estimate == (exactly(square), exactly(variance))
    assert theory.simple_noise_scale(estimate.variance, estimate.square) == exactly(scale)


def test_microbatch_norm_estimate() -> None:
    estimate = theory.microbatch_norm_estimate(1.5, 0.6, 4, 16)
    assert estimate == (exactly(0.3), exactly(19.2))
    assert theory.simple_noise_scale(estimate.variance, estimate.square) == exactly(64)


def test_adam_estimate() -> None:
    expected = (exactly(0.8888888888888888), exactly(67.55555555555556))
    assert theory.adam_estimate(3, 1, 0.9, 32) == expected
    assert theory.adam_estimate(3, 1, 0.9, 32, step=10_000) == expected


@pytest.mark.parametrize(
    ("batch_size", "step"),
    [(16, 0.06896551724137931), (64, 0.1951219512195122), (256, 0.3595505617977528)],
)
def test_optimal_step(batch_size: int, step: float) -> None:
    assert theory.optimal_step(0.5, 100, batch_size) == exactly(step)


def test_rescaled_learning_rate() -> None:
    assert theory.rescaled_learning_rate(0.1, 64, 512, 100) == exactly(0.21437908496732028)
    assert theory.rescaled_learning_rate(0.1, 64, 512, 1e5) == exactly(0.7964342566061765)
    assert theory.rescaled_learning_rate(0.1, 64, 512, math.inf) == exactly(0.8)
    adam = theory.rescaled_learning_rate(0.1, 64, 512, 100, exponent=0.5)
    assert adam == exactly(0.1 * math.sqrt(2.1437908496732028))


def test_stall_ratio() -> None:
    assert theory.stall_ratio(0.5, 0.32, 0.217, 10.2, 16) == exactly(0.6675781249999999)
    heavy_ball = theory.stall_ratio(0.05, 0.32, 0.217, 10.2, 16, momentum=0.9)
    assert heavy_ball == exactly(0.6675781249999999)


# --- Brute force -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rate", "curvature", "momentum"), [(0.1, 1, 0), (1.8, 1, 0), (0.1, 1, 0.9), (0.05, 10, 0.5)]
)
def test_stationary_variance_is_the_fixed_point_of_the_recursion(
    rate: float, curvature: float, momentum: float
) -> None:
    """v <- beta v + lambda z + noise, z <- z - eta v; the covariance of (z, v) in closed steps."""
    step = np.array([[1 - rate * curvature, -rate * momentum], [curvature, momentum]])
    kick = np.array([[rate**2, -rate], [-rate, 1.0]]) * 3.0 / 8
    covariance = np.zeros((2, 2))
    for _ in range(5000):
        covariance = step @ covariance @ step.T + kick
    expected = theory.stationary_variance(rate, curvature, 3.0, 8, momentum)
    assert covariance[0, 0] == pytest.approx(expected, rel=1e-9)


def test_stationary_excess_loss_is_the_variance_of_all_modes() -> None:
    eigenvalues, rate = [0.5, 2.0, 3.5], 0.4
    modes = [v / 2 * theory.stationary_variance(rate, v, v, 16) for v in eigenvalues]
    assert theory.stationary_excess_loss(rate, eigenvalues, 16) == exactly(sum(modes))
    small = theory.stationary_excess_loss(1e-9, eigenvalues, 16)
    assert small == pytest.approx(1e-9 * sum(eigenvalues) / (4 * 16), rel=1e-8)


@given(positive, positive, st.integers(1, 500), st.integers(1, 500))
def test_two_batch_estimate_of_expectations(
    square: float, variance: float, small: int, more: int
) -> None:
    found = theory.two_batch_estimate(
        square + variance / small, square + variance / (small + more), small, small + more
    )
    scale = square + variance
    assert found.square == pytest.approx(square, rel=1e-6, abs=1e-9 * scale)
    assert found.variance == pytest.approx(variance, rel=1e-6, abs=1e-6 * scale * small)


@given(st.integers(2, 6), st.integers(1, 64))
def test_both_pages_have_the_same_microbatch_estimate(count: int, size: int) -> None:
    gradients = np.random.default_rng(count).normal(size=(count, 5))
    norms = theory.microbatch_norm_estimate(
        float(np.mean(np.sum(gradients**2, axis=1))),
        float(np.sum(gradients.mean(axis=0) ** 2)),
        count,
        size,
    )
    plain = gradient_convergence.microbatch_estimate(gradients, size)
    assert norms == pytest.approx(plain, rel=1e-9, abs=1e-9)


@given(positive, positive, below_one, batches, st.integers(2, 200))
def test_adam_estimate_of_expectations(
    square: float, noise: float, beta1: float, batch: int, step: int
) -> None:
    """The share of the noise in m_hat is the sum of its squared weights."""
    weights = beta1 ** np.arange(step)
    share = float(np.sum(weights**2) / np.sum(weights) ** 2)
    found = theory.adam_estimate(square + noise, square + share * noise, beta1, batch, step)
    scale = (square + noise) / (1 - share)
    assert found.square == pytest.approx(square, abs=1e-8 * scale)
    assert found.variance == pytest.approx(batch * noise, abs=1e-8 * scale * batch)


def test_curvature_estimate_is_unbiased_over_all_outcomes() -> None:
    samples = np.array([[1.0, 2.0], [0.0, -1.0], [3.0, 0.5]])
    hessian = np.array([[2.0, 0.5], [0.5, 1.0]])
    mean, centred = samples.mean(axis=0), samples - samples.mean(axis=0)
    found = np.mean(
        [
            theory.curvature_estimate(float(b @ hessian @ a), float(a @ hessian @ a), 1)
            for a in samples
            for b in samples
        ],
        axis=0,
    )
    noise = float(np.trace(hessian @ centred.T @ centred) / 3)
    assert found == pytest.approx([float(mean @ hessian @ mean), noise], rel=EXACT)


# --- Properties --------------------------------------------------------------------------------


@given(positive, positive, positive, batches)
def test_the_optimal_step_gains_most_and_twice_it_gains_nothing(
    square: float, bend: float, noise_bend: float, batch: int
) -> None:
    scale = theory.curvature_noise_scale(noise_bend, bend)
    step = theory.optimal_step(theory.noiseless_step(square, bend), scale, batch)
    gain = theory.best_gain(square, bend, scale, batch)

    def change(rate: float) -> float:
        return theory.expected_loss_change(rate, square, bend, noise_bend, batch)

    assert change(step) == pytest.approx(-gain, rel=1e-6)
    assert change(2 * step) == pytest.approx(0, abs=1e-9 * gain)
    assert min(change(0.9 * step), change(1.1 * step)) > change(step)
    stall = theory.stall_ratio(2 * step, square, bend, noise_bend, batch)
    assert stall == pytest.approx(1)


@given(positive, batches)
def test_steps_and_samples_share_the_loss_of_efficiency(scale: float, batch: int) -> None:
    total = theory.step_efficiency(scale, batch) + theory.sample_efficiency(scale, batch)
    assert total == pytest.approx(1)


@given(positive, batches, batches, positive)
def test_rescaling_there_and_back(rate: float, batch: int, other: int, scale: float) -> None:
    there = theory.rescaled_learning_rate(rate, batch, other, scale)
    assert theory.rescaled_learning_rate(there, other, batch, scale) == pytest.approx(rate)
    low, high = sorted((1.0, other / batch))
    assert low * rate * (1 - EXACT) <= there <= high * rate * (1 + EXACT)


@given(positive, momenta, below_one)
def test_at_the_limit_the_excess_is_the_tolerance(
    curvature: float, momentum: float, tolerance: float
) -> None:
    rate = theory.learning_rate_limit(tolerance, curvature, momentum)
    exact = theory.stationary_variance(rate, curvature, 1.0, 8, momentum)
    limit = theory.stationary_variance_limit(rate, curvature, 1.0, 8, momentum)
    assert exact / limit - 1 == pytest.approx(tolerance, rel=1e-6)


@given(positive, positive, positive)
def test_at_the_threshold_both_minima_weigh_the_same(
    determinant: float, more: float, gap: float
) -> None:
    other = determinant + more
    level = theory.noise_threshold(determinant, other, gap, 0.0)
    assert theory.minima_ratio(determinant, other, gap, 0.0, level) == pytest.approx(1, rel=1e-6)


@given(positive, positive, positive, batches, below_one, st.integers(1, 10**6))
def test_the_short_bound_is_between_once_and_twice_the_sharp_one(
    gap: float, smoothness: float, variance: float, batch: int, product: float, steps: int
) -> None:
    arguments = (gap, smoothness, variance, batch, product / smoothness, steps)
    short = theory.simple_stationarity_bound(*arguments).bound
    sharp = gradient_convergence.stationarity_bound(*arguments).bound
    assert sharp * (1 - EXACT) <= short <= 2 * sharp * (1 + EXACT)


# --- Edges and errors --------------------------------------------------------------------------


def test_beyond_the_edge() -> None:
    assert theory.stationary_variance(2.0, 1.0, 1.0, 8) == math.inf
    assert theory.stationary_variance(3.7, 1.0, 1.0, 8, 0.9) < math.inf
    assert theory.stationary_variance(3.8, 1.0, 1.0, 8, 0.9) == math.inf
    assert theory.stationary_excess_loss(1.0, [0.1, 2.0], 8) == math.inf
    assert theory.simple_stationarity_bound(1, 2, 1, 1, 0.51, 10).bound == math.inf


def test_a_higher_and_sharper_minimum_is_never_preferred() -> None:
    assert theory.noise_threshold(18, 2, 0.15, 0) == math.inf
    assert theory.minima_ratio(18, 2, 0.15, 0, 1e6) < 1


def test_no_signal_means_no_largest_batch() -> None:
    assert theory.simple_noise_scale(3.0, 0.0) == math.inf
    assert theory.simple_noise_scale(3.0, -0.1) == math.inf
    assert theory.simple_noise_scale(-1.0, 0.5) == -2.0


def test_finite_data() -> None:
    assert theory.without_replacement_factor(100, 1) == 1.0
    assert theory.without_replacement_factor(100, 100) == 0.0
    assert theory.finite_data_factor(1000, 10, 1) == 1.0
    assert theory.finite_data_factor(1000, 100, 20) == 0.0
    # kS = N/10 is about where a tolerance of 10 % ends.
    assert theory.finite_data_holds(1000, 1, 100)
    assert not theory.finite_data_holds(1000, 1, 102)


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda: theory.temperature(-0.1, 1, 1), "learning_rate"),
        (lambda: theory.temperature(0.1, 1, 0), "batch_size"),
        (lambda: theory.effective_ratio(0.1, 1, 1.0), "momentum"),
        (lambda: theory.minima_ratio(1, 1, 0, 0, 0), "noise_level"),
        (lambda: theory.minima_ratio(0, 1, 0, 0, 1), "determinant"),
        (lambda: theory.noise_threshold(1, 2, 0, 1), "swap"),
        (lambda: theory.stationary_variance(0.1, -1, 1, 1), "curvature"),
        (lambda: theory.stationary_variance(math.nan, 1, 1, 1), "learning_rate"),
        (lambda: theory.stationary_excess_loss(0.1, [-1.0], 1), "eigenvalues"),
        (lambda: theory.stationary_excess_loss(0.1, [], 1), "eigenvalues"),
        (lambda: theory.ratio_law_limit(-0.1), "momentum"),
        (lambda: theory.ratio_law_limit(0.0, 0.0), "tolerance"),
        (lambda: theory.learning_rate_limit(0.1, 0), "curvature"),
        (lambda: theory.without_replacement_factor(10, 11), "batch_size"),
        (lambda: theory.finite_data_factor(10, 10, 1), "batch_size"),
        (lambda: theory.finite_data_holds(10, 1, 1, 1.0), "tolerance"),
        (lambda: theory.two_batch_estimate(1, 1, 8, 8), "below large"),
        (lambda: theory.two_batch_estimate(-1, 1, 4, 8), "small_square"),
        (lambda: theory.microbatch_norm_estimate(1, 1, 1, 1), "count"),
        (lambda: theory.adam_estimate(1, 1, 0.0, 8), "beta1"),
        (lambda: theory.adam_estimate(1, 1, 0.9, 8, step=1), "step"),
        (lambda: theory.curvature_estimate(math.inf, 1, 1), "cross"),
        (lambda: theory.simple_noise_scale(math.nan, 1), "variance"),
        (lambda: theory.curvature_noise_scale(1, 0), "gradient_curvature"),
        (lambda: theory.expected_loss_change(0.1, -1, 1, 1, 1), "square"),
        (lambda: theory.stall_ratio(0.1, 0, 1, 1, 1), "square"),
        (lambda: theory.noiseless_step(1, -1), "gradient_curvature"),
        (lambda: theory.optimal_step(-1, 1, 1), "largest_step"),
        (lambda: theory.step_efficiency(-1, 1), "noise_scale"),
        (lambda: theory.sample_efficiency(0, 1), "noise_scale"),
        (lambda: theory.rescaled_learning_rate(0.1, 1, 2, math.nan), "noise_scale"),
        (lambda: theory.rescaled_learning_rate(0.1, 1, 2, 1, exponent=2), "exponent"),
        (lambda: theory.simple_stationarity_bound(1, 1, 1, 1, 0.1, 0), "steps"),
    ],
)
def test_wrong_input_is_named(call: Callable[[], object], names: str) -> None:
    with pytest.raises(ConfigError, match=names):
        call()

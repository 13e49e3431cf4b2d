"""Gradient convergence: reference values, what the bound means, properties and errors.

Reference numbers were computed independently in float64 and are copied here.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from gradwatch.errors import ConfigError
from gradwatch.theory import gradient_convergence as theory

EXACT = 1e-9
BASE = (2.3026, 10, 50, 128)  # D, L, sigma2, B

positive = st.floats(min_value=1e-3, max_value=1e3)
batches = st.integers(min_value=1, max_value=4096)
below_edge = st.floats(min_value=1e-3, max_value=1.99)  # g L
keeps = st.floats(min_value=0.05, max_value=0.95)


def exactly(value: float) -> object:
    return pytest.approx(value, rel=EXACT, abs=0)


# --- Reference values --------------------------------------------------------------------------


def test_stationarity_bound() -> None:
    split = theory.stationarity_bound(2.3026, 16, 52, 128, 0.1, 10_000)
    assert split.bound == exactly(1.636513)
    assert split == (exactly(0.011513), exactly(1.625))
    assert split.noise_share == exactly(1.625 / 1.636513)
    split = theory.stationarity_bound(*BASE, 0.03, 10_000)
    assert split.bound == exactly(0.07796362745098)
    assert split == (exactly(0.00902980392157), exactly(0.06893382352941))
    assert theory.stationarity_bound(1, 2, 0.5, 1, 0.05, 10_000).bound == exactly(0.02842105263158)
    assert theory.stationarity_bound(1, 2, 0.5, 1, 0.25, 100).bound == exactly(0.22)


def test_stationarity_bound_decay() -> None:
    split = theory.stationarity_bound_decay(*BASE, 0.1, 10_000, 0.5)
    # The two harmonic sums behind it are 198.54464545 and 9.787606036044382.
    total = 2 * 0.1 * 198.54464545 - 10 * 0.01 * 9.787606036044382
    assert split.bound == exactly(0.12877631458142)
    assert split.step_term == exactly(2 * 2.3026 / total)


def test_path_bound() -> None:
    # The page gives this one to 11 digits.
    assert theory.path_bound(1, [2, 4, 3], [0.5, 0.4, 0.3], [0.1, 0.1, 0.05]).bound == exactly(
        4.68959537572
    )
    decayed = theory.path_bound(1, [2] * 4, [0.5, 0.5, 0.25, 0.25], [0.1, 0.1, 0.05, 0.05])
    assert decayed.bound == exactly(3.67727272727273)


def test_stopping_weights() -> None:
    weights = theory.stopping_weights([0.1, 0.1, 0.05, 0.05], 4)
    assert weights / weights.sum() == pytest.approx([0.32, 0.32, 0.18, 0.18], rel=EXACT)
    assert weights == pytest.approx([0.16, 0.16, 0.09, 0.09], rel=EXACT)


def test_best_learning_rate() -> None:
    rate = theory.best_learning_rate(*BASE, 10_000)
    assert rate == exactly(0.01028438329051)
    assert theory.stationarity_bound(*BASE, rate, 10_000).bound == exactly(0.04477857222854)
    assert theory.best_learning_rate(2.3026, 10, 0, 128, 10_000) == exactly(0.1)


def test_learning_rate_for_floor() -> None:
    rate = theory.learning_rate_for_floor(10, 50, 128, 0.01)
    assert rate == exactly(0.00499219968799)
    assert theory.noise_floor(10, 50, 128, rate) == exactly(0.01)


def test_steps_and_batch_size_for_target() -> None:
    assert theory.steps_for_target(*BASE, 0.01, 0.05) == 8233
    assert theory.steps_for_target(*BASE, 0.03, 0.05) == math.inf
    assert theory.batch_size_for_target(2.3026, 10, 50, 0.03, 10_000, 0.02) == 805
    assert theory.batch_size_for_target(2.3026, 10, 50, 0.03, 100, 0.02) == math.inf
    assert theory.batch_size_for_floor(0.688, 1.47, 0.3, 0.005) == 34


def test_same_convergence() -> None:
    base = theory.Setting(2.3026, 10, 50, 128, 0.03, 10_000)
    other = theory.same_convergence(base, 2.0, 20, 90)
    assert other == (2.0, 20, 90, exactly(230.4), exactly(0.015), exactly(17371.66681143))
    assert other.bound.bound == exactly(0.07796362745098)


def test_trainings_for_reliability() -> None:
    needed = theory.trainings_for_reliability
    assert (needed(0.05, 2), needed(0.05, 4), needed(0.01, 2)) == (5, 3, 7)
    assert [needed(2.0**-k, 2) for k in range(1, 40)] == list(range(1, 40))


def test_microbatch_estimate() -> None:
    gradients = [[1, 0, 2], [0, 1, 1], [1, 1, 0], [2, 0, 1]]
    assert theory.microbatch_estimate(gradients, 8) == (
        exactly(1.83333333333333),
        exactly(13.3333333333333),
    )


def test_keep_rate_for_target() -> None:
    keep = theory.keep_rate_for_target
    assert keep(8.75, 9.5, 1, 32, 0.3, 0.12) == exactly(0.41646834840554)
    assert keep(8.75, 9.5, 1, 32, 0.3, 0.05) is None
    assert keep(4.59, 1.532, 0.954, 32, 0.3, 0.01) == exactly(0.92276173427715)
    assert theory.variance_at(0.5, 1.532, 4.59) == exactly(6.122)


def test_pretraining_steps_saved() -> None:
    saved = theory.pretraining_steps_saved
    assert saved(2.3026, 1.1, 10, 50, 128, 0.01, 0.05) == exactly(4299.7988826816)
    assert saved(2.3026, 1.1, 10, 50, 128, 0.03, 0.05) is None


@pytest.mark.parametrize(
    ("keep_in", "keep_out", "masks", "coverage"),
    [(0.8, 0.5, 1, 0.4), (0.8, 0.5, 4, 0.8704), (0.5, 0.5, 32, 0.99989954757428)],
)
def test_update_coverage(keep_in: float, keep_out: float, masks: int, coverage: float) -> None:
    assert theory.update_coverage(keep_in, keep_out, masks) == exactly(coverage)


def test_linear_dropout_penalty() -> None:
    weights, x = [[1.0, -2.0], [0.5, 3.0]], [1.0, 2.0]
    assert theory.linear_dropout_penalty(weights, x, 0.8) == exactly(13.3125)
    plain = theory.linear_dropout_penalty(weights, x, 0.8, inverted=False)
    assert plain == exactly(13.3125 * 0.8**2)  # the plain masks of W are the inverted ones of 0.8 W


def test_one_layer_variance() -> None:
    variance = theory.one_layer_variance
    assert variance(64, 10, 0.25) == exactly(3.51165980795611)
    assert variance(784, 10, 0.1, loss_scale=1) == exactly(68.8285322359396)
    assert variance(64, 10, 0.25, keep=0.8) == exactly(4.38957475994513)
    assert variance(64, 10, 0.25, keep=0.8, inverted=False) == exactly(2.80932784636488)


def test_one_layer_smoothness() -> None:
    curvature = theory.one_layer_smoothness(3.0, loss_scale=0.5)
    assert curvature == pytest.approx(3 * 0.07702928506, abs=1e-10)
    assert theory.one_layer_smoothness(3.0, loss_scale=1.0) == 2 * curvature


@pytest.mark.parametrize(
    ("keep", "inverted", "bounds"),
    [
        (None, True, [1.07544581618656, 14.0466392318244, 56.1865569272977]),
        ([0.8, 0.5, 0.3], False, [0.645267489711934, 5.26748971193416, 16.8559670781893]),
        ([0.8, 0.5, 0.3], True, [44.8102423411065, 234.110653863740, 187.288523092991]),
    ],
)
def test_layer_gradient_squares(
    keep: list[float] | None, inverted: bool, bounds: list[float]
) -> None:
    found = theory.layer_gradient_squares(
        [784, 256, 256, 10],
        [100, 90, 10],
        [4, 4, 4],
        input_square=0.1,
        keep=keep,
        inverted=inverted,
    )
    assert found == pytest.approx(bounds, rel=EXACT)


@pytest.mark.parametrize(
    ("keep", "bounds"),
    [
        (None, [70.4804170096022, 22.4746227709191, 56.1865569272977]),
        ([1, 0.5, 0.5], [17.6201042524006, 5.61865569272977, 28.0932784636488]),
    ],
)
def test_layer_gradient_squares_in_a_box(keep: list[float] | None, bounds: list[float]) -> None:
    widths = [784, 256, 256, 10]
    found = theory.layer_gradient_squares(
        widths, theory.box_squares(widths, 0.05), input_square=0.1, keep=keep, inverted=False
    )
    assert found == pytest.approx(bounds, rel=EXACT)


# --- Brute force -------------------------------------------------------------------------------


def test_sigmoid_curvature_is_the_supremum() -> None:
    s, y = np.meshgrid(np.linspace(0, 1, 2001), np.linspace(0, 1, 201))
    slope = s**2 * (1 - s) ** 2 + (s - y) * s * (1 - s) * (1 - 2 * s)
    assert np.abs(slope).max() == pytest.approx(theory.SIGMOID_CURVATURE, rel=1e-6)
    assert np.abs(slope).max() <= theory.SIGMOID_CURVATURE


def test_input_curvature_bound_holds_and_is_close_for_a_large_mean() -> None:
    x = np.random.default_rng(0).normal(3.0, 1.0, size=(500, 8))
    top = float(np.linalg.eigvalsh(x.T @ x / len(x))[-1])
    covariance = float(np.linalg.eigvalsh(np.cov(x.T, bias=True))[-1])
    bound = theory.input_curvature_bound(covariance, 8, float(np.mean(x.mean(axis=0) ** 2)))
    assert 0.9 * bound < top <= bound


def test_microbatch_estimate_is_unbiased_over_all_outcomes() -> None:
    """Every pair of samples out of four, with replacement: a micro-batch holds one sample."""
    samples = np.array([[1.0, 2.0], [0.0, -1.0], [3.0, 0.5], [-2.0, 1.0]])
    mean = samples.mean(axis=0)
    found = [theory.microbatch_estimate([a, b], 1) for a in samples for b in samples]
    square, variance = np.mean(found, axis=0)
    assert square == exactly(float(mean @ mean))
    assert variance == exactly(float(np.sum((samples - mean) ** 2) / 4))


@given(sizes=st.lists(st.integers(min_value=1, max_value=9), min_size=2, max_size=5))
def test_weighted_estimate_is_unbiased(sizes: list[int]) -> None:
    """Put the expectations of T and q in: the estimates are what they are made of."""
    shares = np.array(sizes) / sum(sizes)
    square, variance, s = 3.0, 7.0 / sum(sizes), float(np.sum(shares**2))
    found = theory.weighted_estimate(square + variance, s * square + variance, s)
    assert found == pytest.approx((square, variance))


@given(st.integers(min_value=2, max_value=6), st.integers(min_value=1, max_value=64))
def test_weighted_estimate_of_equal_parts_is_the_microbatch_estimate(count: int, size: int) -> None:
    gradients = np.random.default_rng(count).normal(size=(count, 5))
    parts = gradients / count
    weighted = theory.weighted_estimate(
        float(np.sum(parts.sum(axis=0) ** 2)), float(np.sum(parts**2)), 1 / count
    )
    plain = theory.microbatch_estimate(gradients, size)
    assert weighted.square == pytest.approx(plain.square, rel=1e-6, abs=1e-12)
    assert weighted.variance * count * size == pytest.approx(plain.variance, rel=1e-6)


def test_masked_second_moment_by_all_masks() -> None:
    x, keep = np.array([1.0, -2.0, 0.5]), 0.3
    moment = np.zeros((3, 3))
    for bits in range(8):
        mask = np.array([bits >> i & 1 for i in range(3)], dtype=float)
        probability = math.prod(keep if bit else 1 - keep for bit in mask)
        moment += probability * np.outer(x * mask, x * mask)
    plain = theory.masked_second_moment(np.outer(x, x), keep, inverted=False)
    assert plain == pytest.approx(moment, rel=EXACT)
    inverted = theory.masked_second_moment(np.outer(x, x), keep)
    assert inverted == pytest.approx(moment / keep**2, rel=EXACT)


# --- Properties --------------------------------------------------------------------------------


@given(positive, positive, positive, batches, st.integers(min_value=1, max_value=10**6))
def test_no_learning_rate_beats_the_best_one(
    gap: float, smoothness: float, variance: float, batch: int, steps: int
) -> None:
    best = theory.best_learning_rate(gap, smoothness, variance, batch, steps)
    bound = theory.stationarity_bound(gap, smoothness, variance, batch, best, steps).bound
    assert best <= (1 + EXACT) / smoothness
    for factor in (0.5, 0.9, 1.1, 1.5):
        other = theory.stationarity_bound(gap, smoothness, variance, batch, factor * best, steps)
        assert other.bound >= bound * (1 - EXACT)


@given(positive, positive, positive, batches, below_edge, positive)
def test_the_steps_reach_the_target_and_one_fewer_does_not(
    gap: float, smoothness: float, variance: float, batch: int, product: float, target: float
) -> None:
    rate = product / smoothness
    steps = theory.steps_for_target(gap, smoothness, variance, batch, rate, target)
    floor = theory.noise_floor(smoothness, variance, batch, rate)
    assume(abs(floor / target - 1) > 1e-6)
    assert math.isinf(steps) == (floor >= target)
    if 2 <= steps < 1e6:
        args = (gap, smoothness, variance, batch, rate)
        assert theory.stationarity_bound(*args, steps).bound <= target * (1 + EXACT)
        assert theory.stationarity_bound(*args, steps - 1).bound > target * (1 - EXACT)


@given(positive, positive, below_edge, positive)
def test_the_batch_size_brings_the_floor_to_the_target(
    smoothness: float, variance: float, product: float, target: float
) -> None:
    rate = product / smoothness
    batch = theory.batch_size_for_floor(smoothness, variance, rate, target)
    assert theory.noise_floor(smoothness, variance, batch, rate) <= target * (1 + EXACT)
    if 1 < batch < 1e6:
        assert theory.noise_floor(smoothness, variance, batch - 1, rate) > target * (1 - EXACT)


@given(positive, positive, positive, batches, below_edge, positive, positive, positive)
def test_the_same_convergence_has_the_same_parts(
    gap: float,
    smoothness: float,
    variance: float,
    batch: int,
    product: float,
    new_gap: float,
    new_smoothness: float,
    new_variance: float,
) -> None:
    base = theory.Setting(gap, smoothness, variance, batch, product / smoothness, 500)
    other = theory.same_convergence(base, new_gap, new_smoothness, new_variance)
    assume(other.batch_size >= 1 and other.steps >= 1)
    assert other.bound == pytest.approx(base.bound, rel=1e-6)


@given(positive, positive, positive, batches, below_edge, st.integers(1, 300))
def test_the_path_of_constants_is_the_constant_bound(
    gap: float, smoothness: float, variance: float, batch: int, product: float, steps: int
) -> None:
    rate = product / smoothness
    constant = theory.stationarity_bound(gap, smoothness, variance, batch, rate, steps)
    decay = theory.stationarity_bound_decay(gap, smoothness, variance, batch, rate, steps, 0.0)
    assert decay == pytest.approx(constant, rel=1e-7)


@given(positive, keeps)
def test_the_mask_law_turns_round(mask_variance: float, keep: float) -> None:
    law = theory.mask_law(mask_variance, keep)
    assert theory.variance_at(keep, 0.0, law) == pytest.approx(mask_variance)
    assert theory.variance_at(1.0, 4.0, law) == 4.0


@given(positive, positive, positive, batches, below_edge, positive)
def test_the_keep_rate_brings_the_floor_to_the_target(
    law: float, data: float, smoothness: float, batch: int, product: float, target: float
) -> None:
    rate = product / smoothness
    keep = theory.keep_rate_for_target(law, data, smoothness, batch, rate, target)
    if keep is None:
        assert theory.noise_floor(smoothness, data, batch, rate) >= target * (1 - EXACT)
    elif keep > 0.01:
        variance = theory.variance_at(keep, data, law)
        assert theory.noise_floor(smoothness, variance, batch, rate) == pytest.approx(target)


# --- Edges and errors --------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.2, 0.3])
def test_beyond_the_edge_there_is_no_bound(rate: float) -> None:
    for split in (
        theory.stationarity_bound(*BASE, rate, 100),
        theory.stationarity_bound_decay(*BASE, rate, 100, 0.5),
        theory.path_bound(1, [10, 10], [0.5, 0.5], [0.01, rate]),
    ):
        assert split.bound == math.inf
        assert math.isnan(split.noise_share)
    assert theory.noise_floor(10, 50, 128, rate) == math.inf
    assert theory.steps_for_target(*BASE, rate, 1e6) == math.inf
    assert theory.batch_size_for_floor(10, 50, rate, 1e6) == math.inf
    assert theory.keep_rate_for_target(1.0, 0.0, 10, 128, rate, 1e6) is None


def test_without_noise_or_steps() -> None:
    assert theory.stationarity_bound(1, 10, 0, 1, 0.01, 100).noise_share == 0.0
    assert math.isnan(theory.stationarity_bound(0, 10, 0, 1, 0.01, 100).noise_share)
    assert theory.path_bound(1, [2, 2], [1, 1], [0, 0]).bound == math.inf
    assert theory.path_bound(1, [2, 2], [1, 1], [0, 0.1]) == theory.path_bound(1, [2], [1], [0.1])


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda: theory.stationarity_bound(-1, 1, 1, 1, 0.1, 1), "loss_gap"),
        (lambda: theory.stationarity_bound(1, math.nan, 1, 1, 0.1, 1), "smoothness"),
        (lambda: theory.stationarity_bound(1, 1, -1, 1, 0.1, 1), "variance"),
        (lambda: theory.stationarity_bound(1, 1, 1, 0, 0.1, 1), "batch_size"),
        (lambda: theory.stationarity_bound(1, 1, 1, 1, 0, 1), "learning_rate"),
        (lambda: theory.stationarity_bound(1, 1, 1, 1, 0.1, 0), "steps"),
        (lambda: theory.stationarity_bound_decay(1, 1, 1, 1, 0.1, 1, -1), "rho"),
        (lambda: theory.path_bound(1, [], [], []), "step_variances"),
        (lambda: theory.path_bound(1, [1], [1], [1, 2]), "equally long"),
        (lambda: theory.path_bound(1, [1], [math.inf], [1]), "step_variances"),
        (lambda: theory.path_bound(1, [1], [1], [-1]), "learning_rates"),
        (lambda: theory.stopping_weights([0.1, 0.1], [1, 1, 1]), "smoothness"),
        (lambda: theory.noise_floor(1, 1, 0.5, 0.1), "batch_size"),
        (lambda: theory.best_learning_rate(0, 1, 1, 1, 1), "loss_gap"),
        (lambda: theory.learning_rate_for_floor(0, 1, 1, 1), "smoothness"),
        (lambda: theory.steps_for_target(1, 1, 1, 1, 0.1, 0), "target"),
        (lambda: theory.batch_size_for_target(1, 1, 1, 0.1, 0, 1), "steps"),
        (lambda: theory.batch_size_for_floor(1, 1, 0.1, -1), "target"),
        (lambda: theory.trainings_for_reliability(1.0), "delta"),
        (lambda: theory.trainings_for_reliability(0.5, 1.0), "factor"),
        (
            lambda: theory.same_convergence(theory.Setting(1, 1, 0, 1, 1, 1), 1, 1, 1),
            "setting.variance",
        ),
        (lambda: theory.pretraining_steps_saved(1, -1, 1, 1, 1, 0.1, 1), "pretrained_gap"),
        (lambda: theory.microbatch_estimate([[1.0]], 1), "at least 2"),
        (lambda: theory.microbatch_estimate([1.0, 2.0], 1), "2 dimensions"),
        (lambda: theory.microbatch_estimate([[1.0], [2.0]], 0), "microbatch_size"),
        (lambda: theory.weighted_estimate(1, 1, 1), "share_squares"),
        (lambda: theory.two_mask_variance(1, 0), "batch_size"),
        (lambda: theory.mask_law(1, 1), "keep"),
        (lambda: theory.variance_at(0, 1, 1), "keep"),
        (lambda: theory.keep_rate_for_target(-1, 1, 1, 1, 0.1, 1), "law"),
        (lambda: theory.update_coverage(1.5, 0.5), "keep_in"),
        (lambda: theory.linear_dropout_penalty([[1.0]], [1.0, 2.0], 0.5), "columns"),
        (lambda: theory.masked_second_moment([[1.0, 2.0]], 0.5), "square"),
        (lambda: theory.input_curvature_bound(1, 0, 1), "inputs"),
        (lambda: theory.one_layer_variance(1, 1, 1, keep=0), "keep"),
        (lambda: theory.one_layer_smoothness(1, 0), "loss_scale"),
        (lambda: theory.box_squares([3], 1), "widths"),
        (lambda: theory.layer_gradient_squares([3, 2], [1, 1]), "one number a layer"),
        (lambda: theory.layer_gradient_squares([3, 2], [1], keep=[2.0]), r"keep\[0\]"),
        (lambda: theory.layer_gradient_squares([], []), "widths"),
    ],
)
def test_wrong_input_is_named(call: Callable[[], object], names: str) -> None:
    with pytest.raises(ConfigError, match=names):
        call()


# --- Far out of range ----------------------------------------------------------------------------


def test_counts_that_no_float_can_hold_are_infinite() -> None:
    assert theory.steps_for_target(1e300, 1.0, 0.0, 1, 1e-9, 1e-9) == math.inf
    assert theory.batch_size_for_floor(1.0, 1e300, 1.0, 1e-300) == math.inf
    assert theory.batch_size_for_target(0.0, 1e200, 1e300, 1e-201, 1, 1e-200) == math.inf


def test_the_best_learning_rate_of_a_steep_loss() -> None:
    assert theory.best_learning_rate(1.0, 1e200, 0.0, 1, 1) == exactly(1e-200)


@pytest.mark.parametrize("value", [True, "1", None, 1j, [1.0]])
def test_no_number_is_named(value: Any) -> None:
    with pytest.raises(ConfigError, match="smoothness must be a number, got"):
        theory.noise_floor(value, 1.0, 1, 0.1)


@pytest.mark.parametrize("value", [np.float32(2.0), np.int64(2), 2])
def test_numbers_of_numpy_are_numbers(value: Any) -> None:
    assert theory.noise_floor(value, 0.5, 1, 0.25) == exactly(1 / 6)

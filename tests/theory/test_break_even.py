"""Break-even point and edge of stability: reference values, properties and errors.

Reference numbers were computed independently in float64 and are copied here.
"""

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradwatch.errors import ConfigError
from gradwatch.theory import break_even as theory
from gradwatch.theory import lr_batch_ratio

EXACT = 1e-9
ETA = 0.1

positive = st.floats(min_value=1e-3, max_value=1e3)
batches = st.integers(min_value=1, max_value=4096)
momenta = st.floats(min_value=0.0, max_value=0.95)


def exactly(value: float) -> object:
    return pytest.approx(value, rel=EXACT, abs=0)


# --- Reference values --------------------------------------------------------------------------


def test_noise_factor() -> None:
    assert theory.noise_factor(32, 50000) == exactly(0.03123062461249225)
    assert theory.noise_factor(8, 1280) == exactly(0.12431587177482409)
    assert theory.noise_factor(50000, 50000) == 0
    assert theory.noise_factor(1, 1) == 0


def test_second_moment_factor() -> None:
    assert theory.second_moment_factor(0.1, 15, 400, 32, 50000) == exactly(0.374922498449969)


@pytest.mark.parametrize(
    ("arguments", "limit"),
    [
        ((10, 0, 32, 50000), 0.2),
        ((10, 400, 32, 50000), 0.17779002578006933),
        ((10, 400, 1, 50000), 0.04),
        ((10, 400, 32, 50000, 0.9), 0.11264173874894025),
        ((22.437442, 640.403378, 8, 1280), 0.07696560971291978),
        ((2, 3, 10, math.inf, 0.9), 0.78350515463917525),  # kappa 0.1, from the formula by hand
    ],
)
def test_largest_learning_rate(arguments: tuple[float, ...], limit: float) -> None:
    assert theory.largest_learning_rate(*arguments) == exactly(limit)


def test_stable_curvatures() -> None:
    found = theory.stable_curvatures(ETA, 400, 32, 50000)
    assert found == (exactly(0.645442279027667), exactly(19.354557720972334))
    assert theory.stable_curvatures(ETA, 400, 1, 50000) is None


def test_break_even_curvature() -> None:
    assert theory.break_even_curvature(ETA, 200, 32, 50000) == exactly(13.75387507750155)
    assert theory.break_even_curvature(ETA, 1e6, 32, 50000) == 0


def test_thresholds_of_sgd() -> None:
    assert theory.momentum_threshold(ETA) == exactly(20)
    assert theory.momentum_threshold(ETA, 0.9) == exactly(38)
    assert theory.nesterov_threshold(ETA, 0.9) == exactly(13.571428571428573)
    assert theory.momentum_threshold(ETA, 0.9, 0.5) == exactly(76)
    assert theory.momentum_threshold(ETA, weight_decay=1e-4) == exactly(19.9999)
    assert theory.nesterov_threshold(ETA, 0.9, 1.0) == exactly(12.571428571428573)
    assert theory.minibatch_threshold(ETA) == exactly(20)


def test_thresholds_of_preconditioned_optimizers() -> None:
    assert theory.adam_threshold(ETA, 0.9) == exactly(380)
    assert theory.adam_threshold(ETA, 0.95) == exactly(780)
    assert theory.adamw_threshold(ETA, 0.9, 0.1) == exactly(378.1)
    assert theory.adam_threshold(3e-4, 0.9) == exactly(126666.66666666667)
    assert theory.adamw_threshold(3e-4, 0.9, 0.1) == exactly(126664.76666666669)
    assert theory.rmsprop_threshold(ETA) == exactly(20)
    assert theory.rmsprop_threshold(ETA, 0.9) == exactly(38)


def test_covariance_from_a_gram_matrix() -> None:
    assert theory.gram_factor(128, 50000) == exactly(128.32595444337505)
    assert theory.gram_factor(32, 1280) == exactly(32.794871794871796)
    assert theory.corrected_top_eigenvalue(0.5, 2, 25) == exactly(0.4375)
    assert theory.minibatch_variance(36.72834631822353, 32, 1280) == exactly(1.1199417563805454)
    assert theory.resolution_limit(25) == exactly(14.4)


def test_return_length() -> None:
    assert theory.return_length(ETA, 20) == exactly(1)
    assert theory.return_length(ETA, 5) == exactly(4)


# --- Brute force -------------------------------------------------------------------------------


def test_the_distance_of_a_batch_gradient_is_the_mean_over_all_batches() -> None:
    gradients = np.random.default_rng(0).normal(size=(6, 3))
    centred = gradients - gradients.mean(axis=0)
    trace = float(np.sum(centred**2)) / 6
    pairs = [(centred[i] + centred[j]) / 2 for i in range(6) for j in range(i)]
    expected = float(np.mean([pair @ pair for pair in pairs]))
    assert theory.minibatch_variance(trace, 2, 6) == exactly(expected)
    assert theory.gram_factor(2, 6) * expected == exactly(trace)


def test_the_second_moment_is_the_mean_over_all_batches() -> None:
    curvatures = np.random.default_rng(1).gamma(2.0, size=7)
    means = [
        (curvatures[i] + curvatures[j] + curvatures[k]) / 3
        for i in range(7)
        for j in range(i)
        for k in range(j)
    ]
    expected = float(np.mean((1 - 0.7 * np.array(means)) ** 2))
    found = theory.second_moment_factor(0.7, curvatures.mean(), curvatures.var(), 3, 7)
    assert found == exactly(expected)


def test_the_bias_of_the_top_eigenvalue() -> None:
    """The first order in 1/Lb, against Gaussian samples whose noise is far smaller than it."""
    eigenvalues, count, draws = np.array([4.0, 1.0, 0.5]), 40, 20_000
    generator = np.random.default_rng(0)
    samples = generator.standard_normal((draws, count, 3)) * np.sqrt(eigenvalues)
    centred = samples - samples.mean(axis=1, keepdims=True)
    tops = np.linalg.eigvalsh(np.swapaxes(centred, 1, 2) @ centred / (count - 1))[:, -1]
    expected = theory.top_eigenvalue_bias(eigenvalues, count)
    assert tops.mean() - 4.0 == pytest.approx(expected, rel=0.15)


def test_the_correction_takes_off_the_bias_of_a_top_far_above_the_others() -> None:
    eigenvalues = [1000.0, 1.0, 1.0]
    bias = theory.top_eigenvalue_bias(eigenvalues, 25)
    corrected = theory.corrected_top_eigenvalue(1000.0, 1002.0, 25)
    assert 1000.0 - corrected == pytest.approx(bias, rel=2e-3)


# --- Properties --------------------------------------------------------------------------------


@given(positive, positive, batches, momenta, st.none() | st.integers(1, 10**6))
def test_all_forms_of_the_noise_criterion_have_the_same_edge(
    curvature: float, variance: float, batch: int, momentum: float, more: int | None
) -> None:
    total = math.inf if more is None else batch + more
    rate = theory.largest_learning_rate(curvature, variance, batch, total, momentum)
    shares = theory.stability_shares(rate, curvature, variance, batch, total, momentum)
    assert shares.ratio == pytest.approx(1, rel=1e-9)
    assert min(shares) >= 0
    smallest = theory.smallest_batch_size(rate, curvature, variance, total, momentum)
    if shares.noise > 1e-8:  # less is lost in the rounding of a difference
        assert smallest == pytest.approx(batch, rel=1e-6)
    interval = theory.stable_curvatures(rate * (1 - 1e-9), variance, batch, total, momentum)
    assert interval is not None
    low, high = interval
    assert min(abs(low / curvature - 1), abs(high / curvature - 1)) < 1e-3
    if momentum == 0:
        factor = theory.second_moment_factor(rate, curvature, variance, batch, total)
        assert factor == pytest.approx(1, rel=1e-6)


@given(positive, positive, batches, momenta)
def test_noise_only_ever_lowers_the_limit(
    curvature: float, variance: float, batch: int, momentum: float
) -> None:
    quiet = theory.largest_learning_rate(curvature, 0.0, batch, momentum=momentum)
    noisy = theory.largest_learning_rate(curvature, variance, batch, momentum=momentum)
    more = theory.largest_learning_rate(curvature, variance, batch + 1, momentum=momentum)
    assert noisy < more * (1 + EXACT) <= quiet * (1 + 2 * EXACT)
    assert theory.momentum_threshold(quiet, momentum) == pytest.approx(curvature)


@given(positive, positive, batches)
def test_break_even_comes_earlier_with_larger_steps_and_smaller_batches(
    rate: float, ratio: float, batch: int
) -> None:
    here = theory.break_even_curvature(rate, ratio, batch)
    assert theory.break_even_curvature(2 * rate, ratio, batch) <= here
    assert theory.break_even_curvature(rate, ratio, 2 * batch) >= here


@given(st.floats(1e-3, 1), positive, batches)
def test_at_break_even_the_limit_is_the_learning_rate(
    rate: float, ratio: float, batch: int
) -> None:
    """With s² = ratio x lambda, as the two assumptions have it."""
    curvature = theory.break_even_curvature(rate, ratio, batch)
    if curvature > 1e-3 / rate:
        limit = theory.largest_learning_rate(curvature, ratio * curvature, batch)
        assert limit == pytest.approx(rate, rel=1e-6)


@given(positive, momenta)
def test_thresholds_agree_where_optimizers_do(rate: float, momentum: float) -> None:
    plain = theory.momentum_threshold(rate)
    assert theory.nesterov_threshold(rate) == exactly(plain)
    assert theory.adam_threshold(rate, 0.0) == exactly(plain)
    # The averaging momentum of Adam is heavy ball with a dampening of beta.
    averaging = theory.momentum_threshold(rate, momentum, momentum)
    assert theory.adam_threshold(rate, momentum) == exactly(averaging)
    edge = lr_batch_ratio.ratio_law_limit(momentum, 1e12) / rate
    assert theory.momentum_threshold(rate, momentum) == pytest.approx(edge, rel=1e-9)


# --- The optimizer that is running -------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "value"),
    [
        ("SGD", {}, 20),
        ("SGD", {"momentum": 0.9, "dampening": 0.0}, 38),
        ("SGD", {"momentum": 0.9, "dampening": 0.5}, 76),
        ("SGD", {"momentum": 0.0, "dampening": 0.5}, 20),
        ("SGD", {"momentum": 0.9, "dampening": 0.0, "nesterov": True}, 13.571428571428573),
        ("SGD", {"momentum": 0.9, "weight_decay": 1.0}, 37),
        ("Adam", {"betas": (0.9, 0.999)}, 380),
        ("Adam", {"betas": (0.95, 0.999), "weight_decay": 0.1}, 780),
        ("AdamW", {"betas": (0.9, 0.999), "weight_decay": 0.1}, 378.1),
        ("RMSprop", {"momentum": 0.0}, 20),
        ("RMSprop", {"momentum": 0.9, "weight_decay": 0.1}, 38),
    ],
)
def test_threshold_of_an_optimizer(name: str, settings: dict[str, object], value: float) -> None:
    found = theory.threshold_of(name, [ETA, ETA], **settings)  # type: ignore[arg-type]
    assert found.known
    assert found.value == exactly(value)
    assert found.preconditioned == (name != "SGD")


@pytest.mark.parametrize(
    ("name", "rates", "settings", "words"),
    [
        ("", [ETA], {}, "unknown"),
        ("NAdam", [ETA], {"betas": (0.9, 0.999)}, "NAdam"),
        ("SGD+Adam", [ETA], {}, "SGD+Adam"),
        ("Muon", [ETA], {"momentum": 0.95}, "Muon"),
        ("SGD", [], {}, "no learning rate"),
        ("SGD", [ETA, 0.2], {}, "different learning rates"),
        ("SGD", [0.0], {}, "is 0"),
        ("SGD", [-0.1], {}, "not a positive number"),
        ("SGD", [math.nan], {}, "not a positive number"),
        ("SGD", [ETA], {"momentum": 1.0}, "momentum"),
        ("SGD", [ETA], {"momentum": 0.9, "dampening": 1.0}, "dampening"),
        ("SGD", [ETA], {"weight_decay": 20.0}, "weight decay alone"),
        ("SGD", [ETA], {"weight_decay": -1.0}, "weight decay"),
        ("Adam", [ETA], {}, "betas of Adam"),
        ("Adam", [ETA], {"betas": (1.0, 0.9)}, "beta1"),
        ("RMSprop", [ETA], {"momentum": -0.5}, "momentum"),
        ("SGD", [5e-324], {}, "too extreme"),
    ],
)
def test_there_is_a_reason_for_no_threshold(
    name: str, rates: list[float], settings: dict[str, object], words: str
) -> None:
    found = theory.threshold_of(name, rates, **settings)  # type: ignore[arg-type]
    assert math.isnan(found.value)
    assert words in found.because
    assert not found.known


@given(
    st.sampled_from(["SGD", "Adam", "AdamW", "RMSprop", "Lion", ""]),
    st.lists(st.floats(), max_size=2),
    st.none() | st.floats(),
    st.none() | st.floats(),
    st.booleans(),
    st.none() | st.lists(st.floats(), max_size=2),
    st.none() | st.floats(),
)
def test_no_settings_make_it_raise(
    name: str,
    rates: list[float],
    momentum: float | None,
    dampening: float | None,
    nesterov: bool,
    betas: list[float] | None,
    decay: float | None,
) -> None:
    found = theory.threshold_of(
        name,
        rates,
        momentum=momentum,
        dampening=dampening,
        nesterov=nesterov,
        betas=betas,
        weight_decay=decay,
    )
    assert 0 < found.value < math.inf if found.known else math.isnan(found.value)
    assert theory.settled_step(name, betas) >= 0


def test_the_preconditioner_settles() -> None:
    assert theory.settled_step("SGD", None) == 0
    assert theory.settled_step("Adam", (0.9, 0.999)) == pytest.approx(100)
    assert theory.settled_step("AdamW", (0.9, 0.95)) == 10  # and not 2
    assert theory.settled_step("RMSprop") == 100
    assert theory.settled_step("Adam", None) == math.inf


# --- Edges and errors --------------------------------------------------------------------------


def test_smallest_batches_at_the_edges() -> None:
    assert theory.smallest_batch_size(ETA, 10, 0) == 1  # no noise
    assert theory.smallest_batch_size(1e-3, 10, 1) == 1  # room for all of it
    assert theory.smallest_batch_size(0.2, 10, 400) == math.inf  # no room and no end of data
    assert theory.smallest_batch_size(0.2, 10, 400, 1000) == 1000
    assert theory.smallest_batch_size(0.21, 10, 400, 1000) == math.inf


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda: theory.noise_factor(0), "batch_size"),
        (lambda: theory.noise_factor(11, 10), "train_size"),
        (lambda: theory.second_moment_factor(-0.1, 1, 1, 1), "learning_rate"),
        (lambda: theory.second_moment_factor(0.1, math.nan, 1, 1), "curvature"),
        (lambda: theory.largest_learning_rate(0, 1, 1), "curvature"),
        (lambda: theory.largest_learning_rate(1, -1, 1), "curvature_variance"),
        (lambda: theory.largest_learning_rate(1, 1, 1, momentum=1.0), "momentum"),
        (lambda: theory.stability_shares(-1, 1, 1, 1), "learning_rate"),
        (lambda: theory.stability_shares(0.1, -1, 1, 1), "curvature"),
        (lambda: theory.stable_curvatures(0, 1, 1), "learning_rate"),
        (lambda: theory.smallest_batch_size(0.1, -1, 1), "curvature"),
        (lambda: theory.smallest_batch_size(0.1, 1, 1, 0.5), "train_size"),
        (lambda: theory.break_even_curvature(0.1, -1, 1), "ratio"),
        (lambda: theory.momentum_threshold(0), "learning_rate"),
        (lambda: theory.momentum_threshold(0.1, 1.0), "momentum"),
        (lambda: theory.momentum_threshold(0.1, 0.9, 1.0), "dampening"),
        (lambda: theory.momentum_threshold(0.1, weight_decay=-1), "weight_decay"),
        (lambda: theory.nesterov_threshold(0.1, -0.1), "momentum"),
        (lambda: theory.adam_threshold(0.1, 1.0), "beta1"),
        (lambda: theory.adamw_threshold(math.inf), "learning_rate"),
        (lambda: theory.rmsprop_threshold(0.1, 1.0), "momentum"),
        (lambda: theory.return_length(0.1, 0), "curvature"),
        (lambda: theory.minibatch_variance(-1, 1), "covariance_trace"),
        (lambda: theory.gram_factor(5, 5), "train_size"),
        (lambda: theory.corrected_top_eigenvalue(1, 2, 1), "count"),
        (lambda: theory.corrected_top_eigenvalue(math.inf, 2, 2), "top"),
        (lambda: theory.top_eigenvalue_bias([1.0, 1.0], 5), "simple"),
        (lambda: theory.top_eigenvalue_bias([1.0, -1.0], 5), "at least 0"),
        (lambda: theory.resolution_limit(1), "count"),
    ],
)
def test_wrong_input_is_named(call: Callable[[], object], names: str) -> None:
    with pytest.raises(ConfigError, match=names):
        call()

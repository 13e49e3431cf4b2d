"""Running means: closed forms, errors that are right, memory that does not grow."""

import json
import math
import random
import statistics
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradwatch.errors import ConfigError
from gradwatch.numerics.running import (
    BLOCKS,
    MOST_BLOCKS,
    BlockMeans,
    Window,
    mean_of,
    ratio_of_means,
    reading_of,
    slope_of,
    where_defined,
)
from gradwatch.records import Measurement

ANY = st.floats()
VALUES = st.lists(ANY, max_size=60)
MODERATE = st.floats(-1e6, 1e6)


def autoregressive(count: int, memory: float, seed: int) -> list[float]:
    """Readings of mean 1 whose errors forget with the rate `memory`."""
    generator = random.Random(seed)
    error, values = 0.0, []
    for _ in range(count):
        error = memory * error + generator.gauss(0.0, 1.0)
        values.append(1.0 + error)
    return values


def textbook(values: list[float]) -> float:
    """The standard error of the mean of independent readings."""
    return statistics.stdev(values) / math.sqrt(len(values))


def of_differences(values: list[float]) -> float:
    """The same from the differences of neighbours."""
    squares = [(two - one) ** 2 for one, two in pairwise(values)]
    return math.sqrt(statistics.mean(squares) / 2 / len(values))


@pytest.mark.parametrize("values", [[1.0, 2.0, 4.0], [4.0, 1.0, 4.0, 1.0, 3.0]])
def test_the_error_of_few_readings_is_the_larger_of_two(values: list[float]) -> None:
    estimate = mean_of(values)
    assert estimate.value == pytest.approx(statistics.mean(values))
    expected = max(textbook(values), of_differences(values))
    assert estimate.standard_error == pytest.approx(expected)


def test_two_readings_have_no_error() -> None:
    means = block_means([1.0, 4.0])
    assert mean_of([1.0, 4.0]).error is None
    assert means.estimate.error is None
    assert not mean_of([1.0, 1.0]).significant
    means.add(1.0)
    assert means.estimate.error == pytest.approx(of_differences([1.0, 4.0, 1.0]))


def drifting(drift: float) -> list[float]:
    generator = random.Random(0)
    return [drift * math.exp(-place / 1000) + generator.gauss(0.0, 1.0) for place in range(1000)]


def block_means(values: list[float]) -> BlockMeans:
    means = BlockMeans()
    for value in values:
        means.add(value)
    return means


def test_a_drift_is_an_error_of_a_mean_that_stands_for_the_value_of_now() -> None:
    window = Window(1000)
    for value in drifting(2.0):
        window.add(value, 1.0)
    still = mean_of(drifting(0.0)).standard_error
    for estimate in (window.mean(), window.ratio(), mean_of(drifting(2.0))):
        assert estimate.standard_error > 2 * still
        # It covers the spread of a drift from 2.0 to 0.7, cut into 20 blocks.
        assert estimate.standard_error == pytest.approx(1.27 / 12**0.5 / 20**0.5, rel=0.2)


def test_a_drift_is_no_error_of_the_mean_of_a_whole_training() -> None:
    still = block_means(drifting(0.0)).estimate.standard_error
    moving = block_means(drifting(2.0)).estimate.standard_error
    assert moving == pytest.approx(still, rel=0.2)


def test_without_readings_nothing_is_known() -> None:
    assert math.isnan(mean_of([]).value)
    assert mean_of([2.0]).value == 2.0
    assert mean_of([2.0]).error is None
    assert math.isnan(ratio_of_means([1.0], [0.0]).value)


@pytest.mark.parametrize("memory", [0.0, 0.5])
def test_errors_cover_the_truth_even_if_neighbours_resemble_one_another(memory: float) -> None:
    inside = 0
    for seed in range(200):
        estimate = mean_of(autoregressive(200, memory, seed))
        inside += abs(estimate.value - 1.0) < 2.1 * estimate.standard_error
    assert inside / 200 > 0.88  # 95 % for independent readings
    # As if independent they would be covered in 75 % of the cases only (memory 0.5).


def test_a_ratio_of_means_is_no_mean_of_ratios() -> None:
    generator = random.Random(0)
    bottoms = [math.exp(generator.gauss(0.0, 0.7)) for _ in range(2000)]
    tops = [3.0 * math.exp(generator.gauss(0.0, 0.7)) for _ in bottoms]
    estimate = ratio_of_means(tops, bottoms)
    assert abs(estimate.value - 3.0) < 3 * estimate.standard_error
    assert estimate.relative_error == pytest.approx(math.sqrt(2 * math.expm1(0.49) / 2000), rel=0.5)
    naive = sum(top / bottom for top, bottom in zip(tops, bottoms, strict=True)) / 2000
    assert naive > 3.0 + 10 * estimate.standard_error


def test_a_ratio_of_proportional_readings_has_no_error() -> None:
    values = [1.0, 5.0, 2.0, 8.0]
    estimate = ratio_of_means([2 * value for value in values], values)
    assert (estimate.value, estimate.standard_error) == (2.0, 0.0)


@pytest.mark.parametrize(
    ("values", "significant"), [([1.0] * 4, True), ([1.0, -1.0, 1.0], False), ([-1.0] * 4, False)]
)
def test_significant_is_positive_beyond_two_errors(values: list[float], significant: bool) -> None:
    assert mean_of(values).significant is significant


def test_a_slope_through_a_straight_line_is_exact() -> None:
    estimate = slope_of([0.0, 10.0, 20.0, 40.0], [5.0, 3.0, 1.0, -3.0])
    assert estimate.value == pytest.approx(-0.2)
    assert estimate.standard_error == pytest.approx(0.0, abs=1e-12)


def test_a_slope_through_noise_is_within_its_error() -> None:
    generator = random.Random(1)
    places = [float(index) for index in range(100)]
    slopes = [
        slope_of(places, [0.3 * place + generator.gauss(0.0, 5.0) for place in places])
        for _ in range(200)
    ]
    inside = sum(abs(slope.value - 0.3) < 2 * slope.standard_error for slope in slopes)
    assert 0.9 < inside / 200 <= 0.99


def test_a_slope_needs_three_readings_at_two_places() -> None:
    assert math.isnan(slope_of([0.0, 1.0], [0.0, 1.0]).value)
    assert math.isnan(slope_of([1.0, 1.0, 1.0], [0.0, 1.0, 2.0]).value)


def test_a_window_keeps_the_newest() -> None:
    window = Window(3)
    for value in range(5):
        window.add(float(value), 1.0)
    assert window.column(0) == [2.0, 3.0, 4.0]
    assert window.mean().value == 3.0
    assert window.ratio().value == 3.0


@given(st.lists(st.tuples(MODERATE, st.floats(0.1, 10)), min_size=1, max_size=500))
def test_block_means_are_the_weighted_mean_in_constant_memory(
    readings: list[tuple[float, float]],
) -> None:
    means = BlockMeans()
    for value, weight in readings:
        means.add(value, weight)
    weights = sum(weight for _, weight in readings)
    expected = sum(value * weight for value, weight in readings) / weights
    assert means.estimate.value == pytest.approx(expected, rel=1e-9, abs=1e-6)
    assert means.weight == pytest.approx(weights)
    assert means.count == len(readings)
    blocks = len(means.state_dict()["blocks"])
    assert blocks <= MOST_BLOCKS
    assert blocks >= min(BLOCKS, len(readings))


def test_block_means_see_correlations_of_many_readings() -> None:
    """A mean over 4000 readings that stay alike for 20: its error is that of 200 readings."""
    inside = 0
    for seed in range(60):
        means = BlockMeans()
        for value in autoregressive(200, 0.0, seed):
            for _ in range(20):
                means.add(value)
        inside += abs(means.estimate.value - 1.0) < 2.1 * means.estimate.standard_error
    assert inside / 60 > 0.85


@given(st.lists(MODERATE, max_size=120), st.lists(MODERATE, max_size=60))
def test_a_resumed_sum_goes_on_as_if_nothing_had_happened(
    before: list[float], after: list[float]
) -> None:
    window, means = Window(30), BlockMeans()
    for value in before:
        window.add(value)
        means.add(value, 2.0)
    resumed_window, resumed = Window(30), BlockMeans()
    resumed_window.load_state_dict(json.loads(json.dumps(window.state_dict())))
    resumed.load_state_dict(json.loads(json.dumps(means.state_dict())))
    for value in after:
        for one in (window, resumed_window):
            one.add(value)
        for other in (means, resumed):
            other.add(value)
    assert resumed_window.column() == window.column()
    assert resumed.state_dict() == means.state_dict()


@given(VALUES, VALUES)
def test_no_reading_can_make_it_raise(tops: list[float], bottoms: list[float]) -> None:
    count = min(len(tops), len(bottoms))
    estimate = ratio_of_means(tops[:count], bottoms[:count])
    assert estimate.count == count
    assert math.isnan(estimate.standard_error) or estimate.standard_error >= 0
    assert estimate.significant in {True, False}
    assert math.isnan(estimate.relative_error) or estimate.relative_error >= 0
    slope_of(tops[:count], bottoms[:count])


def test_only_finite_values_of_the_model_enter() -> None:
    def value(scope: str, number: float) -> Measurement:
        return Measurement(metric="loss", scope=scope, step=0, value=number)

    assert reading_of([value("layer", 1.0), value("model", 2.0)], "loss") == value("model", 2.0)
    assert reading_of([value("model", math.nan)], "loss") is None
    assert reading_of([value("model", math.inf)], "loss") is None
    assert reading_of([value("model", 2.0)], "other") is None


def test_a_formula_outside_its_range_has_no_value() -> None:
    def root(value: float) -> float:
        if value < 0:
            raise ConfigError("negative")
        return 1.0 / value

    assert where_defined(root, 2.0) == 0.5
    assert where_defined(root, -1.0) is None
    assert where_defined(root, 0.0) is None
    assert where_defined(root, math.nan) is None

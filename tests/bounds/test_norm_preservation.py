"""Norm preservation as verdicts: the law, its tolerance, and its silences."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradwatch.bounds import ChainNormPreservation, NormPreservation, StableWidth
from gradwatch.bounds.norm_preservation import by_fan_out, expected_log_gain
from gradwatch.records import Interval, LayerInfo, Measurement, ModelInfo, StepInfo

KAPPA = 5.0


def layer(position: int = 0, width: int = 256, fan_in: int = 256, **changes: object) -> LayerInfo:
    """A He-initialised ReLU layer of a chain, as measured at step 0."""
    facts: dict[str, object] = {
        "name": f"layer{position}",
        "kind": "Linear",
        "fan_in": fan_in,
        "fan_out": width,
        "width": width,
        "activation": "relu",
        "kappa": KAPPA,
        "segment": 0,
        "position": position,
        "weight_variance": 2 / fan_in,
        "weight_kurtosis": 3.0,
        "alignment": 0.0,
        "input_mean_square": 1.0,
        "bias_share": 0.0,
    }
    return LayerInfo(**{**facts, **changes})  # type: ignore[arg-type]


def model(*layers: LayerInfo, **changes: object) -> ModelInfo:
    return ModelInfo(layers=layers, **changes)  # type: ignore[arg-type]


def gain(value: float = 1.0, scope: str = "layer0") -> Measurement:
    return Measurement(metric="activation_gain", scope=scope, step=0, value=value)


def interval(info: ModelInfo, scope: str = "layer0", step: int = 0) -> Interval | None:
    return NormPreservation().interval(gain(scope=scope), StepInfo(step=step), info)


def decided(info: ModelInfo, scope: str = "layer0") -> Interval:
    found = interval(info, scope)
    assert found is not None
    return found


def test_the_tolerance_is_four_standard_deviations_of_the_law() -> None:
    found = decided(model(layer(0), layer(1)))
    tolerance = 4 * math.sqrt(5 / 256)
    assert found.lower == pytest.approx(math.exp(-tolerance))
    assert found.upper == pytest.approx(math.exp(tolerance))
    assert (found.kind, found.undecided, found.vacuous) == ("law", "", "")


def test_the_tolerance_of_a_very_wide_layer_stops_at_ten_percent() -> None:
    wide = [layer(index, 10**6, 10**6) for index in range(2)]
    assert decided(model(*wide)).upper == pytest.approx(math.exp(0.1))


def test_fan_out_weights_of_a_chain_are_judged_by_the_norm() -> None:
    widths = [64, 512, 128, 1024]
    chain = [
        layer(i, width, fan_in, weight_variance=2 / width)
        for i, (fan_in, width) in enumerate(pairwise(widths))
    ]
    assert by_fan_out(tuple(chain))
    middle = decided(model(*chain))
    assert math.sqrt(middle.lower * middle.upper) == pytest.approx(64 / 512)


def test_fan_in_weights_are_judged_by_the_mean_square_whatever_the_widths() -> None:
    widths = [64, 512, 128, 1024]
    sizes = enumerate(pairwise(widths))
    chain = tuple(layer(i, width, fan_in) for i, (fan_in, width) in sizes)
    assert not by_fan_out(chain)
    middle = decided(model(*chain))
    assert math.sqrt(middle.lower * middle.upper) == pytest.approx(1.0)


def test_padding_lowers_what_is_expected() -> None:
    padded = layer(0, padding_factor=0.84)
    assert expected_log_gain(padded, fan_out=False) == pytest.approx(math.log(0.84))


@pytest.mark.parametrize("name", ["gelu", "silu", "tanh", "elu"])
def test_a_curved_activation_has_its_fixed_point_at_its_own_second_moment(name: str) -> None:
    moment = {"gelu": 0.4252214826, "silu": 0.3557755198, "tanh": 0.3942944904, "elu": 0.6449454175}
    fixed = layer(0, activation=name, input_mean_square=moment[name])
    assert expected_log_gain(fixed, fan_out=False) == pytest.approx(0, abs=1e-8)


def test_tanh_away_from_unit_mean_square_uses_the_moment_there() -> None:
    # far below saturation tanh is the identity, so gain² = 2.536175433 shows unchanged
    small = layer(0, activation="tanh", input_mean_square=1e-6)
    assert expected_log_gain(small, fan_out=False) == pytest.approx(math.log(2.536175433), rel=1e-4)


SILENCES = {
    "a later step": (model(layer(0), layer(1)), 1),
    "a layer alone between two others that are no chain": (model(layer(0)), 0),
    "a layer that belongs to no chain": (model(layer(0, segment=None), layer(1)), 0),
}


@pytest.mark.parametrize("why", SILENCES)
def test_says_nothing_about(why: str) -> None:
    info, step = SILENCES[why]
    assert interval(info, step=step) is None


UNDECIDED = {
    "an optimizer that has state": (
        model(layer(0), layer(1), untouched_optimizer=False), "not the initialisation",
    ),
    "zero weights": (model(layer(0, weight_variance=0.0), layer(1)), "all zero"),
    "weights that are not finite": (
        model(layer(0, weight_variance=math.nan), layer(1)), "not finite",
    ),
    "weights that fit the data": (model(layer(0, alignment=1.5), layer(1)), "no fresh random"),
    "heavy-tailed weights": (model(layer(0, weight_kurtosis=9.0), layer(1)), "no fresh random"),
    "constant weights": (model(layer(0, weight_kurtosis=1.0), layer(1)), "no fresh random"),
    "weights nobody saw": (model(layer(0, weight_kurtosis=None), layer(1)), "no fresh random"),
    "a one-hot input": (model(layer(0, one_hot_input=True), layer(1)), "one-hot"),
    "fewer than 16 units": (model(layer(0, 15), layer(1, 256, 15)), "only 15 units"),
    "a curved activation far from its fixed point": (
        model(layer(0, activation="gelu", input_mean_square=0.1), layer(1)), "near unit variance",
    ),
}  # fmt: skip


@pytest.mark.parametrize("why", UNDECIDED)
def test_is_undecided_with_the_reason_for(why: str) -> None:
    info, words = UNDECIDED[why]
    assert words in decided(info).undecided


def test_biases_do_not_make_it_undecided_because_the_gain_is_measured_without_them() -> None:
    assert not decided(model(layer(0, has_bias=True, bias_share=0.9), layer(1))).undecided


@given(st.floats(1.5, 3.5), st.integers(16, 4096), st.floats(-0.25, 0.25))
def test_every_fresh_random_draw_is_decided(kurtosis: float, width: int, alignment: float) -> None:
    fresh = layer(0, width, weight_kurtosis=kurtosis, alignment=alignment)
    assert decided(model(fresh, layer(1, 256, width))).undecided == ""


def chain_interval(info: ModelInfo, scope: str) -> Interval:
    measurement = Measurement(metric="activation_gain_cumulative", scope=scope, step=0, value=1.0)
    found = ChainNormPreservation().interval(measurement, StepInfo(step=0), info)
    assert found is not None
    return found


def test_a_chain_is_judged_by_its_log_normal_law() -> None:
    info = model(*(layer(index, 100, 100) for index in range(10)))
    found = chain_interval(info, "layer9")
    # z = (log R + V/2)/sqrt(V) with V = 10 * 5/100; |z| = 4 at the edges
    for edge, z in ((found.lower, -4), (found.upper, 4)):
        assert (math.log(edge) + 0.25) / math.sqrt(0.5) == pytest.approx(z)


def test_a_chain_is_judged_up_to_the_layer_that_is_asked_for() -> None:
    info = model(*(layer(index) for index in range(6)))
    first, last = chain_interval(info, "layer0"), chain_interval(info, "layer5")
    assert last.lower < first.lower
    assert last.upper > first.upper


def test_a_doubt_upstream_leaves_everything_downstream_undecided() -> None:
    info = model(layer(0), layer(1, alignment=2.0), layer(2))
    assert chain_interval(info, "layer0").undecided == ""
    assert "layer1" in chain_interval(info, "layer2").undecided


def width_interval(info: ModelInfo) -> Interval | None:
    scope = info.layers[-1].name
    measurement = Measurement(metric="gain_log_variance", scope=scope, step=0, value=1.0)
    return StableWidth().interval(measurement, StepInfo(step=0), info)


def test_width_allows_a_quarter_of_variance() -> None:
    found = width_interval(model(layer(0), layer(1)))
    assert found == Interval(lower=0.0, upper=0.25, kind="law")


def test_width_is_decided_for_narrow_layers_too() -> None:
    found = width_interval(model(layer(0, 8, 8), layer(1, 8, 8)))
    assert found is not None
    assert found.undecided == ""


def test_width_is_undecided_for_convolutions() -> None:
    conv = layer(0, 16, 144, kind="Conv2d")
    found = width_interval(model(conv, replace(conv, name="layer1", position=1)))
    assert found is not None
    assert "upper bound" in found.undecided

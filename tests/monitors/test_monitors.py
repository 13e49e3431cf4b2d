"""Each monitor on a view made of fixed tensors."""

import math
from collections.abc import Iterable

import pytest
import torch

from gradwatch import monitors, presets
from gradwatch.capture.view import NamedValues, StepView
from gradwatch.interfaces import Monitor
from gradwatch.numerics.reading import Reading
from gradwatch.records import LayerInfo, ModelInfo

Values = dict[tuple[str, str], float]


def named(**values: float) -> NamedValues:
    return NamedValues(tuple(values), torch.tensor(list(values.values())))


def view(**changes: object) -> StepView:
    fields: dict[str, object] = {
        "step": 4,
        "model": ModelInfo(),
        "gradient_norms": named(weight=3.0, bias=4.0),
        "parameter_norms": named(weight=6.0, bias=8.0, unused=24.0),
        "update_norms": named(weight=0.3, bias=0.4),
        "unmoved_fractions": named(weight=0.5, bias=0.0),
        "activation_norms": named(first=2.0, last=1.0),
        "loss": torch.tensor(0.7),
        "lr": 0.1,
        "batch_size": 32,
    }
    return StepView(**{**fields, **changes})  # type: ignore[arg-type]


def read(monitor: Monitor, of: StepView) -> Values:
    result = monitor.read(of)
    readings: Iterable[Reading] = [result] if isinstance(result, Reading) else result
    return {
        (reading.metric, scope): value
        for reading in readings
        for scope, value in zip(reading.scopes, reading.values.reshape(-1).tolist(), strict=True)
    }


def test_gradient_norm_of_the_model_is_the_norm_of_its_parts() -> None:
    values = read(monitors.GradientNorm(), view())
    assert values["gradient_norm_used", "model"] == 5.0
    assert values["gradient_norm_used", "bias"] == 4.0


def test_the_raw_norm_is_never_guessed() -> None:
    given = view()
    values = read(monitors.GradientNorm(), given)
    assert not any(metric in {"gradient_norm", "clip_coefficient"} for metric, _ in values)
    assert any("cannot see whether gradients are clipped" in note for note in given.notes)


def test_both_sides_of_clipping_where_they_are_seen() -> None:
    seen = view(raw_gradient_norms=named(weight=6.0, bias=8.0), clip_coefficient=torch.tensor(0.5))
    values = read(monitors.GradientNorm(), seen)
    assert values["gradient_norm", "model"] == 10.0
    assert values["gradient_norm", "weight"] == 6.0
    assert values["clip_coefficient", "model"] == 0.5
    assert seen.notes == []


def test_parameters_without_gradient_are_named() -> None:
    lost = view(without_gradient=tuple(f"layer{index}" for index in range(7)))
    read(monitors.GradientNorm(), lost)
    assert "no gradient reached layer0, layer1, layer2, layer3, layer4 and 2 more" in lost.notes


def test_a_step_without_any_gradient_says_so() -> None:
    empty = view(gradient_norms=NamedValues((), torch.zeros(0)))
    assert read(monitors.GradientNorm(), empty) == {}
    assert any("no parameter" in note for note in empty.notes)


def test_parameter_norm() -> None:
    assert read(monitors.ParameterNorm(), view()) == {
        ("parameter_norm", "model"): 26.0,
        ("parameter_norm", "weight"): 6.0,
        ("parameter_norm", "bias"): 8.0,
        ("parameter_norm", "unused"): 24.0,
    }


def test_update_ratio_is_relative_to_the_parameters_that_were_updated() -> None:
    values = read(monitors.UpdateRatio(), view())
    assert values["update_norm", "model"] == pytest.approx(0.5)
    assert values["update_ratio", "model"] == pytest.approx(0.05)
    assert values["update_ratio", "weight"] == pytest.approx(0.05)
    assert values["unmoved_fraction", "weight"] == 0.5


def test_a_parameter_that_is_and_stays_zero_has_the_ratio_zero() -> None:
    still = view(parameter_norms=named(bias=0.0), update_norms=named(bias=0.0))
    assert read(monitors.UpdateRatio(), still)["update_ratio", "bias"] == 0.0


def test_loss_or_the_reason_why_not() -> None:
    assert read(monitors.LossValue(), view())["loss", "model"] == pytest.approx(0.7)
    silent = view(loss=None)
    assert read(monitors.LossValue(), silent) == {}
    assert any("watch.observe(loss=loss)" in note for note in silent.notes)


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)])
def test_lr_batch_ratio(lr: float | torch.Tensor) -> None:
    values = read(monitors.LrBatchRatio(), view(lr=lr))
    assert values["lr_batch_ratio", "model"] == pytest.approx(0.1 / 32)
    assert values["batch_size", "model"] == 32


def test_lr_batch_ratio_needs_a_batch_size() -> None:
    blind = view(batch_size=None)
    assert read(monitors.LrBatchRatio(), blind) == {}
    assert any("watch.observe(batch_size=...)" in note for note in blind.notes)


def test_non_finite_counts_and_names() -> None:
    broken = view(gradient_norms=named(weight=math.nan, bias=1.0))
    values = read(monitors.NonFinite(), broken)
    assert values["nonfinite_gradient", "model"] == 1
    assert values["nonfinite_gradient", "weight"] == 1
    assert values["nonfinite_activation", "model"] == 0


def chained(name: str, position: int, width: int) -> LayerInfo:
    return LayerInfo(name=name, kind="Linear", width=width, kappa=5.0, segment=0, position=position)


def test_gains_multiply_along_a_chain() -> None:
    model = ModelInfo(layers=(chained("b", 1, 20), chained("a", 0, 10)))
    gains = NamedValues(("a", "b"), torch.log(torch.tensor([0.5, 0.25])))
    values = read(monitors.ActivationNorm(), view(model=model, activation_log_gains=gains))
    assert values["activation_gain", "b"] == pytest.approx(0.25)
    assert values["activation_gain_cumulative", "a"] == pytest.approx(0.5)
    assert values["activation_gain_cumulative", "b"] == pytest.approx(0.125)
    assert values["gain_log_variance", "b"] == pytest.approx(5 / 10 + 5 / 20)
    assert values["activation_norm", "first"] == 2.0


def test_without_a_forward_pass_the_reason_is_given() -> None:
    blind = view(activation_norms=NamedValues((), torch.zeros(0)))
    assert read(monitors.ActivationNorm(), blind) == {}
    assert any("no training forward" in note for note in blind.notes)


@pytest.mark.parametrize("monitor", presets.standard(), ids=lambda item: type(item).__name__)
def test_every_reading_is_declared(monitor: Monitor) -> None:
    assert {metric for metric, _ in read(monitor, view())} <= set(monitor.metrics)

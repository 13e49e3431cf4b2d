"""All rules of convergence and noise together, on histories that nobody planned."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from gradwatch.interfaces import Rule
from gradwatch.records import History, Measurement, ModelInfo, Recommendation, Report, StepInfo
from gradwatch.rules import (
    BatchSize,
    DataScale,
    Dropout,
    LearningRate,
    Momentum,
    Reliability,
    TrainingLength,
)

ANY = st.floats(allow_nan=True, allow_infinity=True)
NUMBERS = st.floats(1e-4, 1e4) | st.floats(0, 2) | ANY | st.sampled_from([0.0, -1.0, 1e-300, 1e300])
MASKS = {"keep": 0.5, "rates": 1.0, "law": 0.7, "data_variance": 0.1}
USUAL = {
    "stationarity_recent": 0.0219, "stationarity": 0.02, "noise_scale": 100.0, "stall_ratio": 1.1,
    "noise_scale_curvature": 120.0, "dropout_variance_share": 0.8, "input_mean_share": 0.9,
    "input_top_eigenvalue": 10.0, "smoothness": 0.7, "sharpness": 0.8,
    "preconditioned_sharpness": 20.0, "stability_ratio": 1.3, "noise_stability_ratio": 1.5,
    "covariance_ratio": 2.0, "batch_sharpness": 1.0,
}  # fmt: skip
CURVED = {
    "newest": 0.8, "relative_error": 0.01, "threshold": 0.7, "learning_rate": 0.3,
    "preconditioned": 0.0, "readings": 10.0, "sharpness": 0.8, "sharpness_variance": 1.0,
    "batch_size_limit": 20.0, "first_sharpness": 12.0, "first_step": 1500.0,
    "first_learning_rate": 0.3, "resolved": 1.0,
}  # fmt: skip
STEP = {
    "loss": st.none() | NUMBERS,
    "optimizer": st.sampled_from(["SGD", "Adam", "AdamW", "RMSprop", ""]),
    "lrs": st.lists(NUMBERS, max_size=2).map(tuple),
    "batch_size": st.none() | st.integers(1, 10**4),
    "momentum": st.none() | NUMBERS,
}


@st.composite
def histories(
    draw: st.DrawFn,
    report_of: Callable[..., Report],
    step_of: Callable[..., StepInfo],
    inputs: Mapping[str, float],
) -> History:
    """Usual runs of which a few numbers are at another scale, wild, or missing."""
    planned, size = draw(st.none() | st.integers(1, 10**6)), draw(st.none() | st.integers(1, 10**5))
    history = History(ModelInfo(planned_steps=planned, train_size=size))
    changed = draw(st.lists(st.sampled_from(sorted(STEP)), max_size=1))
    step: dict[str, Any] = {name: draw(STEP[name]) for name in changed}
    numbers = {
        **inputs,
        **draw(st.dictionaries(st.sampled_from(sorted(inputs)), NUMBERS, max_size=3)),
    }
    for name in draw(st.lists(st.sampled_from(sorted(inputs)), max_size=1)):
        del numbers[name]
    values = {**USUAL, **draw(st.dictionaries(st.sampled_from(sorted(USUAL)), NUMBERS, max_size=2))}
    error = draw(st.sampled_from([0.05, 0.0, 1.0, None]) | ANY)
    every = draw(st.sampled_from([1, 20]))
    losses = draw(st.sampled_from([(), (9.0,) * 11, (0.2, 0.2, 0.2, 0.2, 9.0, 9.0, 9.0, 9.0)]))
    for index in range(0, draw(st.integers(1, 11)) * every, every):
        loss = {"loss": losses[index // every % len(losses)]} if losses else {}
        measured = [
            Measurement(
                metric=metric,
                scope="model",
                step=1500 + index,
                value=value,
                standard_error=None if error is None else error * value,
                inputs=numbers,
            )
            for metric, value in values.items()
        ]
        history.append(
            report_of(step_of(1500 + index, **{**loss, **step}), measured, history.model)
        )
    return history


def rules(target: float | None) -> list[Rule]:
    return [
        LearningRate(target), BatchSize(target), Momentum(), Dropout(target),
        TrainingLength(target), DataScale(), Reliability(0.05),
    ]  # fmt: skip


def check(advice: list[Recommendation]) -> None:
    for item in advice:
        for setting in (item.current, item.proposed):
            assert setting is None or (math.isfinite(setting) and setting > 0)
        assert item.proposed is None or item.proposed != item.current
        assert item.reason
        assert item.source
        assert "nan" not in item.reason
    places = [(item.knob, item.scope) for item in advice]
    assert len(set(places)) == len(places)


@settings(max_examples=300)
@given(data=st.data(), target=st.none() | st.floats(1e-6, 1.0))
def test_whatever_was_measured_the_advice_is_usable(
    data: st.DataObject,
    target: float | None,
    report_of: Callable[..., Report],
    step_of: Callable[..., StepInfo],
    stationarity_inputs: Mapping[str, float],
    noise_scale_inputs: Mapping[str, float],
) -> None:
    usual = {**stationarity_inputs, **noise_scale_inputs, **MASKS, **CURVED}
    history = data.draw(histories(report_of, step_of, usual))
    advice = [item for rule in rules(target) for item in rule.advise(history)]
    check(advice)
    assert advice == [item for rule in rules(target) for item in rule.advise(history)]


NEAR = st.floats(-1, 1)


@settings(max_examples=200)
@given(
    exponents=st.tuples(NEAR, NEAR, NEAR, NEAR, NEAR, NEAR),
    scale=st.floats(-3, 4),
    target=st.none() | st.floats(1e-4, 1.0),
    edge=st.sampled_from([0.0, 0.5]),
    stall=st.floats(0, 2),
    plan=st.none() | st.integers(1000, 10**5),
    old=st.sampled_from([8, 2, 64]),
)
def test_around_a_usual_run_the_rules_never_contradict_one_another(
    exponents: tuple[float, ...],
    scale: float,
    target: float | None,
    edge: float,
    stall: float,
    plan: int | None,
    old: int,
    report_of: Callable[..., Report],
    step_of: Callable[..., StepInfo],
    stationarity: Callable[..., Measurement],
    noise_scale: Callable[..., Measurement],
    value_of: Callable[..., Measurement],
) -> None:
    names = ("smoothness", "variance", "step_size", "steps", "first_loss")
    usual = {"smoothness": 0.7, "variance": 1.5, "step_size": 0.3, "steps": 1500, "first_loss": 2.3}
    near = {name: usual[name] * 10**e for name, e in zip(names, exponents, strict=False)}
    window = stationarity(0.02 * 10 ** exponents[-1], edge_share=edge, **near)
    masks = value_of("dropout_variance_share", 0.8, 0.01, **MASKS)
    history = History(ModelInfo(planned_steps=plan))
    for step in range(0, 2200, 100):
        info = step_of(step, lrs=(near["step_size"],), batch_size=old if step < 1100 else 8)
        ratio = replace(value_of("stall_ratio", stall, 0.1), step=step)
        values = [window, noise_scale(10**scale), ratio, masks]
        history.append(report_of(info, values, history.model))
    advice = [item for rule in rules(target) for item in rule.advise(history)]
    check(advice)
    direction: dict[str, str] = {item.knob: item.direction for item in advice}
    # a smaller learning rate and a larger batch both mean less noise, their opposites more
    less = {"learning_rate": "down", "batch_size": "up", "dropout": "down"}
    says_less = {knob for knob in less if direction.get(knob) == less[knob]}
    says_more = {knob for knob in direction if knob in less} - says_less
    # a larger batch than a tenth of the noise scale is not about less noise, and goes with larger
    # steps
    assert not says_more or says_less <= {"batch_size"} - says_more
    if direction.get("learning_rate") == "down":
        assert "training_length" not in direction

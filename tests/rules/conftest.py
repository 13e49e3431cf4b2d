"""Histories as the rules see them, judged by the real bounds."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import pytest

from gradwatch.bounds import NoiseFloor, RandomlyStoppedSgd
from gradwatch.interfaces import Bound
from gradwatch.records import History, Interval, Measurement, ModelInfo, Report, StepInfo, Verdict

# A 64-32-10 network on digits after 1500 steps at lr 0.3 and batch 8.
INPUTS = {
    "step_term": 0.006,
    "noise_term": 0.0211,
    "estimates": 200.0,
    "clipped_share": 0.0,
    "lr_changes": 0.0,
    "edge_share": 0.0,
    "beyond_edge": 0.0,
    "lowest_loss": 0.0,
    "smallest_loss": 0.1,
    "first_loss": 2.3026,
    "smoothness": 0.688,
    "step_size": 0.3,
    "variance": 1.47,
    "variance_error": 0.05,
    "batch_size": 8.0,
    "batch_changes": 0.0,
    "loss_scale_changes": 0.0,
    "groups_differ": 0.0,
    "momentum": 0.0,
    "weight_decay": 0.0,
    "smoothness_is_secant": 0.0,
    "floor": 0.0211,
    "relative_error": 0.1,
    "loss_recent": 0.2,
    "loss_trend": -0.5,
    "steps": 1500.0,
    "from_adam": 0.0,
    "gradient_scale": 1.0,
}
NOISE_SCALE_INPUTS = {
    "estimates": 200.0,
    "gradient_square": 0.02,
    "gradient_square_error": 0.002,
    "gradient_variance": 2.0,
    "variance_median": 1.8,
    "clipped_share": 0.0,
    "batch_size": 8.0,
    "step_of_adam": 0.0,
    "halves_ratio": 1.2,
}
BOUNDS: tuple[Bound, ...] = (NoiseFloor(), RandomlyStoppedSgd())


def make_step(step: int = 1500, **changes: object) -> StepInfo:
    facts: dict[str, object] = {
        "lrs": (0.3,), "optimizer": "SGD", "momentum": 0.0, "weight_decay": 0.0, "batch_size": 8,
        "grads_clipped": False, "loss": 0.2,
    }  # fmt: skip
    return StepInfo(step=step, **{**facts, **changes})  # type: ignore[arg-type]


def make_value(
    metric: str, value: float, error: float | None = None, **inputs: float
) -> Measurement:
    return Measurement(
        metric=metric, scope="model", step=1500, value=value, standard_error=error, inputs=inputs
    )


def make_stationarity(value: float = 0.0219, **changes: float) -> Measurement:
    inputs = {**INPUTS, **changes}
    return make_value("stationarity_recent", value, 0.1 * abs(value), **inputs)


def make_noise_scale(value: float, error: float | None = None, **changes: float) -> Measurement:
    inputs = {**NOISE_SCALE_INPUTS, **changes}
    return make_value("noise_scale", value, 0.05 * value if error is None else error, **inputs)


def make_report(step: StepInfo, measurements: Sequence[Measurement], model: ModelInfo) -> Report:
    verdicts = []
    for item in measurements:
        for bound in BOUNDS:
            interval = bound.interval(item, step, model) if item.metric == bound.metric else None
            if interval is not None:
                name = type(bound).__name__
                verdicts.append(Verdict.of(item, interval, bound=name, source=bound.source))
    return Report(
        step=step.step,
        steps=(step,),
        measurements=tuple(measurements),
        verdicts=tuple(verdicts),
    )


def make_history(
    *measurements: Measurement, model: ModelInfo | None = None, **step: object
) -> History:
    """One report with these measurements."""
    history = History(model or ModelInfo())
    history.append(make_report(make_step(**step), measurements, history.model))  # type: ignore[arg-type]
    return history


def make_curvature(step: StepInfo, ratio: float, **changes: float) -> list[Measurement]:
    """The readings of Sharpness and EdgeOfStability on one step, at a threshold of 20 at lr 0.1."""
    adam = step.optimizer != "SGD"
    threshold = 2.0 / (step.lr or math.nan)
    inputs = {
        "sharpness": ratio * threshold, "newest": ratio * threshold, "relative_error": 0.01,
        "threshold": threshold, "learning_rate": step.lr or math.nan,
        "momentum": step.momentum or 0.0, "preconditioned": float(adam), "readings": 10.0,
        "clipped_share": 0.0, "groups_differ": 0.0, "first_sharpness": 1.0, "first_step": 0.0,
        "first_learning_rate": step.lr or math.nan, "gradient_scale": 1.0,
        **changes,
    }  # fmt: skip
    sharpness = Measurement(
        metric="preconditioned_sharpness" if adam else "sharpness",
        scope="model",
        step=step.step,
        value=inputs["newest"],
        standard_error=inputs["relative_error"] * abs(inputs["newest"]),
    )
    of_edge = Measurement(
        metric="stability_ratio", scope="model", step=step.step, value=ratio, inputs=inputs
    )
    return [sharpness, of_edge]


def make_noise_stability(
    step: StepInfo, ratio: float, error: float | None = None, **changes: float
) -> Measurement:
    lr, size = step.lr or math.nan, float(step.batch_size or math.nan)
    inputs = {
        "sharpness": 10.0, "sharpness_variance": 400.0, "batch_size": size, "train_size": math.nan,
        "learning_rate": lr, "learning_rate_limit": lr / ratio, "batch_size_limit": 2.5 * size,
        "momentum": step.momentum or 0.0, "relative_error": math.inf, "readings": 10.0, **changes,
    }  # fmt: skip
    return Measurement(
        metric="noise_stability_ratio",
        scope="model",
        step=step.step,
        value=ratio,
        standard_error=error,
        inputs=inputs,
    )


def make_curved_run(
    ratios: Sequence[float],
    losses: Callable[[int], float | None] = lambda step: 0.2,
    *,
    noise: Sequence[float] = (),
    inputs: Mapping[str, float] | None = None,
    noise_inputs: Mapping[str, float] | None = None,
    noise_error: float | None = None,
    others: Callable[[StepInfo], Sequence[Measurement]] = lambda step: (),
    model: ModelInfo | None = None,
    every: int = 50,
    begin: int = 1000,
    **settings: object,
) -> History:
    """A run of one reading of r in each report, and ten sampled steps.

    Args:
        ratios: r of each reading; NaN for a report without one.
        losses: of a step.
        noise: the last ratios under the noise.
        inputs: other inputs of all stability ratios.
        noise_error: standard error of all noise stability ratios.
        noise_inputs: other inputs of all noise stability ratios.
        others: further measurements of a report.
        model: facts about it.
        every: steps between reports.
        begin: the first step; if it is not 0, there is a report on step 0, at a loss of 2.3.
        settings: of all steps.
    """
    history = History(model or ModelInfo())
    if begin > 0:
        first = make_step(0, **{"lrs": (0.1,), **settings, "loss": 2.3})
        history.append(make_report(first, (), history.model))
    for place, ratio in enumerate(ratios):
        last = begin + place * every
        steps = [
            make_step(at, **{"lrs": (0.1,), **settings, "loss": losses(at)})
            for at in range(max(begin, last - every + every // 10), last + 1, every // 10)
        ]
        found: list[Measurement] = list(others(steps[-1]))
        if not math.isnan(ratio):
            found += make_curvature(steps[-1], ratio, **(inputs or {}))
        at = place - (len(ratios) - len(noise))
        if at >= 0:
            found.append(
                make_noise_stability(steps[-1], noise[at], noise_error, **(noise_inputs or {}))
            )
        judged = make_report(steps[-1], found, history.model)
        threshold = [
            Verdict.of(item, Interval(upper=20.0), bound="StabilityThreshold", source="R3")
            for item in found
            if item.metric == "sharpness"
        ]
        history.append(replace(judged, steps=tuple(steps), verdicts=(*judged.verdicts, *threshold)))
    return history


@pytest.fixture(scope="session")
def curvature_of() -> Callable[..., list[Measurement]]:
    return make_curvature


@pytest.fixture(scope="session")
def curved_run() -> Callable[..., History]:
    return make_curved_run


@pytest.fixture(scope="session")
def step_of() -> Callable[..., StepInfo]:
    return make_step


@pytest.fixture(scope="session")
def value_of() -> Callable[..., Measurement]:
    return make_value


@pytest.fixture(scope="session")
def stationarity() -> Callable[..., Measurement]:
    return make_stationarity


@pytest.fixture(scope="session")
def noise_scale() -> Callable[..., Measurement]:
    return make_noise_scale


@pytest.fixture(scope="session")
def report_of() -> Callable[..., Report]:
    return make_report


@pytest.fixture(scope="session")
def history_of() -> Callable[..., History]:
    return make_history


@pytest.fixture(scope="session")
def stationarity_inputs() -> Mapping[str, float]:
    return INPUTS


@pytest.fixture(scope="session")
def noise_scale_inputs() -> Mapping[str, float]:
    return NOISE_SCALE_INPUTS

"""Histories as the rules see them, judged by the real bounds."""

from collections.abc import Callable, Mapping, Sequence

import pytest

from gradwatch.bounds import NoiseFloor, RandomlyStoppedSgd
from gradwatch.interfaces import Bound
from gradwatch.records import History, Measurement, ModelInfo, Report, StepInfo, Verdict

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

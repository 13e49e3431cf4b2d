"""The bound on the true gradient along a run: its verdicts, and what makes it undecided."""

import math
from collections.abc import Callable, Mapping
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradwatch import bounds
from gradwatch.bounds import NoiseFloor, RandomlyStoppedSgd
from gradwatch.bounds.all_finite import Family
from gradwatch.interfaces import Bound
from gradwatch.records import Interval, LayerInfo, Measurement, ModelInfo, StepInfo, Verdict
from gradwatch.theory.gradient_convergence import path_bound

STEP = StepInfo(
    step=2000, lrs=(0.1,), optimizer="SGD", momentum=0.0, weight_decay=0.0, grads_clipped=False
)
# A 64-32-10 network on digits, lr 0.1, batch 32, 2000 steps, with the largest L and sigma².
INPUTS = {
    "step_term": 0.0276, "noise_term": 0.0233, "estimates": 2000.0, "clipped_share": 0.0,
    "lr_changes": 0.0, "edge_share": 0.0, "beyond_edge": 0.0, "lowest_loss": 0.0,
    "smallest_loss": 0.1, "first_loss": 2.3, "smoothness": 2.0, "step_size": 0.1,
    "variance": 7.5, "batch_size": 32.0, "batch_changes": 0.0, "loss_scale_changes": 0.0,
    "groups_differ": 0.0, "momentum": 0.0, "weight_decay": 0.0, "smoothness_is_secant": 0.0,
    "steps": 2000.0, "from_adam": 0.0, "gradient_scale": 1.0,
}  # fmt: skip
MET: Mapping[str, float] = {}
MEASURED, NAIVE = 0.0182, 0.157
BOTH = {"stationarity": RandomlyStoppedSgd(), "stationarity_recent": NoiseFloor()}


def judge(
    value: float = MEASURED, error: float | None = 0.001, metric: str = "stationarity",
    step: StepInfo = STEP, model: ModelInfo | None = None, inputs: Mapping[str, float] = MET,
) -> Verdict:  # fmt: skip
    measurement = Measurement(
        metric=metric, scope="model", step=2000, value=value, standard_error=error,
        inputs={**INPUTS, **inputs},
    )  # fmt: skip
    bound: Bound = BOTH[metric]
    interval = bound.interval(measurement, step, model or ModelInfo())
    assert interval is not None
    return Verdict.of(measurement, interval, bound="bound", source=bound.source)


def test_the_unbiased_estimate_is_below_the_sum_of_the_two_terms() -> None:
    found = judge()
    assert found.status == "holds"
    assert found.interval == Interval(lower=0.0, upper=0.0276 + 0.0233, kind="explicit")


def test_the_square_of_the_batch_gradient_would_have_violated_it() -> None:
    # it is too large by the variance of the batch
    assert judge(NAIVE, 0.005).status == "violated"


def test_no_bound_judges_the_square_of_the_batch_gradient() -> None:
    classes = [getattr(bounds, name) for name in bounds.__all__ if name != "AllFinite"]
    judged = {bound.metric for bound in classes} | set(get_args(Family))
    assert {"stationarity", "stationarity_recent", "lr_curvature"} <= judged
    assert not {metric for metric in judged if metric.startswith("gradient")}


@pytest.mark.parametrize(
    ("ratio", "error", "status"),
    [
        (0.5, 0.1, "holds"),
        (1.0, 0.1, "holds"),
        (1.01, 0.0, "undecided"),
        (1.49, 0.0, "undecided"),
        (1.51, 0.0, "violated"),
        (1.7, 0.11, "undecided"),
        (1.7, 0.09, "violated"),
    ],
)
def test_an_assumption_broke_only_if_the_ratio_is_above_one_and_a_half_for_certain(
    ratio: float, error: float, status: str
) -> None:
    bound = 0.0276 + 0.0233
    assert judge(ratio * bound, error * bound).status == status


UNDECIDED: dict[str, tuple[str, dict[str, float]]] = {
    "noise from the state of Adam": ("state of Adam", {"from_adam": 1.0}),
    "clipping": ("clipped in 6%", {"clipped_share": 0.06}),
    "clipping that nobody saw": ("track_clipping=True", {"clipped_share": math.nan}),
    "few estimates": ("199 estimates", {"estimates": 199.0}),
    "no estimates": ("0 estimates", {"estimates": math.nan}),
    "steps beyond the edge": ("beyond 2/L", {"beyond_edge": 0.01}),
    "a loss below its bound": ("lowest_loss", {"smallest_loss": -0.3}),
    "a loss that nobody saw": ("lowest_loss", {"smallest_loss": math.nan}),
    "a new loss scale": ("loss scale", {"loss_scale_changes": 1.0}),
    "weight decay": ("weight decay", {"weight_decay": 1e-4}),
    "several learning rates": ("different learning rates", {"groups_differ": 1.0}),
    "an unknown smoothness": ("smoothness", {"smoothness": math.nan}),
    "a loss that was not divided": ("number of micro-batches", {"gradient_scale": 4.0}),
    "a loss_fn that is a sum": ("loss_fn that is a mean", {"gradient_scale": 1 / 1024}),
}


@pytest.mark.parametrize("metric", BOTH)
@pytest.mark.parametrize("why", UNDECIDED)
def test_is_undecided_with_the_reason_for(why: str, metric: str) -> None:
    words, inputs = UNDECIDED[why]
    for value in (MEASURED, NAIVE):
        found = judge(value, metric=metric, inputs=inputs)
        assert found.status == "undecided"
        assert words in found.because


@pytest.mark.parametrize("metric", BOTH)
@pytest.mark.parametrize("scale", [0.51, 1.0, 1.99, math.nan])
def test_a_gradient_of_the_loss_that_is_measured_is_no_reason(metric: str, scale: float) -> None:
    # NaN: without probes there is nothing to compare with
    assert judge(metric=metric, inputs={"gradient_scale": scale}).status == "holds"


@pytest.mark.parametrize("metric", BOTH)
@pytest.mark.parametrize(
    "optimizer", ["Adam", "AdamW", "RMSprop", "SignSGD", "Lion", "LARS", "SGD+Adam", "Mine", ""]
)
def test_is_undecided_for_other_optimizers_than_torch_s_sgd(optimizer: str, metric: str) -> None:
    step = StepInfo(step=2000, optimizer=optimizer)
    assert "about SGD" in judge(NAIVE, metric=metric, step=step).because


def test_weight_decay_in_the_settings_is_enough() -> None:
    step = StepInfo(step=2000, optimizer="SGD", weight_decay=0.01)
    assert "weight decay" in judge(step=step).because


@pytest.mark.parametrize("metric", BOTH)
@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        (MEASURED, 0.6 * MEASURED, "relative standard error"),
        (MEASURED, None, "relative standard error"),
        (MEASURED, math.nan, "relative standard error"),
        (math.nan, 0.001, "not finite"),
        (math.inf, 0.001, "not finite"),
        (-0.01, 0.001, "independent"),
    ],
)
def test_is_undecided_on_an_estimate_that_says_nothing(
    value: float, error: float | None, words: str, metric: str
) -> None:
    found = judge(value, error, metric=metric)
    assert found.status == "undecided"
    assert words in found.because


@pytest.mark.parametrize("term", [math.nan, math.inf, -1.0])
def test_is_undecided_on_a_bound_that_says_nothing(term: float) -> None:
    assert judge(inputs={"step_term": term}).status == "undecided"


@pytest.mark.parametrize(
    ("inputs", "kind"),
    [
        ({}, "explicit"),
        ({"momentum": 0.9}, "heuristic"),
        ({"smoothness_is_secant": 1.0}, "heuristic"),
    ],
)
def test_momentum_and_secants_make_it_heuristic(inputs: dict[str, float], kind: str) -> None:
    assert judge(inputs=inputs).interval.kind == kind


def test_batch_normalisation_makes_it_heuristic() -> None:
    model = ModelInfo(layers=(LayerInfo(name="1", kind="BatchNorm2d"),))
    assert judge(model=model).interval.kind == "heuristic"


@pytest.mark.parametrize("bound", BOTH.values())
def test_speaks_of_the_whole_model_only(bound: Bound) -> None:
    part = Measurement(metric=bound.metric, scope="layer", step=0, value=1.0, inputs=INPUTS)
    assert bound.interval(part, STEP, ModelInfo()) is None


ANY = st.floats(allow_nan=True, allow_infinity=True)


@pytest.mark.parametrize("metric", BOTH)
@given(
    value=ANY,
    error=st.none() | ANY,
    changes=st.dictionaries(st.sampled_from(sorted(INPUTS)), ANY, max_size=4),
    missing=st.none() | st.sampled_from(sorted(INPUTS)),
)
def test_no_number_breaks_it(
    metric: str, value: float, error: float | None, changes: dict[str, float], missing: str | None
) -> None:
    inputs = {**INPUTS, **changes}
    if missing is not None:
        inputs.pop(missing)
    measurement = Measurement(
        metric=metric, scope="model", step=0, value=value, standard_error=error, inputs=inputs
    )
    bound = BOTH[metric]
    interval = bound.interval(measurement, STEP, ModelInfo())
    assert interval is not None
    found = Verdict.of(measurement, interval, bound="bound", source=bound.source)
    if found.status != "undecided":
        assert math.isfinite(found.interval.upper)
        assert (found.status == "holds") == (0 <= value <= found.interval.upper)


@pytest.fixture(scope="module")
def quadratic() -> Callable[[float], tuple[float, float, float]]:
    """Exact mean of the squared gradient of SGD on a quadratic, and the two terms."""

    def run(lr: float) -> tuple[float, float, float]:
        curvatures, noise, steps = np.logspace(-3, np.log10(4), 20), 0.05, 2000
        second = np.ones(20)
        gap, squares = float(curvatures @ second) / 2, []
        for _ in range(steps):
            squares.append(float(curvatures**2 @ second))
            second = (1 - lr * curvatures) ** 2 * second + lr**2 * noise
        rates = np.full(steps, lr)
        split = path_bound(gap, np.full(steps, 4.0), np.full(steps, 20 * noise), rates)
        return float(np.mean(squares)), split.step_term, split.noise_term

    return run


@pytest.mark.parametrize("lr", [0.01, 0.1, 0.25, 0.4])
def test_sgd_on_a_quadratic_holds(
    lr: float, quadratic: Callable[[float], tuple[float, float, float]]
) -> None:
    mean, step_term, noise_term = quadratic(lr)
    terms = {"step_term": step_term, "noise_term": noise_term}
    assert judge(mean, 0.0, inputs=terms).status == "holds"
    # constants that are too low by far show as a broken assumption
    wrong = {name: term / 50 for name, term in terms.items()}
    assert judge(mean, 0.0, inputs=wrong).status == "violated"

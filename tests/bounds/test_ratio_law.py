"""Where only the ratio of learning rate and batch size matters."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradwatch.bounds import RatioLaw
from gradwatch.records import Measurement, ModelInfo, StepInfo, Verdict


def judge(
    value: float, *, error: float | None = None, is_secant: float = 0.0, momentum: float = 0.0,
    optimizer: str = "SGD", train_size: int | None = None, **settings: object,
) -> Verdict | None:  # fmt: skip
    bound = RatioLaw()
    facts: dict[str, object] = {"lrs": (0.1,), "batch_size": 8, **settings}
    step = StepInfo(step=5, optimizer=optimizer, momentum=momentum, **facts)  # type: ignore[arg-type]
    measurement = Measurement(
        metric="lr_curvature", scope="model", step=5, value=value, standard_error=error,
        inputs={"is_secant": is_secant, "momentum": momentum},
    )  # fmt: skip
    interval = bound.interval(measurement, step, ModelInfo(train_size=train_size))
    if interval is None:
        return None
    return Verdict.of(measurement, interval, bound="RatioLaw", source=bound.source)


def decided(*arguments: float, **settings: object) -> Verdict:
    found = judge(*arguments, **settings)  # type: ignore[arg-type]
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("momentum", "limit"), [(0.0, 0.18181818181818182), (0.9, 0.34545454545454546)]
)
def test_ten_percent_of_excess_variance_are_allowed(momentum: float, limit: float) -> None:
    found = decided(0.01, momentum=momentum)
    assert found.interval.upper == pytest.approx(limit, rel=1e-12)
    assert found.interval.kind == "law"
    assert decided(limit * 0.999, momentum=momentum).status == "holds"
    beyond = decided(limit * 1.001, momentum=momentum)
    assert beyond.status == "undecided"  # nothing is wrong with the run
    assert beyond.because.startswith("not shown to apply")


@pytest.mark.parametrize("is_secant", [1.0, math.nan])
def test_a_secant_underestimates_so_inside_says_nothing(is_secant: float) -> None:
    inside, outside = decided(0.1, is_secant=is_secant), decided(0.3, is_secant=is_secant)
    assert (inside.status, inside.because) == (
        "undecided",
        "the secant underestimates the curvature",
    )
    assert outside.because.startswith("not shown to apply")


@pytest.mark.parametrize("optimizer", ["Adam", "AdamW", "RMSprop", ""])
def test_says_nothing_of_other_optimizers(optimizer: str) -> None:
    assert judge(0.5, optimizer=optimizer) is None


def test_says_nothing_of_a_momentum_that_is_none() -> None:
    assert judge(0.5, momentum=1.0) is None
    assert judge(0.5, momentum=math.nan) is None


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lrs": (0.1, 0.2)}, "different learning rates"),
        ({"grads_clipped": True}, "clipped"),
        ({"train_size": 16}, "half of the training data"),
    ],
)
def test_is_undecided_for(settings: dict[str, object], words: str) -> None:
    assert words in decided(0.5, **settings).because


def test_a_batch_below_half_of_the_data_is_decided() -> None:
    assert decided(0.1, train_size=17).status == "holds"


@given(st.floats(allow_nan=True), st.floats(allow_nan=True), st.floats(allow_nan=True))
def test_no_number_breaks_it(value: float, momentum: float, is_secant: float) -> None:
    found = judge(value, momentum=momentum, is_secant=is_secant)
    assert found is None or found.status in {"holds", "undecided"}

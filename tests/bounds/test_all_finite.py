"""Everything is finite, or the verdict says so."""

import pytest

from gradwatch.bounds import AllFinite
from gradwatch.bounds.all_finite import Family
from gradwatch.records import Measurement, ModelInfo, StepInfo, Verdict


def judge(metric: Family, value: float, *, skipped: bool = False, scope: str = "model") -> str:
    bound = AllFinite(metric)
    measurement = Measurement(metric=metric, scope=scope, step=3, value=value)
    found = bound.interval(measurement, StepInfo(step=3, skipped=skipped), ModelInfo())
    if found is None:
        return "nothing"
    return Verdict.of(measurement, found, bound="AllFinite", source=bound.source).status


@pytest.mark.parametrize(
    "metric", ["nonfinite_activation", "nonfinite_gradient", "nonfinite_parameter"]
)
def test_one_tensor_is_one_too_many(metric: Family) -> None:
    assert judge(metric, 0.0) == "holds"
    assert judge(metric, 1.0) == "violated"


def test_a_step_that_the_loss_scaler_skipped_is_routine() -> None:
    assert judge("nonfinite_gradient", 4.0, skipped=True) == "undecided"


def test_infinite_parameters_are_never_routine() -> None:
    assert judge("nonfinite_parameter", 1.0, skipped=True) == "violated"


def test_names_are_evidence_not_verdicts() -> None:
    assert judge("nonfinite_gradient", 1.0, scope="layer.weight") == "nothing"

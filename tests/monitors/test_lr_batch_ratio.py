"""LrBatchRatio: what the ratio is with momentum, with the noise, and with the curvature."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from gradwatch.capture.model.parameters import settings_of
from gradwatch.interfaces import Monitor
from gradwatch.monitors import LrBatchRatio
from gradwatch.monitors.smoothness import SECANTS
from gradwatch.records import Measurement, ModelInfo, StepInfo

Step = Callable[..., StepInfo]
Measured = Callable[..., list[Measurement]]
Check = Callable[[Callable[[], Monitor], Sequence[str]], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Counted(ModelInfo):
    """Facts that include the number of parameters."""

    parameter_count: int = 0


def derived(
    step: Step, values: list[Measurement], *, repeated: int = 1, **settings: Any
) -> dict[str, Measurement]:
    monitor, found = LrBatchRatio(), list[Measurement]()
    model = Counted(parameter_count=10, train_size=1000)
    for number in range(repeated):
        found = list(monitor.derive(step(number, **settings), values, model))
    return {item.metric: item for item in found}


def test_momentum_makes_the_ratio_larger(step: Step) -> None:
    found = derived(step, [], lrs=(0.1, 0.7), momentum=0.5)["lr_batch_ratio_effective"]
    assert (found.value, found.unit) == (0.1 / 32 / 0.5, "P²/(L sample)")


def test_dampening_makes_it_smaller(step: Step) -> None:
    found = derived(step, [], lrs=(0.1,), momentum=0.5, dampening=0.5)["lr_batch_ratio_effective"]
    assert found.value == pytest.approx(0.1 / 32)


@pytest.mark.parametrize(
    "settings",
    [
        {"momentum": 0.9, "dampening": 0.3},
        {"momentum": 0.5, "nesterov": True},
        {"momentum": 0.0, "dampening": 0.3},  # torch leaves it out of account
    ],
)
def test_the_gain_of_momentum_is_what_torch_makes_of_a_steady_gradient(
    step: Step, settings: dict[str, Any]
) -> None:
    point = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = torch.optim.SGD([point], lr=0.1, **settings)
    for _ in range(400):
        before = point.item()
        point.grad = torch.ones_like(point)
        optimizer.step()
    info = step(**settings_of(optimizer))
    assert 0.1 * info.momentum_gain == pytest.approx(before - point.item())


def test_a_momentum_of_one_has_no_gain(step: Step) -> None:
    assert math.isnan(step(momentum=1.0).momentum_gain)
    assert step(momentum=None, dampening=None).momentum_gain == 1.0


def test_temperature(step: Step, measured: Measured) -> None:
    values = measured(gradient_variance=20.0)
    found = derived(step, values, repeated=50)["temperature"]
    assert found.value == pytest.approx(0.003125)
    assert found.unit == "L"
    assert found.inputs["coordinate_variance"] == pytest.approx(2.0)
    assert "temperature" not in derived(step, values, repeated=49)


def test_temperature_has_the_error_of_the_variance(step: Step, measured: Measured) -> None:
    monitor, found = LrBatchRatio(), list[Measurement]()
    model = Counted(parameter_count=10)
    for number in range(200):
        values = measured(gradient_variance=20.0 + (5.0 if number % 20 < 10 else -5.0))
        found = list(monitor.derive(step(number), values, model))
    (temperature,) = (item for item in found if item.metric == "temperature")
    # Blocks of ten readings, all above or all below the mean.
    assert temperature.standard_error == pytest.approx(0.003125 * 0.25 / 10**0.5)


def test_without_the_number_of_parameters_there_is_no_temperature(
    step: Step, measured: Measured
) -> None:
    monitor, found = LrBatchRatio(), list[Measurement]()
    for number in range(60):
        found += monitor.derive(step(number), measured(gradient_variance=20.0), ModelInfo())
    assert {item.metric for item in found} == {"lr_batch_ratio_effective"}


def test_lr_times_curvature(step: Step, measured: Measured) -> None:
    values = measured(smoothness=3.0)
    found = derived(step, values, lrs=(0.1, 0.2), momentum=0.9)["lr_curvature"]
    assert found.value == pytest.approx(0.6)
    assert found.source == SECANTS
    expected = {"momentum": 0.9, "is_secant": 1.0, "batch_size": 32.0, "train_size": 1000.0}
    assert found.inputs == expected


def test_the_sharpness_is_preferred_and_kept(step: Step, measured: Measured) -> None:
    monitor = LrBatchRatio()
    list(monitor.derive(step(0), measured(smoothness=3.0, sharpness=4.0), ModelInfo()))
    found = {item.metric: item for item in monitor.derive(step(1), [], ModelInfo())}
    assert found["lr_curvature"].value == pytest.approx(0.4)
    assert found["lr_curvature"].inputs["is_secant"] == 0.0
    assert math.isnan(found["lr_curvature"].inputs["train_size"])


@pytest.mark.parametrize("settings", [{"optimizer": "AdamW"}, {"lrs": ()}, {"skipped": True}])
def test_other_steps_have_no_such_ratio(
    step: Step, measured: Measured, settings: dict[str, Any]
) -> None:
    values = measured(gradient_variance=20.0, smoothness=3.0)
    assert derived(step, values, repeated=60, **settings) == {}


def test_an_unknown_batch_leaves_the_curvature(step: Step, measured: Measured) -> None:
    values = measured(gradient_variance=20.0, smoothness=3.0)
    assert set(derived(step, values, repeated=60, batch_size=None)) == {"lr_curvature"}


def test_no_values_make_it_raise(survives: Check) -> None:
    survives(LrBatchRatio, ("gradient_variance", "smoothness", "sharpness"))


def test_it_resumes(resumes: Check) -> None:
    resumes(LrBatchRatio, ("gradient_variance", "smoothness"))

"""NoiseCurvature: the probe against exact curvatures, and the ratios that it derives."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import hessian
from torch.func import functional_call
from torch.nn import functional

from gradwatch.capture.view import NamedValues, StepView
from gradwatch.interfaces import Monitor
from gradwatch.monitors import NoiseCurvature
from gradwatch.records import Measurement, ModelInfo, StepInfo

METRICS = ("gradient_curvature", "noise_curvature")

Probe = Callable[..., dict[str, Tensor]]
Step = Callable[..., StepInfo]
Measured = Callable[..., list[Measurement]]
Check = Callable[[Callable[[], Monitor], Sequence[str]], None]


def test_the_probe_is_unbiased(probe: Probe) -> None:
    """Against the Hessian of the loss over all data and the covariance of single gradients."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2, bias=False).double()
    inputs = torch.randn(30, 3).double() + 0.5
    targets = (inputs[:, 0] > 1.0).long()

    def loss(weight: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return functional.cross_entropy(functional_call(model, {"weight": weight}, (x,)), y)

    weight = model.weight.detach()
    curvature = hessian(lambda item: loss(item, inputs, targets), weight).reshape(6, 6)
    each = torch.stack(
        [
            torch.autograd.grad(loss(point, inputs[[i]], targets[[i]]), point)[0].flatten()
            for i in range(30)
            for point in [weight.clone().requires_grad_()]
        ]
    )
    mean = each.mean(0)
    covariance = (each - mean).T @ (each - mean) / 30
    truth = {
        "curvature_of_gradient": mean @ curvature @ mean,
        "curvature_of_noise": torch.trace(curvature @ covariance),
    }
    monitor, found = NoiseCurvature(), []
    for _ in range(800):
        rows = torch.randint(30, (61,))  # one example is left over
        found.append(probe(monitor, model, (inputs[rows], targets[rows])))
    for name, expected in truth.items():
        values = torch.stack([item[name] for item in found])
        error = values.std() / 800**0.5
        assert abs(values.mean() - expected) < 3 * error
        assert error < 0.15 * expected


def test_a_batch_too_small_for_thirds_is_noted(probe: Probe) -> None:
    notes: list[str] = []
    batch = (torch.randn(2, 3), torch.zeros(2, dtype=torch.long))
    assert probe(NoiseCurvature(), nn.Linear(3, 2), batch, notes=notes) == {}
    assert any("three examples" in note for note in notes)


def test_a_network_with_dropout_and_buffers_stays_as_it_is(probe: Probe) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    batch = (torch.randn(9, 3), torch.zeros(9, dtype=torch.long))
    found = probe(NoiseCurvature(), model, batch)
    assert all(torch.isfinite(item) for item in found.values())


def test_what_was_probed_is_read() -> None:
    given = StepView(
        step=0,
        model=ModelInfo(),
        gradient_norms=NamedValues((), torch.zeros(0)),
        probed={
            "curvature_of_gradient": torch.tensor(0.2),
            "curvature_of_noise": torch.tensor(10.0),
        },
    )
    gradient, noise = NoiseCurvature().read(given)
    assert (gradient.metric, gradient.unit) == ("gradient_curvature", "L³/P⁴")
    assert float(gradient.values) == pytest.approx(0.2)
    assert (noise.metric, noise.unit) == ("noise_curvature", "L³ sample/P⁴")
    assert float(noise.values) == 10.0
    given.probed = {}
    assert list(NoiseCurvature().read(given)) == []


def noise_scale(square: float = 0.32, error: float = 0.01) -> Measurement:
    return Measurement(
        metric="noise_scale",
        scope="model",
        step=0,
        value=40.0,
        inputs={"gradient_square": square, "gradient_square_error": error, "clipped_share": 0.0},
    )


def feed(
    step: Step, measured: Measured, count: int, first: Sequence[Measurement] = (), **settings: Any
) -> dict[str, Measurement]:
    """What is derived from the last of several probes, with curvatures 0.217 and 10.2."""
    monitor = NoiseCurvature()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(count, 2, generator=generator)
    found: list[Measurement] = []
    for number, (one, two) in enumerate((noise - noise.mean(0)).tolist()):
        values = measured(gradient_curvature=0.217 + 0.1 * one, noise_curvature=10.2 + two)
        known = [*(first if number == 0 else ()), *values]
        found = list(monitor.derive(step(number, **settings), known, ModelInfo()))
    return {item.metric: item for item in found}


def test_the_noise_scale_by_curvature(step: Step, measured: Measured) -> None:
    found = feed(step, measured, 100)["noise_scale_curvature"]
    assert found.unit == "sample"
    assert found.value == pytest.approx(10.2 / 0.217)
    assert found.standard_error == pytest.approx(10.2 / 0.217 * 0.1 / 0.217 / 10, rel=0.5)
    assert found.inputs["estimates"] == 100


def test_the_stall_ratio(step: Step, measured: Measured) -> None:
    settings = {"lrs": (0.5,), "batch_size": 16}
    found = feed(step, measured, 100, [noise_scale()], **settings)["stall_ratio"]
    assert found.unit == "1"
    assert found.value == pytest.approx(0.6675781249999999)
    assert found.standard_error == pytest.approx(0.6676 * 0.035, rel=0.4)
    assert found.inputs["gradient_square"] == 0.32


def test_a_group_without_a_momentum_is_plain_sgd(step: Step, measured: Measured) -> None:
    assert "stall_ratio" in feed(step, measured, 100, [noise_scale()], momentum=None)


@pytest.mark.parametrize(
    "settings", [{"optimizer": "AdamW"}, {"batch_size": None}, {"lrs": ()}, {"momentum": 0.9}]
)
def test_where_the_step_is_no_step_of_plain_sgd_nothing_stalls(
    step: Step, measured: Measured, settings: dict[str, Any]
) -> None:
    assert set(feed(step, measured, 100, [noise_scale()], **settings)) == {"noise_scale_curvature"}


def test_it_waits_for_thirty_probes(step: Step, measured: Measured) -> None:
    assert feed(step, measured, 29) == {}
    assert set(feed(step, measured, 30)) == {"noise_scale_curvature"}


def test_a_curvature_lost_in_its_noise_is_no_denominator(step: Step, measured: Measured) -> None:
    monitor = NoiseCurvature()
    found: list[Measurement] = []
    for number in range(100):
        values = measured(gradient_curvature=(-1.0) ** number, noise_curvature=1.0)
        found += monitor.derive(step(number), [*values, noise_scale()], ModelInfo())
    assert found == []


def test_a_gradient_lost_in_its_noise_ends_the_stall_ratio(step: Step, measured: Measured) -> None:
    lost = measured(noise_scale_at_least=1000.0)
    assert "stall_ratio" in feed(step, measured, 100, [noise_scale()])
    monitor = NoiseCurvature()
    for number in range(40):
        known = [
            *measured(gradient_curvature=1.0 + 0.1 * (number % 2), noise_curvature=1.0),
            *([noise_scale()] if number == 0 else []),
            *(lost if number == 39 else []),
        ]
        found = {item.metric for item in monitor.derive(step(number), known, ModelInfo())}
        assert ("stall_ratio" in found) == (30 <= number + 1 < 40)


def test_a_noise_scale_without_its_inputs_is_no_reason_to_fail(
    step: Step, measured: Measured
) -> None:
    bare = measured(noise_scale=40.0)
    assert set(feed(step, measured, 100, bare)) == {"noise_scale_curvature"}


def test_what_is_not_finite_or_skipped_does_not_enter(step: Step, measured: Measured) -> None:
    monitor = NoiseCurvature()
    for number in range(40):
        value = math.nan if number % 2 else 1.0
        values = measured(gradient_curvature=value, noise_curvature=1.0)
        info = step(number, skipped=number >= 38)
        assert list(monitor.derive(info, values, ModelInfo())) == []
    assert len(monitor.state_dict()["window"]) == 19


def test_no_values_make_it_raise(survives: Check) -> None:
    survives(NoiseCurvature, (*METRICS, "noise_scale", "noise_scale_at_least"))


def test_it_resumes(resumes: Check) -> None:
    resumes(NoiseCurvature, METRICS)

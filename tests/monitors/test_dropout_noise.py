"""DropoutNoise: the probe against the exact variance over all masks, and the law of the rate."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from gradwatch.capture.view import NamedValues, StepView
from gradwatch.interfaces import Monitor
from gradwatch.monitors import DropoutNoise
from gradwatch.records import DropoutInfo, Measurement, ModelInfo, StepInfo

METRICS = ("dropout_variance", "gradient_variance")

Probe = Callable[..., dict[str, Tensor]]
Step = Callable[..., StepInfo]
Measured = Callable[..., list[Measurement]]
Check = Callable[[Callable[[], Monitor], Sequence[str]], None]


def facts(*probabilities: float) -> ModelInfo:
    return ModelInfo(
        dropouts=tuple(
            DropoutInfo(name=f"drop{index}", probability=value)
            for index, value in enumerate(probabilities)
        )
    )


def network(probability: float) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Dropout(probability), nn.Linear(4, 2)).double()


def exact_variance(model: nn.Sequential, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean over examples of the variance over all masks of the gradient of an example."""
    keep = 1 - cast(nn.Dropout, model[1]).p
    variances = []
    for x, y in zip(inputs, targets, strict=True):
        gradients, weights = [], []
        for mask in itertools.product([0.0, 1.0], repeat=4):
            kept = int(sum(mask))
            hidden = model[0](x) * torch.tensor(mask).double() / keep
            loss = functional.cross_entropy(model[2](hidden)[None], y[None])
            parts = torch.autograd.grad(loss, list(model.parameters()))
            gradients.append(torch.cat([part.flatten() for part in parts]))
            weights.append(keep**kept * (1 - keep) ** (4 - kept))
        each, weight = torch.stack(gradients), torch.tensor(weights).double()
        variances.append(weight @ (each - weight @ each).square().sum(1))
    return torch.stack(variances).mean()


def test_the_probe_is_unbiased(probe: Probe) -> None:
    model = network(0.4)
    inputs, targets = torch.randn(6, 3).double(), torch.tensor([0, 1, 0, 0, 1, 0])
    expected = exact_variance(cast(nn.Sequential, model), inputs, targets)
    values = []
    for seed in range(400):
        torch.manual_seed(seed)
        found = probe(DropoutNoise(), model, (inputs, targets), facts(0.4))
        values.append(found["dropout_difference"])
    error = torch.stack(values).std() / 400**0.5
    assert abs(torch.stack(values).mean() - expected) < 3 * error
    assert error < 0.1 * expected


@pytest.mark.parametrize("probabilities", [(), (0.0,), (1.0,)])
def test_without_dropout_it_does_not_run(probe: Probe, probabilities: tuple[float, ...]) -> None:
    model, batch = network(0.0), (torch.randn(6, 3).double(), torch.zeros(6, dtype=torch.long))
    assert probe(DropoutNoise(), model, batch, facts(*probabilities)) == {}


def test_what_was_probed_is_read() -> None:
    given = StepView(
        step=0,
        model=ModelInfo(),
        gradient_norms=NamedValues((), torch.zeros(0)),
        probed={"dropout_difference": torch.tensor(3.0)},
    )
    (found,) = DropoutNoise().read(given)
    assert (found.metric, float(found.values)) == ("dropout_variance", 3.0)
    assert found.unit == "L² sample/P²"
    given.probed = {}
    assert list(DropoutNoise().read(given)) == []


def feed(step: Step, measured: Measured, count: int, model: ModelInfo) -> dict[str, Measurement]:
    """Masks of variance 4 on average, of 10 in all."""
    monitor, found = DropoutNoise(), list[Measurement]()
    for number in range(count):
        sign = (-1.0) ** number
        values = measured(dropout_variance=4.0 + sign, gradient_variance=10.0 + sign)
        found = list(monitor.derive(step(number), values, model))
    return {item.metric: item for item in found}


def test_the_share_and_the_law(step: Step, measured: Measured) -> None:
    found = feed(step, measured, 40, facts(0.2, 0.2, 0.0))
    share, law = found["dropout_variance_share"], found["dropout_variance_law"]
    assert share.value == pytest.approx(0.4)
    assert share.inputs["estimates"] == 40
    assert share.inputs["keep"] == pytest.approx(0.8)
    assert share.inputs["rates"] == 1
    assert share.inputs["data_variance"] == pytest.approx(6.0)
    assert share.inputs["variance"] == pytest.approx(10.0)
    assert law.value == share.inputs["law"] == pytest.approx(4.0 * 0.8 / 0.2)
    assert law.unit == "L² sample/P²"


def test_several_rates_have_no_common_law(step: Step, measured: Measured) -> None:
    found = feed(step, measured, 40, facts(0.2, 0.5))
    assert set(found) == {"dropout_variance_share"}
    inputs = found["dropout_variance_share"].inputs
    assert inputs["rates"] == 2
    assert math.isnan(inputs["keep"])
    assert math.isnan(inputs["law"])


def test_it_waits_for_ten_probes(step: Step, measured: Measured) -> None:
    assert feed(step, measured, 9, facts(0.2)) == {}
    assert feed(step, measured, 10, facts(0.2)) != {}


def test_the_variance_may_be_of_another_step(step: Step, measured: Measured) -> None:
    monitor, found = DropoutNoise(), list[Measurement]()
    for number in range(40):
        metric = "gradient_variance" if number % 2 == 0 else "dropout_variance"
        values = measured(**{metric: 8.0 if number % 2 == 0 else 2.0})
        found += monitor.derive(step(number), values, facts(0.5))
    assert found[-2].value == 0.25
    assert found[-2].inputs["estimates"] == 20


def test_skipped_steps_do_not_enter(step: Step, measured: Measured) -> None:
    monitor = DropoutNoise()
    for number in range(40):
        values = measured(dropout_variance=1.0, gradient_variance=2.0)
        assert list(monitor.derive(step(number, skipped=True), values, facts(0.5))) == []


def test_no_values_make_it_raise(survives: Check) -> None:
    survives(DropoutNoise, METRICS)


def test_it_resumes(resumes: Check) -> None:
    resumes(DropoutNoise, METRICS)

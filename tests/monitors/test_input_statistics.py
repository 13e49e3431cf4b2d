"""InputStatistics: which inputs it looks at, and how much of them is their mean."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradwatch.capture.probe.batch import LastBatch
from gradwatch.capture.probe.objective import LossFunction
from gradwatch.capture.view import NamedValues, StepView
from gradwatch.interfaces import Monitor
from gradwatch.monitors import InputStatistics
from gradwatch.records import LayerInfo, Measurement, ModelInfo, StepInfo

METRICS = ("input_mean_square", "input_top_eigenvalue")
LINEAR = LayerInfo(name="0", kind="Linear", fan_in=6, fan_out=3)
NORM = LayerInfo(name="norm", kind="LayerNorm")

Probe = Callable[..., dict[str, Tensor]]
Step = Callable[..., StepInfo]
Measured = Callable[..., list[Measurement]]
Check = Callable[[Callable[[], Monitor], Sequence[str]], None]


def facts(*layers: LayerInfo) -> ModelInfo:
    return ModelInfo(layers=layers)


def objective(inputs: Any) -> LossFunction:
    batches = LastBatch()
    batches.tell(inputs)
    return LossFunction(nn.Linear(6, 3), lambda model, batch: torch.zeros(()), batches)


def statistics(probe: Probe, inputs: Any, *layers: LayerInfo) -> dict[str, Tensor]:
    given = objective(inputs)
    known = facts(*(layers or (LINEAR,)))
    return probe(InputStatistics(), given.model, inputs, known, objective=given)


def test_the_mean_and_the_top_eigenvalue_of_a_batch(probe: Probe) -> None:
    torch.manual_seed(0)
    rows = torch.randn(50, 6, dtype=torch.float64) + 2.0
    found = statistics(probe, (rows, torch.zeros(50)))
    moment = rows.T @ rows / 50
    others = rows.sum(0).square().sum() - rows.square().sum()
    torch.testing.assert_close(found["input_mean_square"], others / (50 * 49))
    torch.testing.assert_close(found["input_top_eigenvalue"], torch.linalg.eigvalsh(moment)[-1])
    assert float(found["input_mean_square"] / found["input_top_eigenvalue"]) > 0.9


def test_centred_inputs_have_no_mean(probe: Probe) -> None:
    torch.manual_seed(0)
    found = statistics(probe, (torch.randn(500, 6), None))
    assert abs(float(found["input_mean_square"] / found["input_top_eigenvalue"])) < 0.05


def test_images_are_flattened(probe: Probe) -> None:
    images = torch.rand(20, 2, 3)
    flat = statistics(probe, (images.flatten(1), None))
    torch.testing.assert_close(statistics(probe, (images, None)), flat)


def test_the_first_tensor_of_floats_is_taken(probe: Probe) -> None:
    rows = torch.rand(20, 6)
    found = statistics(probe, {"labels": torch.zeros(20, dtype=torch.long), "x": rows})
    torch.testing.assert_close(found, statistics(probe, (rows, None)))


@pytest.mark.parametrize(
    "layers",
    [
        (replace(LINEAR, kind="Conv2d"),),
        (replace(LINEAR, one_hot_input=True),),
        (replace(LINEAR, fan_in=5),),
        (replace(LINEAR, kind="Embedding"), LINEAR),
        (NORM,),
        (NORM, LINEAR),
    ],
)
def test_other_first_layers_are_left_alone(probe: Probe, layers: tuple[LayerInfo, ...]) -> None:
    assert statistics(probe, (torch.rand(20, 6), None), *layers) == {}


def test_a_mean_that_the_next_layer_takes_out_does_not_count(probe: Probe) -> None:
    def found(*layers: LayerInfo) -> set[str]:
        inputs, known = (
            (torch.rand(20, 6), None),
            ModelInfo(layers=layers, normalisations=("norm",)),
        )
        given = objective(inputs)
        return set(probe(InputStatistics(), given.model, inputs, known, objective=given))

    other = replace(LINEAR, name="1")
    assert found(LINEAR, NORM, other) == set()
    assert found(LINEAR, other, NORM) == set(METRICS)
    assert found(LINEAR) == set(METRICS)


@pytest.mark.parametrize(
    "inputs", [torch.zeros(20, 6, dtype=torch.long), torch.rand(1, 6), torch.rand(20)]
)
def test_other_inputs_are_left_alone(probe: Probe, inputs: Tensor) -> None:
    assert statistics(probe, (inputs, None)) == {}


def test_what_was_probed_is_read() -> None:
    given = StepView(
        step=0,
        model=ModelInfo(),
        gradient_norms=NamedValues((), torch.zeros(0)),
        probed={name: torch.tensor(2.0) for name in METRICS},
    )
    assert [item.metric for item in InputStatistics().read(given)] == list(METRICS)
    assert {item.unit for item in InputStatistics().read(given)} == {"A²"}
    given.probed = {}
    assert list(InputStatistics().read(given)) == []


def test_the_share_of_the_mean(step: Step, measured: Measured) -> None:
    monitor, found = InputStatistics(), list[Measurement]()
    for number in range(40):
        old = number < 20
        values = measured(
            input_mean_square=100.0 if old else 6.0 + (-1.0) ** number, input_top_eigenvalue=8.0
        )
        found += monitor.derive(step(number), values, ModelInfo())
    assert len(found) == 31  # from ten readings on
    assert found[-1].metric == "input_mean_share"
    assert found[-1].value == pytest.approx(0.75)
    assert found[-1].inputs["estimates"] == 20
    # The readings alternate, so that the scatter about the neighbour is the larger one.
    assert found[-1].standard_error == pytest.approx(1 / 8 / 10**0.5)


def test_no_values_make_it_raise(survives: Check) -> None:
    survives(InputStatistics, METRICS)


def test_it_resumes(resumes: Check) -> None:
    resumes(InputStatistics, METRICS)

"""gradient_scale: whether the steps are those of the loss that probes evaluate."""

from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import gradwatch
from gradwatch.capture.view import IndependentGradients, NamedValues, StepView
from gradwatch.monitors import GradientNoise, Smoothness
from gradwatch.records import ModelInfo

STEPS, BATCH = 30, 16
MEAN: Any = functional.cross_entropy
PARTS = IndependentGradients(torch.tensor(2.0), torch.tensor(1.5), 0.25, "4 micro-batches")
NORMS = NamedValues(("a", "b"), torch.tensor([3.0, 4.0]))


class Network(nn.Module):
    """Returns its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return {"loss": MEAN(self.body(inputs), targets)}


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        inputs = torch.randn(BATCH, 5)
        yield inputs, (inputs[:, 0] > 0.5).long()


def scales(
    model: nn.Module, loss: Callable[..., Tensor], parts: int, divisor: float, **options: Any
) -> list[float]:
    """The readings of a run whose steps add up the losses of some micro-batches."""
    data, sink = batches(), gradwatch.MemorySink()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    settings: dict[str, Any] = {
        "monitors": [GradientNoise(), Smoothness()],
        "sinks": [sink],
        "every_n_steps": 1,
        "budget": None,
        "on_error": "raise",
        **options,
    }
    with gradwatch.watch(model, optimizer, **settings) as watch:
        for _ in range(STEPS):
            for _ in range(parts):
                batch = next(data)
                watch.observe(batch=batch)
                (loss(model, batch) / divisor).backward()
            optimizer.step()
            optimizer.zero_grad()
    return [
        item.value
        for report in sink.reports
        for item in report.measurements
        if item.metric == "gradient_scale"
    ]


def returned(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    found: Tensor = model(*batch)["loss"]
    return found


@pytest.mark.parametrize(("divisor", "expected"), [(1.0, 16.0), (4.0, 1.0)])
def test_losses_that_are_added_up_make_longer_gradients(divisor: float, expected: float) -> None:
    torch.manual_seed(0)
    found = scales(Network(), returned, 4, divisor)
    assert len(found) > 10
    assert median(found) == pytest.approx(expected, rel=0.3)


@pytest.mark.parametrize(("reduction", "expected"), [("sum", 4.0), ("mean", 1.0)])
def test_the_gradient_of_a_sum_is_not_that_of_halves(reduction: str, expected: float) -> None:
    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        found: Tensor = MEAN(model(batch[0]), batch[1], reduction=reduction)
        return found

    torch.manual_seed(0)
    found = scales(
        Network().body,
        loss_fn,
        1,
        1.0,
        loss_fn=loss_fn,
        track_clipping=True,
    )
    assert len(found) > 10
    assert median(found) == pytest.approx(expected, rel=1e-3)


def read(**fields: Any) -> list[float]:
    given: dict[str, Any] = {"gradient_norms": NORMS, "batch_size": 32, **fields}
    view = StepView(step=0, model=ModelInfo(), **given)
    readings = GradientNoise().read(view)
    return [float(item.values) for item in readings if item.metric == "gradient_scale"]


def test_parts_are_compared_with_the_probe_of_as_many_samples() -> None:
    """`T = 2`, `q/s = 6`: of the whole 32 samples, of the 8 of a part, and between the two."""
    for samples, square in ((32.0, 2.0), (8.0, 6.0), (16.0, 2.0 + 4.0 / 3.0)):
        probed = {
            "smoothness_gradient_square": torch.tensor(4.0),
            "smoothness_examples": torch.tensor(samples),
        }
        found = read(independent_gradients=PARTS, probed=probed)
        assert found == [pytest.approx(square / 4.0)]
    assert read(independent_gradients=PARTS) == []


def test_the_whole_is_compared_with_the_halves() -> None:
    halves = {
        "noise_halves_product": torch.tensor(2.0),
        "noise_halves_difference": torch.tensor(16.0),
    }
    assert read(raw_gradient_norms=NORMS, probed=halves) == [25.0 / 2.5]
    assert read(raw_gradient_norms=NORMS, probed=halves, batch_size=None) == []
    assert read(probed=halves) == []  # without the gradient before clipping nothing is known

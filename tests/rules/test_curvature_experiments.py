"""Advice on the learning rate, tried: what diverges is told a rate at which it converges.

The sharpness is that of the exact Hessian of the loss over all examples, so that nothing but the
rules and the thresholds is on trial.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from typing_extensions import override

import gradwatch
from gradwatch.capture.view import StepView
from gradwatch.interfaces import Monitor
from gradwatch.monitors.edge_of_stability import EdgeOfStability
from gradwatch.numerics.reading import Reading
from gradwatch.records import Recommendation
from gradwatch.rules import BatchSize, LearningRate, Momentum, TrainingLength

pytestmark = pytest.mark.usefixtures("one_thread")

PAGE = "Break-even point and edge of stability"

Batch = tuple[Tensor, Tensor]
STEPS: Final = 400


def data() -> Batch:
    """Three classes that overlap."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (128,), generator=generator)
    noise = torch.randn(128, 4, generator=generator)
    return (noise + nn.functional.one_hot(labels, 4)).double(), labels


def network() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()


class ExactSharpness(Monitor):
    """Largest eigenvalue of the Hessian over all examples, as it was before the step, and s²."""

    metrics = ("sharpness", "sharpness_variance")

    def __init__(self) -> None:
        self.values: tuple[Tensor, Tensor] | None = None

    @override
    def read(self, view: StepView) -> Iterator[Reading]:
        values, self.values = self.values, None
        if values is not None:
            units = ("L/P²", "L²/P⁴")
            for metric, value, unit in zip(self.metrics, values, units, strict=True):
                yield Reading(metric, value, unit=unit, standard_errors=1e-6 * value.abs())


def curvature(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Sharpness and its variance over the examples, NaN where the weights are ruined."""
    inputs, labels = data()
    named = {name: item.detach() for name, item in model.named_parameters()}
    sizes = [item.numel() for item in named.values()]

    def losses(flat: Tensor) -> Tensor:
        parts = zip(named.items(), flat.split(sizes), strict=True)
        values = {name: part.view_as(item) for (name, item), part in parts}
        outputs = functional_call(model, values, (inputs,))
        return cross_entropy(outputs, labels, reduction="none")

    flat = torch.cat([item.flatten() for item in named.values()])
    hessian: Any = torch.autograd.functional.hessian(lambda point: losses(point).mean(), flat)
    if not torch.isfinite(hessian).all():
        nowhere = torch.tensor(math.nan, dtype=torch.float64)
        return nowhere, nowhere
    values, vectors = torch.linalg.eigh(hessian)
    step = 1e-3 * vectors[:, -1]
    bends = (losses(flat + step) - 2 * losses(flat) + losses(flat - step)) / 1e-6
    return values[-1], bends.var()


@dataclass(frozen=True)
class Run:
    """What came of a training.

    Attributes:
        first: loss at the start.
        last: mean of the newest losses.
        harmful: all advice that was ever given, but for information.
        final: the learning rate that was proposed at the end.
    """

    first: float
    last: float
    harmful: list[Recommendation]
    final: float | None

    @property
    def came_down(self) -> bool:
        return self.last < 0.9 * self.first


def train(lr: float, momentum: float, size: int | None) -> Run:
    model, (inputs, labels) = network(), data()
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=momentum)
    told, exact = gradwatch.MemorySink(), ExactSharpness()
    watch = gradwatch.watch(
        model,
        optimizer,
        monitors=[exact, EdgeOfStability()],
        bounds=[],
        rules=[LearningRate(), BatchSize(), Momentum(), TrainingLength()],
        sinks=[told],
        every_n_steps=1,
        log_every_n_steps=20,
        track_loss=True,
        track_clipping=True,
        train_size=len(inputs),
        on_error="raise",
    )
    generator, losses = torch.Generator().manual_seed(0), []
    for step in range(STEPS):
        exact.values = curvature(model) if step % 10 == 0 else None
        rows = torch.randperm(len(inputs), generator=generator)[: size or len(inputs)]
        loss = cross_entropy(model(inputs[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    watch.close()
    said = [item for report in told.reports for item in report.recommendations]
    final = [item.proposed for item in watch.recommendations if item.knob == "learning_rate"]
    return Run(
        first=losses[0],
        last=sum(losses[-40:]) / 40,
        harmful=[item for item in said if item.severity != "info"],
        final=final[0] if final else None,
    )


FACTORS: Final = (0.5, 0.95, 1.3, 2.0, 4.0, 20.0, 200.0)


@pytest.mark.slow
@pytest.mark.parametrize(("momentum", "size"), [(0.0, None), (0.0, 32), (0.9, None)])
def test_what_fails_is_told_a_rate_that_works_and_what_works_is_left_in_peace(
    momentum: float, size: int | None, verify: Callable[..., None]
) -> None:
    limit = 2 * (1 + momentum) / float(curvature(network())[0])
    runs = [train(factor * limit, momentum, size) for factor in FACTORS]
    alarms = sum(len(run.harmful) for run in runs if run.came_down)
    failed = [run for run in runs if not run.came_down]
    assert 0 < len(failed) < len(runs)
    proposals = [run.final for run in failed if run.final is not None]
    cured = sum(train(lr, momentum, size).came_down for lr in proposals)
    where = f"momentum {momentum:g}, batch {size or 'of all'}, lr of 0.5 to 200 limits"
    verify(
        "rules", f"alarms in runs whose loss comes down, {where}", expected=0, measured=alarms,
        tolerance="at_most",
    )  # fmt: skip
    verify(
        "rules", f"failed runs that the advice cures, {where}", expected=len(failed),
        measured=cured, tolerance=("absolute", 0),
    )  # fmt: skip

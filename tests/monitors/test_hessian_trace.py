"""HessianTrace: the probe against exact traces, and in whole trainings."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import gradwatch
from gradwatch.capture.view import NamedValues, StepView
from gradwatch.monitors.hessian_trace import HessianTrace
from gradwatch.numerics.flat import flatten, unflatten
from gradwatch.numerics.hvp import Hessian
from gradwatch.records import Measurement, ModelInfo

Probe = Callable[..., dict[str, Tensor]]
Batch = tuple[Tensor, Tensor]


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1])


def exact_trace(model: nn.Module, batch: Batch) -> float:
    point = list(model.parameters())
    hessian = Hessian(loss_fn(model, batch), point)
    size = sum(item.numel() for item in point)
    units = torch.eye(size, dtype=point[0].dtype)
    return sum(float(flatten(hessian(unflatten(unit, point))) @ unit) for unit in units)


def network(*, double: bool = True) -> tuple[nn.Module, Batch]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2))
    inputs, targets = torch.randn(30, 3), torch.randint(2, (30,))
    return (model.double(), (inputs.double(), targets)) if double else (model, (inputs, targets))


def test_the_probe_is_unbiased_with_the_error_that_it_says(probe: Probe) -> None:
    model, batch = network()
    monitor = HessianTrace(samples=4)
    found = [probe(monitor, model, batch) for _ in range(60)]
    values = torch.stack([item["hessian_trace"] for item in found])
    errors = torch.stack([item["hessian_trace_error"] for item in found])
    error = float(values.std()) / 60**0.5
    assert len(set(values.tolist())) == 60, "other signs each time"
    assert float(values.mean()) == pytest.approx(exact_trace(model, batch), abs=3 * error)
    assert float(errors.square().mean().sqrt()) == pytest.approx(float(values.std()), rel=0.3)


def test_what_was_probed_is_read() -> None:
    given = StepView(
        step=0,
        model=ModelInfo(),
        gradient_norms=NamedValues((), torch.zeros(0)),
        probed={"hessian_trace": torch.tensor(-3.0), "hessian_trace_error": torch.tensor(0.5)},
    )
    (found,) = HessianTrace().read(given)
    assert (found.metric, found.unit) == ("hessian_trace", "L/P²")
    assert float(found.values) == -3.0
    assert found.standard_errors is not None
    assert float(found.standard_errors) == 0.5
    given.probed = {}
    assert list(HessianTrace().read(given)) == []


def test_half_precision_is_noted(probe: Probe) -> None:
    model, (inputs, targets) = network(double=False)
    notes: list[str] = []
    batch = (inputs.bfloat16(), targets)
    assert probe(HessianTrace(), model.bfloat16(), batch, notes=notes) == {}
    assert any("half precision" in note for note in notes)


@pytest.mark.parametrize("samples", [1, 0, 2.5, True, "8"])
def test_a_bad_number_of_samples(samples: Any) -> None:
    with pytest.raises(gradwatch.ConfigError, match="samples must be a whole number of at least 2"):
        HessianTrace(samples)


def test_it_resumes(probe: Probe) -> None:
    model, batch = network()
    whole, first, second = HessianTrace(2), HessianTrace(2), HessianTrace(2)
    expected = [probe(whole, model, batch) for _ in range(2)]
    probe(first, model, batch)
    second.load_state_dict(first.state_dict())
    assert probe(second, model, batch) == expected[1] != expected[0]


def train(model: nn.Module, batch: Batch, *, watched: bool) -> tuple[Any, list[Measurement]]:
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    torch.manual_seed(1)
    memory = gradwatch.MemorySink()
    watch = None
    if watched:
        watch = gradwatch.watch(
            model,
            optimizer,
            loss_fn=loss_fn,
            monitors=[HessianTrace()],
            every_n_steps=1,
            log_every_n_steps=2,
            budget=None,
            on_error="raise",
            sinks=[memory],
        )
    for _ in range(6):
        optimizer.zero_grad()
        loss = loss_fn(model, batch)
        loss.backward()
        if watch is not None:
            watch.observe(batch=batch)
        optimizer.step()
    if watch is not None:
        watch.close()
    found = [item for report in memory.reports for item in report.measurements]
    return (model.state_dict(), optimizer.state_dict(), torch.get_rng_state()), found


def test_a_training_is_the_same_with_it() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 2))
    batch = (torch.randn(30, 3), torch.randint(2, (30,)))
    plain, _ = train(model, batch, watched=False)
    watched, found = train(model, batch, watched=True)
    torch.testing.assert_close(watched, plain, rtol=0, atol=0)
    traces = [item for item in found if item.metric == "hessian_trace"]
    assert traces
    assert all(item.standard_error is not None and item.standard_error > 0 for item in traces)

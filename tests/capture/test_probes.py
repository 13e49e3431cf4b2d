"""Probes: they keep to their budget, touch nothing, and fail alone."""

import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD

import gradwatch
from gradwatch import MemorySink, Monitor, Reading
from gradwatch.capture.probe.schedule import Clock, Schedule
from gradwatch.capture.probe.view import ProbeView
from gradwatch.monitors import GradientNorm

pytestmark = pytest.mark.usefixtures("one_thread")


# --- The schedule ------------------------------------------------------------------------------


def follow(
    schedule: Schedule,
    costs: Mapping[str, float],
    *,
    steps: int,
    every: int = 10,
    report: int = 50,
    step_seconds: Callable[[int], float] = lambda _: 1.0,
) -> tuple[dict[str, int], float]:
    """A training whose steps and probes take so long: number of runs, and share of the time."""
    elapsed, spent, runs = 0.0, dict.fromkeys(costs, 0.0), dict.fromkeys(costs, 0)
    for step in range(steps):
        elapsed += step_seconds(step)
        if step % every:
            continue
        for name in schedule.due(step):
            schedule.ran(name, used=True)
            elapsed += costs[name]
            spent[name] += costs[name]
            runs[name] += 1
        if step % report == 0:
            schedule.read(Clock(step + 1, elapsed, dict(spent)))
    return runs, sum(spent.values()) / elapsed


@given(
    budget=st.sampled_from([0.01, 0.02, 0.1, 0.5]),
    costs=st.lists(st.sampled_from([0.01, 1.0, 3.0, 30.0]), min_size=1, max_size=4),
    declared=st.sampled_from([0.5, 2.0, 5.0]),
    every=st.sampled_from([1, 10, 50]),
)
def test_probes_take_no_more_than_the_budget_whatever_they_cost(
    budget: float, costs: list[float], declared: float, every: int
) -> None:
    named = {str(place): cost for place, cost in enumerate(costs)}
    schedule = Schedule(dict.fromkeys(named, declared), budget)
    runs, share = follow(schedule, named, steps=5000, every=every)
    # Until a probe has run once, nobody knows what it costs: one surprise each.
    surprise = sum(max(0.0, cost - declared) * (1 + 50 // every) for cost in costs) / 5000
    assert share <= budget + surprise + 1e-9
    assert max(runs.values()) - min(runs.values()) <= 1  # they take turns


def test_the_budget_is_used() -> None:
    schedule = Schedule({"a": 1.0, "b": 2.0}, 0.02)
    runs, share = follow(schedule, {"a": 1.0, "b": 2.0}, steps=5000)
    assert 0.018 <= share <= 0.02
    assert runs["a"] >= 30


def test_a_slow_first_step_is_paid_back() -> None:
    schedule = Schedule({"a": 2.0}, 0.02)
    _, share = follow(
        schedule, {"a": 2.0}, steps=5000, step_seconds=lambda step: 1.0 if step else 100.0
    )
    assert share <= 0.02


def test_no_probe_before_the_clock_was_read() -> None:
    assert Schedule({"a": 1.0}, 1.0).due(1000) == []


def test_without_a_budget_every_probe_is_due() -> None:
    schedule = Schedule({"a": 1.0, "b": 1.0, "c": 1.0}, None)
    assert schedule.due(0) == ["a", "b", "c"]
    assert schedule.due(0, without=frozenset({"b"})) == ["a", "c"]


def test_one_that_is_off_does_not_hold_up_the_others() -> None:
    schedule = Schedule({"off": 1e9, "on": 1.0}, 0.5)
    schedule.read(Clock(100, 100.0))
    assert schedule.due(100) == []
    assert schedule.due(100, without=frozenset({"off"})) == ["on"]


def test_a_resumed_run_does_not_count_the_steps_before() -> None:
    schedule = Schedule({"a": 1.0}, 0.02)
    schedule.starts_at(100_000)
    schedule.read(Clock(1, 1.0))
    assert schedule.due(100_010) == []
    assert schedule.due(100_100) == ["a"]


# --- In a training -----------------------------------------------------------------------------


class Product(Monitor):
    """The product of the gradients of the two halves of the batch."""

    metrics = ("product",)
    probed = ("product",)

    def probe(self, view: ProbeView) -> dict[str, Tensor]:
        half = view.last.examples // 2
        first = view.gradient(view.last, rows=slice(half))
        second = view.gradient(view.last, rows=slice(half, 2 * half))
        return {
            "product": torch.stack([(first[name] * second[name]).sum() for name in first]).sum()
        }

    def read(self, view: gradwatch.StepView) -> Iterator[Reading]:
        if "product" in view.probed:
            yield Reading("product", view.probed["product"])


class Noisy(nn.Module):
    """Everything that a second evaluation could disturb."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(3, 4, 3)
        self.norm = nn.BatchNorm1d(4)
        self.recurrent = nn.LSTM(4, 5, batch_first=True, dropout=0.2, num_layers=2)
        self.attention = nn.TransformerEncoderLayer(5, 1, 8, dropout=0.3, batch_first=True)
        self.head = nn.Linear(5, 2)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        noise = random.random() + float(np.random.rand())
        y = torch.relu(self.norm(self.convolution(x))) + 0.01 * noise
        y, _ = self.recurrent(y.transpose(1, 2))
        out: Tensor = self.head(self.attention(y).mean(1))
        return out


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    return nn.functional.cross_entropy(model(x), y)


def train(
    monitors: list[Monitor] | None,
    *,
    steps: int = 6,
    told: bool = True,
    **options: Any,
) -> tuple[Noisy, SGD, list[float], gradwatch.Watch | None]:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    model = Noisy()
    optimizer = SGD(model.parameters(), 0.1, momentum=0.9)
    watch = None
    if monitors is not None:
        watch = gradwatch.watch(
            model,
            optimizer,
            monitors=monitors,
            **{"every_n_steps": 1, "log_every_n_steps": 1, "budget": None, **options},
        )
    losses = []
    data = torch.Generator().manual_seed(1)
    for _ in range(steps):
        batch = torch.randn(8, 3, 9, generator=data), torch.randint(2, (8,), generator=data)
        loss = loss_fn(model, batch)
        loss.backward()
        if watch is not None and told:
            watch.observe(batch=batch, gradients=False)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    if watch is not None:
        watch.close()
    return model, optimizer, losses, watch


def test_a_probed_training_is_bit_identical(
    training_state: Callable[..., Any], assert_identical: Callable[[Any, Any], None]
) -> None:
    results = []
    arms: tuple[list[Monitor] | None, ...] = (None, [Product()])
    for monitors in arms:
        sink = MemorySink()
        options: dict[str, Any] = {"loss_fn": loss_fn, "sinks": [sink], "on_error": "raise"}
        model, optimizer, losses, _ = train(monitors, **(options if monitors else {}))
        results.append((training_state(model, optimizer), losses, model.calls))
        if monitors:
            found = [item for report in sink.reports for item in report.measurements]
            assert [item.metric for item in found] == ["product"] * 6
    assert_identical(results[0], results[1])


def test_the_probe_sees_the_parameters_before_the_step() -> None:
    """At the parameters after it, the batch is no fresh draw any more."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1, bias=False)
    optimizer = SGD(model.parameters(), 0.5)
    sink = MemorySink()
    watch = gradwatch.watch(
        model,
        optimizer,
        monitors=[Product()],
        sinks=[sink],
        loss_fn=lambda model, x: model(x).square().mean(),
        every_n_steps=1,
        log_every_n_steps=1,
        budget=None,
        on_error="raise",
    )
    expected = []
    for _ in range(3):
        x = torch.randn(6, 3)
        gradients = [
            torch.autograd.grad(model(part).square().mean(), model.weight)[0]
            for part in (x[:3], x[3:])
        ]
        expected.append((gradients[0] * gradients[1]).sum().item())
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    watch.close()
    found = [report.value("product") for report in sink.reports]
    assert found == pytest.approx(expected, rel=1e-5)


class Failing(Product):
    def probe(self, view: ProbeView) -> dict[str, Tensor]:
        raise torch.OutOfMemoryError("no memory left")


def test_a_failing_probe_is_switched_off_alone(caplog: pytest.LogCaptureFixture) -> None:
    sink = MemorySink()
    monitors: list[Monitor] = [Failing(), GradientNorm()]
    _, _, losses, watch = train(monitors, loss_fn=loss_fn, sinks=[sink])
    assert watch is not None
    assert list(watch.failures) == ["probe of monitor Failing"]
    assert "no memory left" in watch.failures["probe of monitor Failing"]
    assert len(caplog.records) == 1
    assert len(losses) == len(sink.reports) == 6
    assert all(report.value("gradient_norm_used") is not None for report in sink.reports)


@pytest.mark.parametrize(
    ("options", "told", "reason"),
    [
        ({}, True, "give the watch a loss_fn"),
        ({"loss_fn": loss_fn}, False, "watch.observe(batch=batch)"),
        ({"loss_fn": lambda model, batch: model(batch[0])}, True, "must be a scalar"),
    ],
)
def test_a_loss_that_cannot_be_evaluated_is_a_note(
    options: dict[str, Any], told: bool, reason: str
) -> None:
    _, _, _, watch = train([Product()], told=told, **options)
    assert watch is not None
    assert not watch.failures
    (note,) = {note for note in watch.summary().notes if note.startswith("product")}
    assert reason in note


def test_a_number_that_was_not_announced_is_an_error_of_the_monitor() -> None:
    class Wrong(Product):
        def probe(self, view: ProbeView) -> dict[str, Tensor]:
            return {"other": torch.zeros(())}

    _, _, _, watch = train([Wrong()], loss_fn=loss_fn)
    assert watch is not None
    assert "other" in watch.failures["probe of monitor Wrong"]


def test_nothing_of_the_batch_is_kept_past_its_step() -> None:
    import gc
    import weakref

    model = nn.Linear(3, 1)
    optimizer = SGD(model.parameters(), 0.1)
    watch = gradwatch.watch(
        model,
        optimizer,
        monitors=[Product()],
        loss_fn=lambda model, x: model(x).square().mean(),
        every_n_steps=1,
        log_every_n_steps=1,
        budget=None,
    )
    for _ in range(2):
        x = torch.randn(4, 3)
        model(x).square().mean().backward()
        optimizer.step()
        kept = weakref.ref(x)
        del x
        gc.collect()
        assert kept() is None
    watch.close()


@pytest.mark.parametrize("budget", [0, -1, 1.5, "all", True, float("nan")])
def test_a_budget_that_is_no_share_is_refused(budget: Any) -> None:
    model = nn.Linear(3, 1)
    with pytest.raises(gradwatch.ConfigError, match=r"budget must be None or a share"):
        gradwatch.watch(model, SGD(model.parameters(), 0.1), budget=budget)


def test_a_loss_function_that_takes_outputs_is_refused() -> None:
    model = nn.Linear(3, 1)
    optimizer = SGD(model.parameters(), 0.1)
    with pytest.raises(gradwatch.ConfigError, match="a CrossEntropyLoss, which takes outputs"):
        gradwatch.watch(model, optimizer, loss_fn=nn.CrossEntropyLoss())
    with pytest.raises(gradwatch.ConfigError, match="probe_batch needs a loss_fn"):
        gradwatch.watch(model, optimizer, probe_batch=torch.zeros(2, 3))

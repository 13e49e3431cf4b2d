"""What a probe must not touch, model by model: a watched training ends as an unwatched one does."""

import random
from collections import Counter, deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, distributed, nn
from torch.optim import SGD

import gradwatch
from gradwatch import MemorySink, Monitor, Reading
from gradwatch.capture.probe.view import ProbeView

pytestmark = pytest.mark.usefixtures("one_thread")


class Square(Monitor):
    """Squared norm of the gradient of the first half, twice."""

    metrics = probed = ("square",)

    def probe(self, view: ProbeView) -> dict[str, Tensor]:
        half = slice(view.last.examples // 2)
        for _ in range(2):
            found = view.gradient(view.last, rows=half)
        return {"square": torch.stack([item.square().sum() for item in found.values()]).sum()}

    def read(self, view: gradwatch.StepView) -> Iterator[Reading]:
        if "square" in view.probed:
            yield Reading("square", view.probed["square"])


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 4)
        self.last = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(torch.tanh(self.first(x)))
        return out


class TwoNames(Body):
    """The same modules under two names each, one with buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.net = nn.Sequential(self.first, self.norm, nn.Tanh(), self.last)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


class Teacher(Body):
    """A frozen copy that follows in the forward, as those of MoCo and BYOL do."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = nn.Linear(6, 4).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.teacher.weight.mul_(0.9).add_(self.first.weight, alpha=0.1)
            self.teacher.bias.data = 0.9 * self.teacher.bias.data
        out: Tensor = super().forward(x) + self.teacher(x).mean(1, keepdim=True)
        return out


class Shrinking(Body):
    def forward(self, x: Tensor) -> Tensor:
        self.first.weight.data.mul_(0.99)
        return super().forward(x)


class Embedded(Body):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 6, max_norm=0.5)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.table((x.abs().sum(1) % 7).long()))


class Remembering(Body):
    """State in every place that Python has."""

    toggled: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.outs: dict[str, list[int]] = {"train": []}
        self.queue: deque[float] = deque([0.0], maxlen=3)
        self.counts: Counter[str] = Counter()
        self.generator = torch.Generator().manual_seed(1)
        self.numpy = np.random.default_rng(1)
        self.python = random.Random(1)
        self.register_buffer("toggled", None)
        self.calls = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        self.outs["train"].append(len(x))
        self.queue.append(self.queue[-1] + 0.1)
        self.counts["forwards"] += 1
        self.calls += 1
        self.toggled = None if self.toggled is not None else torch.ones(())
        if not hasattr(self, "extra"):
            self.extra = nn.Tanh()
        noise = torch.randn((), generator=self.generator).item()
        noise += self.numpy.random() + self.python.random() + self.queue[-1]
        noise += self.counts["forwards"] + len(self.outs["train"]) + self.calls.item()
        out: Tensor = super().forward(x) + 0.01 * noise + (0.0 if self.toggled is None else 0.1)
        return out


def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    batch["x"] = batch["x"] * 0.5
    batch["y"].mul_(0.5)
    loss: Tensor = (model(batch["x"]) - batch["y"]).square().mean()
    return loss


def train(kind: type[Body], *, watched: bool) -> tuple[Body, SGD, list[float], list[Tensor]]:
    torch.manual_seed(0)
    model = kind()
    optimizer = SGD([item for item in model.parameters() if item.requires_grad], 0.1)
    sink = MemorySink()
    watch = (
        gradwatch.watch(
            model,
            optimizer,
            monitors=[Square()],
            sinks=[sink],
            loss_fn=loss_fn,
            every_n_steps=1,
            log_every_n_steps=1,
            budget=None,
            on_error="raise",
        )
        if watched
        else None
    )
    losses, left = [], []
    data = torch.Generator().manual_seed(1)
    for _ in range(5):
        x, y = torch.randn(8, 6, generator=data), torch.randn(8, 1, generator=data)
        batch = {"x": x, "y": y}
        loss = loss_fn(model, batch)
        if watch is not None:
            watch.observe(batch=batch, gradients=False)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        left += [batch["x"], batch["y"]]
    if watch is not None:
        watch.close()
        assert [report.value("square") is not None for report in sink.reports] == [True] * 5
    return model, optimizer, losses, left


def attributes(model: nn.Module) -> dict[str, Any]:
    plain = (int, float, str, list, dict, deque, Counter, Tensor, type(None))
    found = {
        f"{name}.{key}": value
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, plain) and not key.startswith("_")
    }
    return found | {"names": [name for name, _ in model.named_modules()]}


@pytest.mark.parametrize("kind", [Body, TwoNames, Teacher, Shrinking, Embedded, Remembering])
def test_the_training_is_bit_identical(
    kind: type[Body],
    training_state: Callable[..., Any],
    assert_identical: Callable[[Any, Any], None],
) -> None:
    results = []
    for watched in (False, True):
        model, optimizer, losses, left = train(kind, watched=watched)
        assert all(type(item) is nn.Parameter for item in model.parameters())
        state = training_state(model, optimizer)
        results.append((state, losses, left, attributes(model)))
    assert_identical(results[0], results[1])


def watch_of(
    model: nn.Module, monitors: list[Monitor], given: Callable[..., Tensor], **options: Any
) -> tuple[gradwatch.Watch, SGD]:
    optimizer = SGD(model.parameters(), 0.1)
    defaults: dict[str, Any] = {"every_n_steps": 1, "log_every_n_steps": 1, "budget": None}
    return gradwatch.watch(
        model, optimizer, monitors=monitors, loss_fn=given, **defaults, **options
    ), optimizer


def step(model: nn.Module, optimizer: SGD) -> None:
    model(torch.ones(4, 6)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_a_loss_that_leads_to_nothing_is_not_tried_for_ever() -> None:
    calls = 0

    def failing(model: nn.Module, batch: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        raise KeyError(f"number {calls}")

    model = Body()
    watch, optimizer = watch_of(model, [Square()], failing)
    for _ in range(8):
        step(model, optimizer)
    watch.close()
    assert calls == 3
    assert not watch.failures
    assert any("not tried again" in note for note in watch.summary().notes)


def test_a_loss_of_something_else_is_no_gradient_of_zero() -> None:
    model, weight = Body(), nn.Parameter(torch.ones(()))
    watch, optimizer = watch_of(model, [Square()], lambda _, batch: weight * batch.mean())
    step(model, optimizer)
    watch.close()
    assert watch.summary().value("square") is None
    assert any("must call the model" in note for note in watch.summary().notes)


def test_a_batch_that_shows_no_examples_is_no_batch_of_one() -> None:
    class Batch:
        x = torch.ones(4, 6)

    model = Body()
    watch, optimizer = watch_of(model, [Square()], lambda m, batch: m(batch.x).mean())
    watch.observe(batch=Batch(), gradients=False)
    step(model, optimizer)
    watch.close()
    assert any("counts examples" in note for note in watch.summary().notes)


def test_nobody_probes_for_a_monitor_that_is_off() -> None:
    class Broken(Square):
        probes = 0

        def probe(self, view: ProbeView) -> dict[str, Tensor]:
            self.probes += 1
            return {}

        def read(self, view: gradwatch.StepView) -> Iterator[Reading]:
            raise ValueError("no reading")

    model, monitor = Body(), Broken()
    watch, optimizer = watch_of(model, [monitor], lambda m, batch: m(batch).mean())
    for _ in range(5):
        step(model, optimizer)
    watch.close()
    assert monitor.probes == 1
    assert list(watch.failures) == ["monitor Broken"]


def test_another_watch_of_the_same_model_does_not_see_the_probes() -> None:
    model = Body()
    watch, optimizer = watch_of(model, [Square()], lambda m, batch: m(batch).mean())
    other = SGD([nn.Parameter(torch.zeros(1)), model.last.bias], 0.0)
    sink = MemorySink()
    second = gradwatch.watch(model, other, sinks=[sink], every_n_steps=1, log_every_n_steps=1)
    for _ in range(2):
        model(torch.ones(4, 6)).square().mean().backward()
        optimizer.step()
        other.step()
    second.close()
    watch.close()
    assert [report.value("batch_size") for report in sink.reports] == [4, 4]


def test_a_forward_that_is_taken_back_too_late_does_no_harm() -> None:
    model = Body()
    watch, optimizer = watch_of(model, [Square()], lambda m, batch: m(batch).mean())
    watch.forward_begins(4)
    step(model, optimizer)
    watch.forward_ends(completed=False)
    step(model, optimizer)
    watch.close()
    assert not watch.failures


def collective_loss(model: nn.Module, batch: Tensor) -> Tensor:
    count = torch.ones(())
    distributed.all_reduce(count)
    loss: Tensor = model(batch).square().mean() * count / 2
    return loss


def on_one_rank_only(probing: int) -> tuple[list[float], list[str]]:
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(Body())
    rank = distributed.get_rank()
    options: dict[str, Any] = {"loss_fn": collective_loss} if rank == probing else {}
    optimizer = SGD(model.parameters(), 0.1)
    watch = gradwatch.watch(
        model,
        optimizer,
        monitors=[Square()],
        every_n_steps=1,
        log_every_n_steps=1,
        budget=None,
        **options,
    )
    losses = []
    for _ in range(4):
        loss = collective_loss(model, torch.full((4, 6), 1.0 + rank))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    watch.close()
    return losses, list(watch.summary().notes)


def test_a_loss_that_communicates_is_not_probed(on_ranks: Callable[..., list[Any]]) -> None:
    """Another rank need not be in a probe: it would wait, or take the number for another one."""
    (losses, _), (others, notes) = on_ranks(on_one_rank_only, 1)
    assert len(losses) == len(others) == 4
    assert any("communicates with other ranks" in note for note in notes)

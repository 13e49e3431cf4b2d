"""Modules outside of the model that a loss calls: they end as they would have without probes."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Thread
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules import module as torch_module
from torch.nn.utils.parametrizations import spectral_norm
from torch.optim import SGD

import gradwatch
from gradwatch import MemorySink
from gradwatch.capture.probe.batch import LastBatch
from gradwatch.capture.probe.objective import LossFunction
from gradwatch.capture.probe.undisturbed import undisturbed
from gradwatch.monitors.smoothness import Smoothness
from gradwatch.presets import full

pytestmark = pytest.mark.usefixtures("one_thread")

EVERY_STEP: dict[str, Any] = {"every_n_steps": 1, "log_every_n_steps": 1, "budget": None}


class Criterion(nn.Module):
    """A loss with state in every place."""

    centre: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(3))
        self.calls = 0
        self.seen: list[int] = []
        self.total = torch.zeros(3)
        self.generator = torch.Generator().manual_seed(1)
        self.numpy = np.random.default_rng(1)
        self.python = random.Random(1)

    def forward(self, out: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(self.calls)
        self.total += out.detach().mean(0)
        self.centre.mul_(0.9).add_(0.1 * out.detach().mean(0))
        noise = torch.rand((), generator=self.generator).item() + self.numpy.random()
        scale = 1.0 + noise + self.python.random() + self.calls
        return (scale * (out - self.centre) - self.total).square().mean()


class Replaced(nn.Module):
    """A buffer that is not changed but replaced, and one that appears."""

    last: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("last", torch.zeros(3))

    def forward(self, out: Tensor) -> Tensor:
        loss = (out - self.last).square().mean()
        self.last = out.detach().mean(0)
        if not hasattr(self, "first"):
            self.register_buffer("first", self.last)
        return loss


class Squared(nn.Module):
    def forward(self, out: Tensor) -> Tensor:
        return out.square().mean()


def teacher() -> nn.Module:
    return nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5), Squared())


def critic() -> nn.Module:
    return nn.Sequential(spectral_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 1), Squared())


def scripted() -> nn.Module:
    norm = nn.Sequential(nn.BatchNorm1d(3), Squared())
    return cast(nn.Module, torch.jit.script(norm))


def compiled() -> nn.Module:
    torch._dynamo.reset()
    return cast(nn.Module, torch.compile(teacher(), backend="eager"))


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def plain(module: nn.Module) -> list[Any]:
    """Everything that the modules hold and that can be compared."""
    kinds = (bool, int, float, list, Tensor)
    values = [
        (name, key, value)
        for name, item in module.named_modules()
        for key, value in vars(item).items()
        if isinstance(value, kinds) and not key.startswith("_")
    ]
    drawn = [item.get_state() for _, _, item in states(module, torch.Generator)]
    drawn += [
        item.bit_generator.state["state"] for _, _, item in states(module, np.random.Generator)
    ]
    drawn += [item.getstate() for _, _, item in states(module, random.Random)]
    return [values, drawn, dict(module.state_dict())]


def states(module: nn.Module, kind: type[Any]) -> Iterator[tuple[str, str, Any]]:
    for name, item in module.named_modules():
        for key, value in vars(item).items():
            if isinstance(value, kind):
                yield name, key, value


@pytest.mark.filterwarnings("ignore:`torch.jit.script`")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("outside", [Criterion, Replaced, teacher, critic, scripted, compiled])
def test_what_the_loss_calls_is_as_it_was(
    outside: Callable[[], nn.Module],
    training_state: Callable[..., Any],
    assert_identical: Callable[[Any, Any], None],
) -> None:
    results = []
    for watched in (False, True):
        torch.manual_seed(0)
        model, other = network(), outside()
        optimizer = SGD(model.parameters(), 0.1)

        def loss_fn(model: nn.Module, x: Tensor, other: nn.Module = other) -> Tensor:
            return cast(Tensor, other(model(x)))

        watch = (
            gradwatch.watch(model, optimizer, loss_fn=loss_fn, monitors=full(), **EVERY_STEP)
            if watched
            else None
        )
        data, losses = torch.Generator().manual_seed(1), []
        for _ in range(3):
            loss = loss_fn(model, torch.randn(32, 6, generator=data))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        if watch is not None:
            watch.close()
            assert not watch.failures
            assert watch.summary().value("sharpness") is not None, watch.summary().notes
        results.append((losses, training_state(model, optimizer), plain(other)))
    assert_identical(results[0], results[1])


class Pair:
    """A generator and a discriminator, trained in turns."""

    def __init__(self, *, probing: bool, by_hand: bool) -> None:
        torch.manual_seed(0)
        self.generator = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6))
        self.judge = nn.Sequential(
            spectral_norm(nn.Linear(6, 8)), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1)
        )
        self.parts = (self.generator, self.judge)
        self.optimizers = [torch.optim.Adam(item.parameters(), 1e-3) for item in self.parts]
        self.told, self.by_hand = MemorySink(), by_hand
        self.watches = [
            gradwatch.watch(
                self.judge,
                self.optimizers[1],
                loss_fn=self.judged,
                monitors=full(),
                sinks=[self.told],
                **EVERY_STEP,
            )
        ]
        if probing:
            self.watches.append(
                gradwatch.watch(
                    self.generator,
                    self.optimizers[0],
                    loss_fn=self.fooled,
                    monitors=full(),
                    **EVERY_STEP,
                )
            )

    def fooled(self, generator: nn.Module, z: Tensor) -> Tensor:
        return functional.softplus(-self.judge(generator(z))).mean()

    @staticmethod
    def judged(judge: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        real, fake = batch
        return (functional.softplus(judge(fake)) + functional.softplus(-judge(real))).mean()

    def train(self) -> None:
        first, second = self.optimizers
        data = torch.Generator().manual_seed(3)
        for _ in range(3):
            z, real = torch.randn(10, 4, generator=data), torch.randn(8, 6, generator=data)
            batch = (real, self.generator(z[:8]).detach())
            second.zero_grad()
            if self.by_hand:  # the step of the generator lies within the forward of the other
                self.watches[0].forward_begins(8)
            loss = self.judged(self.judge, batch)
            first.zero_grad()
            torch.autograd.backward(
                self.fooled(self.generator, z), inputs=[*self.generator.parameters()]
            )
            first.step()
            if self.by_hand:
                self.watches[0].forward_ends(completed=True)
            loss.backward()
            self.watches[0].observe(batch=batch, gradients=False)
            second.step()
        for watch in self.watches:
            watch.close()
            assert not watch.failures
            assert watch.summary().value("sharpness") is not None


@pytest.mark.parametrize("by_hand", [False, True])
def test_the_watch_of_another_model_says_the_same(
    by_hand: bool,
    training_state: Callable[..., Any],
    assert_identical: Callable[[Any, Any], None],
) -> None:
    """What it sees of the training does not depend on the probes of somebody else."""
    results = []
    for probing in (False, True):
        pair = Pair(probing=probing, by_hand=by_hand)
        pair.train()
        numbers = [
            [(item.metric, item.scope, item.value) for item in report.measurements]
            for report in pair.told.reports
        ]
        assert {"batch_size", "activation_norm", "smoothness"} <= {
            name for name, _, _ in numbers[-1]
        }
        states = [training_state(*both) for both in zip(pair.parts, pair.optimizers, strict=True)]
        results.append((numbers, states))
    assert_identical(results[0], results[1])


# --- One block ---------------------------------------------------------------------------------


def objective_of(model: nn.Module, other: nn.Module) -> LossFunction:
    def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
        return cast(Tensor, other(model(x)))

    batch = torch.randn(8, 6, generator=torch.Generator().manual_seed(2))
    return LossFunction(model, loss_fn, LastBatch(), batch)


@pytest.mark.parametrize("fails", [False, True])
def test_no_trace_is_left(fails: bool) -> None:
    model, other, call = network(), teacher(), nn.Module.__call__
    before = [(vars(item).copy(), dict(item._buffers)) for item in other.modules()]
    with contextmanager(ending)(fails), undisturbed(model):
        objective_of(model, other).loss()
        assert nn.Module.__call__ is not call
        if fails:
            raise ArithmeticError
    assert nn.Module.__call__ is call
    assert not torch_module._has_any_global_hook()
    for item, (attributes, buffers) in zip(other.modules(), before, strict=True):
        assert vars(item).keys() == attributes.keys()
        assert all(vars(item)[name] is value for name, value in attributes.items())
        assert all(item._buffers[name] is value for name, value in buffers.items())


def ending(fails: bool) -> Iterator[None]:
    if fails:
        with pytest.raises(ArithmeticError):
            yield
    else:
        yield


class Iterated(nn.Module):
    """Its loss depends on how often it has been called: a power iteration that goes on."""

    vector: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("vector", torch.ones(3))

    def forward(self, out: Tensor) -> Tensor:
        self.vector.mul_(0.5)
        return (out @ self.vector).square().mean()


def test_each_evaluation_begins_with_the_same_buffers() -> None:
    """A secant of the gradient is one of a single function."""
    model, other = network(), Iterated()
    objective = objective_of(model, other)
    with undisturbed(model):
        losses = [objective.loss().item() for _ in range(3)]
    assert losses[0] == losses[1] == losses[2]
    assert torch.equal(other.vector, torch.ones(3))


def test_calls_from_another_thread_are_part_of_the_training() -> None:
    model, norm = network(), nn.BatchNorm1d(3)

    def work() -> None:
        norm(torch.ones(4, 3))

    with undisturbed(model):
        objective_of(model, teacher()).loss()
        thread = Thread(target=work)
        thread.start()
        thread.join()
    assert norm.num_batches_tracked == 1
    assert torch.allclose(cast(Tensor, norm.running_mean), torch.full((3,), 0.1))


def test_a_module_around_the_model() -> None:
    """What is the model's own is put back with the model, even if another module holds it, too."""
    norm, second = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    second.register_buffer("running_mean", norm.running_mean)
    model = nn.Sequential(nn.Linear(6, 3), norm)
    around = nn.Sequential(model, second, Squared())
    held = {name: item for name, item in around.named_buffers(remove_duplicate=False)}
    values = {name: item.clone() for name, item in held.items()}
    parameters = dict(around.named_parameters())
    batch = torch.randn(8, 6)
    objective = LossFunction(model, lambda _, x: around(x), LastBatch(), batch)
    with undisturbed(model):
        objective.gradient(objective.parameters())
    for name, item in around.named_buffers(remove_duplicate=False):
        assert item is held[name]
        assert torch.equal(item, values[name])
    assert all(item is parameters[name] for name, item in around.named_parameters())


def test_a_secant_beside_a_power_iteration() -> None:
    """A quadratic loss has the same curvature, whatever the criterion remembers."""
    found = []
    for goes_on in (False, True):
        torch.manual_seed(0)
        model, other = nn.Linear(6, 3), Iterated()
        if not goes_on:
            other.vector.mul_(0.5)
            frozen = other.vector.clone()
            other.forward = lambda out, at=frozen: (out @ at).square().mean()  # type: ignore
        optimizer = SGD(model.parameters(), 0.1)
        objective = objective_of(model, other)
        watch = gradwatch.watch(
            model, optimizer, loss_fn=objective._loss_fn, monitors=[Smoothness()], **EVERY_STEP
        )
        for seed in range(2):
            x = torch.randn(8, 6, generator=torch.Generator().manual_seed(seed))
            optimizer.zero_grad()
            watch.observe(batch=x)
            objective._loss_fn(model, x).backward()
            if goes_on:
                other.vector.fill_(1.0)
            optimizer.step()
        watch.close()
        found.append(watch.summary().value("smoothness"))
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_no_watch_sees_an_evaluation_that_is_undisturbed() -> None:
    """As that of `gradwatch.spectrum`, which knows of no watch."""
    model, sink = network(), MemorySink()
    optimizer = SGD(model.parameters(), 0.1)
    watch = gradwatch.watch(model, optimizer, sinks=[sink], **EVERY_STEP)
    model(torch.ones(4, 6)).square().mean().backward()
    with undisturbed(model):
        model(torch.ones(8, 6))
    optimizer.step()
    watch.close()
    assert sink.reports[0].value("batch_size") == 4

"""Several optimizers, optimizers of one's own, and what they hold."""

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

import gradwatch

if TYPE_CHECKING:
    from tests.modes.plain.conftest import Agrees, Books, MakeBooks

FAMILY = "Plain PyTorch: optimizers"
BATCH = 5


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))


def test_groups_with_momentum_and_weight_decay(books: "MakeBooks", agrees: "Agrees") -> None:
    def grouped(model: Any) -> Optimizer:
        groups = [{"params": model[0].parameters(), "lr": 0.3}, {"params": model[2].parameters()}]
        return SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True)

    run = books(grouped)
    run.train()
    agrees("parameter groups, momentum, weight decay", run)


def test_a_tensor_as_learning_rate(books: "MakeBooks", agrees: "Agrees") -> None:
    """A scheduler changes such a learning rate in place."""
    lr = torch.tensor(0.1)
    run = books(lambda model: SGD(model.parameters(), lr=lr, foreach=False))
    for _ in range(3):
        run.train(1)
        lr.mul_(0.5)
    agrees("learning rate that is a tensor", run)


def test_a_learning_rate_that_is_a_tensor_is_that_of_its_step() -> None:
    """Also where the report comes after the scheduler has changed it in place."""
    model = net()
    lr = torch.tensor(0.8)
    optimizer = SGD(model.parameters(), lr=lr, foreach=False)
    told = gradwatch.MemorySink()
    with gradwatch.watch(
        model, optimizer, sinks=[told], every_n_steps=1, log_every_n_steps=3, on_error="raise"
    ):
        for _ in range(4):
            model(torch.randn(BATCH, 6)).sum().backward()
            optimizer.step()
            lr.mul_(0.5)
    steps = [info for report in told.reports for info in report.steps]
    assert [info.lr for info in steps] == pytest.approx([0.8, 0.4, 0.2, 0.1])
    ratios = [item for report in told.reports for item in report.measurements]
    found = [item.value * BATCH for item in ratios if item.metric == "lr_batch_ratio"]
    assert found == pytest.approx([0.8, 0.4, 0.2, 0.1])


def pair(model: Any) -> list[Optimizer]:
    first = SGD(model[0].parameters(), lr=0.1)
    return [first, Adam(model[2].parameters(), lr=0.01)]


def test_two_that_step_after_one_backward(books: "MakeBooks", agrees: "Agrees") -> None:
    run = books(pair)
    first, second = run.optimizers
    for number in range(4):
        run.model.zero_grad()
        loss = run.backward()
        run.about_to_step()
        for optimizer in (first, second) if number % 2 else (second, first):
            optimizer.step()
        run.stepped(loss=loss)
    agrees("two optimizers", run)


def test_two_that_take_turns(books: "MakeBooks", agrees: "Agrees") -> None:
    """Each has its own forward and backward; a step is a round of both."""
    run = books(pair)
    for _ in range(3):
        losses = []
        for optimizer in run.optimizers:
            run.model.zero_grad()
            losses.append(run.backward())
            run.about_to_step(optimizer=optimizer)
            optimizer.step()
        run.stepped(loss=sum(losses), batch_size=2 * BATCH)
    agrees("two optimizers, each with its own backward", run)


def test_two_at_different_rates(books: "MakeBooks", agrees: "Agrees") -> None:
    """Which step a forward was for shows only later: what it tells is not said of any."""
    run = books(pair)
    first, second = run.optimizers
    for _ in range(3):
        for both in (False, True):
            run.model.zero_grad()
            run.backward()
            run.about_to_step(optimizer=None if both else first)
            first.step()
            if both:
                second.step()
            run.stepped()
    again = "stepped again before another had"
    agrees(
        "two optimizers that step at different rates",
        run,
        batch_size=again,
        loss=again,
        activation_norm=again,
    )


def test_one_that_steps_twice_ends_the_round(books: "MakeBooks") -> None:
    """As with two critic steps for each of the generator: a round has each at most once."""
    run = books(pair)
    first, second = run.optimizers
    for _ in range(2):
        run.backward()
        run.about_to_step(optimizer=first)
        first.step()
        run.stepped()
        run.backward()
        run.about_to_step()
        first.step()
        second.step()
        run.stepped()
    run.watch.close()
    assert run.watch.step == len(run.entries)
    for report, entry in zip(run.told.reports, run.entries, strict=True):
        norms = {
            item.scope: item.value
            for item in report.measurements
            if item.metric == "gradient_norm_used" and item.scope != "model"
        }
        expected = {name: float(item.norm()) for name, item in entry.used.items()}
        assert norms == pytest.approx(expected, rel=1e-5)


def test_one_for_each_parameter(books: "MakeBooks", agrees: "Agrees") -> None:
    """Each is stepped as soon as its gradient is there, and lets go of it."""
    run = books(
        lambda model: [SGD([item], lr=0.1, momentum=0.9) for item in model.parameters()],
    )
    tiny = dict(zip(run.model.parameters(), run.optimizers, strict=True))

    def step(parameter: Tensor) -> None:
        optimizer = tiny[parameter]  # type: ignore[index]
        run.about_to_step(optimizer=optimizer)
        optimizer.step()
        optimizer.zero_grad()

    for parameter in run.model.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    for _ in range(3):
        loss = run.loss()
        loss.backward()
        run.stepped(loss=loss.item())
    agrees("optimizer in backward, one for each parameter", run)


class Base(SGD):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class Nested(Base):
    """Does something before and after the step of its parent, whose hooks fire as well."""

    def step(self, closure: Any = None) -> Any:
        self.decay(0.9)
        result = super().step(closure)
        self.decay(0.99)
        return result

    def decay(self, factor: float) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.mul_(factor)


@pytest.fixture
def parents_with_hooks() -> None:
    """Once a class has been used, its step fires hooks also when it is called by a subclass."""
    SGD(net().parameters(), lr=0.1)
    Base(net().parameters(), lr=0.1)


@pytest.mark.usefixtures("parents_with_hooks")
def test_a_step_that_calls_its_parents(books: "MakeBooks", agrees: "Agrees") -> None:
    run = books(Nested)
    run.train()
    agrees("optimizer that calls super().step()", run)


@pytest.mark.usefixtures("parents_with_hooks")
def test_a_step_that_calls_its_parents_with_a_closure(books: "MakeBooks", agrees: "Agrees") -> None:
    run: Books = books(Base)
    for _ in range(3):

        def closure() -> Tensor:
            run.optimizer.zero_grad()
            loss = run.loss()
            loss.backward()
            run.about_to_step()
            return loss

        loss = run.optimizer.step(closure)  # type: ignore[arg-type]
        run.stepped(loss=loss.item())  # type: ignore[attr-defined]
    agrees("optimizer that calls super().step(), with closure", run)


class Embedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 4, sparse=True)

    def forward(self, values: Tensor) -> Tensor:
        output: Tensor = self.table((values[:, 0].abs() * 3).long().clamp(max=9))
        return output


def test_sparse_gradients(books: "MakeBooks", agrees: "Agrees") -> None:
    """The rows of a sparse gradient may be listed twice; only their sum counts."""
    torch.manual_seed(0)
    run = books(torch.optim.SparseAdam, Embedding())
    for _ in range(3):
        loss = run.backward(batch=40)
        gradient = next(run.model.parameters()).grad
        assert gradient is not None
        assert not gradient.is_coalesced()
        run.step(loss=loss, batch_size=40)
    agrees("sparse gradients", run)


@pytest.mark.parametrize("kind", ["foreach", "fused"])
def test_kernels(kind: str, books: "MakeBooks", agrees: "Agrees") -> None:
    run = books(lambda model: Adam(model.parameters(), lr=0.1, **{kind: True}))  # type: ignore[arg-type]
    run.train()
    agrees(f"{kind} optimizer", run)

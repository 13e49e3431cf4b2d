"""A forward, a closure or a step that raises, and a loop that goes on."""

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

if TYPE_CHECKING:
    from tests.modes.plain.conftest import Agrees, MakeBooks

FAMILY = "Plain PyTorch: loops"
BATCH = 5


class OutOfMemoryError(RuntimeError):
    pass


class Fragile(SGD):
    """A step that fails when it is told to, after the watch has seen the gradients."""

    fails = False

    def step(self, closure: Any = None) -> Any:
        if self.fails:
            raise OutOfMemoryError
        return super().step(closure)


def test_a_step_that_raises(books: "MakeBooks", agrees: "Agrees") -> None:
    """The loop goes on with the next batch."""
    run = books(Fragile)
    for number in range(6):
        loss = run.backward(batch=number + 1)
        run.optimizer.fails = number in {0, 2, 3}  # type: ignore[attr-defined]
        run.about_to_step()
        try:
            run.optimizer.step()
        except OutOfMemoryError:
            run.forget()
            continue
        run.stepped(loss=loss, batch_size=number + 1)
    assert len(run.entries) == 3
    agrees("optimizer.step() raises, next batch", run)


def test_a_step_that_raises_and_is_taken_again(books: "MakeBooks", agrees: "Agrees") -> None:
    """There is no new forward that would tell the watch."""
    SGD(nn.Linear(1, 1).parameters(), lr=0.1)  # now the parent's step fires hooks as well
    run = books(Fragile)
    for _ in range(3):
        loss = run.backward()
        run.optimizer.fails = True  # type: ignore[attr-defined]
        with pytest.raises(OutOfMemoryError):
            run.optimizer.step()
        run.optimizer.fails = False  # type: ignore[attr-defined]
        run.step(loss=loss)
    assert run.watch.step == 3
    agrees("optimizer.step() raises, taken again", run)


def test_a_closure_that_raises(books: "MakeBooks", agrees: "Agrees") -> None:
    """It raises before the forward, after it, and after the backward."""
    run = books()
    for number in range(7):
        losses: list[float] = []

        def closure(number: int = number, losses: list[float] = losses) -> Tensor:
            run.optimizer.zero_grad()
            if number == 1:
                raise OutOfMemoryError
            loss = run.loss(number + 1)
            if number == 3:
                raise OutOfMemoryError
            loss.backward()
            if number == 5:
                raise OutOfMemoryError
            run.about_to_step()
            losses.append(loss.item())
            return loss

        try:
            run.optimizer.step(closure)  # type: ignore[arg-type]
        except OutOfMemoryError:
            run.forget()
            continue
        run.stepped(loss=losses[0], batch_size=number + 1)
    assert len(run.entries) == 4
    agrees("closure that raises", run)


class Moody(nn.Module):
    """A forward that fails half way when it is told to."""

    fails = False

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 16)
        self.second = nn.Linear(16, 3)

    def forward(self, values: Tensor) -> Tensor:
        hidden = torch.relu(self.first(values))
        if self.fails:
            raise OutOfMemoryError
        output: Tensor = self.second(hidden)
        return output


def test_a_forward_that_raises(books: "MakeBooks", agrees: "Agrees") -> None:
    """Too large a batch is tried again with a smaller one."""
    torch.manual_seed(0)
    model = Moody()
    run = books(model=model)
    for _ in range(3):
        model.fails = True
        with pytest.raises(OutOfMemoryError):
            run.backward(batch=64)
        model.fails = False
        run.train(1)
    assert [layer.activation for layer in run.watch.model_info.layers] == ["relu", None]
    agrees("forward that raises, smaller batch", run)

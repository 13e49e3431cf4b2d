"""Activation checkpointing, where forwards are repeated inside the backward pass."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

if TYPE_CHECKING:
    from tests.modes.plain.conftest import Agrees, MakeBooks

FAMILY = "Plain PyTorch: activation checkpointing"
BATCH = 5
KINDS = pytest.mark.parametrize(
    ("reentrant", "name"), [(False, "non-reentrant"), (True, "reentrant")]
)


class Layerwise(nn.Module):
    """Every layer is a checkpoint of its own."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.head = nn.Linear(8, 3)
        self.reentrant = reentrant

    def forward(self, values: Tensor) -> Tensor:
        hidden = self.first(values)
        for layer in self.layers:
            hidden = torch.relu(checkpoint(layer, hidden, use_reentrant=self.reentrant))
        output: Tensor = self.head(hidden)
        return output


class Segment(Layerwise):
    """One checkpoint around all hidden layers."""

    def forward(self, values: Tensor) -> Tensor:
        def run(hidden: Tensor) -> Tensor:
            for layer in self.layers:
                hidden = torch.relu(layer(hidden))
            return hidden

        hidden = checkpoint(run, self.first(values), use_reentrant=self.reentrant)
        output: Tensor = self.head(hidden)
        return output


class Sequential(Layerwise):
    def forward(self, values: Tensor) -> Tensor:
        hidden = self.first(values)
        hidden = checkpoint_sequential(
            [*self.layers], segments=2, input=hidden, use_reentrant=self.reentrant
        )
        output: Tensor = self.head(hidden)
        return output


class Shared(Layerwise):
    """One layer in two checkpoints: its gradient has two parts."""

    def forward(self, values: Tensor) -> Tensor:
        hidden = self.first(values)
        for _ in range(2):
            hidden = torch.relu(checkpoint(self.layers[0], hidden, use_reentrant=self.reentrant))
        output: Tensor = self.head(self.layers[1](hidden))
        return output


@KINDS
@pytest.mark.parametrize(
    ("kind", "what"),
    [
        (Layerwise, "each layer"),
        (Segment, "a segment"),
        (Sequential, "checkpoint_sequential"),
        (Shared, "a shared layer"),
    ],
)
def test_inside_the_model(
    kind: Callable[[bool], nn.Module],
    what: str,
    reentrant: bool,
    name: str,
    books: "MakeBooks",
    agrees: "Agrees",
) -> None:
    torch.manual_seed(0)
    run = books(model=kind(reentrant))
    run.train()
    assert set(run.entries[0].activations) == {"first", "layers.0", "layers.1", "head"}
    agrees(f"{what}, {name}", run)


def test_around_the_model(books: "MakeBooks", agrees: "Agrees") -> None:
    run = books()
    for _ in range(3):
        run.optimizer.zero_grad()
        with run.forward():
            output = checkpoint(run.model, torch.randn(BATCH, 6), use_reentrant=False)
        loss = output.square().mean()
        loss.backward()
        run.step(loss=loss.item())
    agrees("the whole model from outside, non-reentrant", run)


def test_around_the_model_reentrant(books: "MakeBooks", agrees: "Agrees") -> None:
    """Its only forward with gradients is inside the backward pass, where nothing is counted."""
    run = books()
    for _ in range(3):
        run.optimizer.zero_grad()
        values = torch.randn(BATCH, 6, requires_grad=True)
        loss = checkpoint(run.model, values, use_reentrant=True).square().mean()
        loss.backward()
        run.step(loss=loss.item())
    agrees(
        "the whole model from outside, reentrant",
        run,
        batch_size="inputs do not show it",
        activation_norm="no training forward of the whole model was seen",
    )


@KINDS
def test_with_accumulation(
    reentrant: bool, name: str, books: "MakeBooks", agrees: "Agrees"
) -> None:
    torch.manual_seed(0)
    run = books(model=Segment(reentrant))
    for _ in range(3):
        run.optimizer.zero_grad()
        losses = []
        for _ in range(2):
            loss = run.loss() / 2
            loss.backward()
            losses.append(loss.item())
        run.step(loss=sum(losses), batch_size=2 * BATCH)
    agrees(f"a segment, {name}, gradient accumulation", run)

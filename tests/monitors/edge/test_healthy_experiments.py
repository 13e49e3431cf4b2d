"""Usual trainings that go well, with all monitors: nothing is said about steps and batches."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import pytest
import torch
from torch import nn
from torch.nn import Parameter

if TYPE_CHECKING:
    from tests.monitors.edge.conftest import Lab

PAGE = "Break-even point and edge of stability"

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

Verify = Callable[..., None]
Make = Callable[[list[Parameter]], torch.optim.Optimizer]

OPTIMIZERS: Final[dict[str, Make]] = {
    "SGD, lr 0.1": lambda p: torch.optim.SGD(p, 0.1),
    "SGD, lr 0.3": lambda p: torch.optim.SGD(p, 0.3),
    "SGD, lr 0.05, momentum 0.9": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9),
    "SGD, lr 0.1, momentum 0.9": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "AdamW, lr 0.001": lambda p: torch.optim.AdamW(p, 1e-3),
}
STEPS: Final = 450


def convolutions() -> nn.Sequential:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(256, 10),
    )


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("kind", ["MLP", "CNN"])
def test_a_healthy_run_is_left_in_peace(verify: Verify, lab: "Lab", kind: str, name: str) -> None:
    said: list[str] = []
    inputs, labels = lab.digits(1437)
    # Every probe in every sampled step, on rows of its own or on the batch; and as by default.
    settings: list[dict[str, Any]] = [
        {"budget": None, "probe_batch": (inputs[:512], labels[:512])},
        {"budget": None},
        {"budget": 0.02},
    ]
    for seed, options in enumerate(settings):
        if kind == "MLP":
            model = lab.network(nn.ReLU, hidden=2, seed=seed)
        else:
            model = lab.seeded(convolutions, seed)
        run = lab.train(
            model, OPTIMIZERS[name]([*model.parameters()]), (inputs, labels), lab.classify,
            STEPS, size=32, seed=seed, every=25, planned_steps=STEPS, **options,
        )  # fmt: skip
        assert run.came_down
        said += [item.reason for item in run.advice if item.severity != "info"]
    verify(
        "rules", f"warnings and advice on learning rate, batch and momentum, {kind}, {name}",
        expected=0, measured=len(said), tolerance="at_most",
    )  # fmt: skip

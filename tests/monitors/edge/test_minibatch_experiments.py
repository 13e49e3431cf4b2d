"""SGD in small batches: the batch sharpness at its edge, and how the curvature scatters."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import gradwatch
from gradwatch.monitors import BatchSharpness, Sharpness
from gradwatch.numerics.hvp import Hessian

if TYPE_CHECKING:
    from tests.monitors.edge.conftest import Lab, Run

PAGE = "Break-even point and edge of stability"

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

Verify = Callable[..., None]

STILL: Final = 1e-12
"""Learning rate of a training that does not move."""


def trained(
    lab: "Lab", size: int, epochs: int, *monitors: gradwatch.Monitor
) -> tuple["Run", nn.Sequential]:
    """SGD in batches, and the network at its end."""
    model, data = lab.network(nn.ReLU, hidden=5), lab.digits(1280)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    steps = epochs * len(data[0]) // size
    run = lab.train(
        model, optimizer, data, lab.classify, steps, size=size, every=5, monitors=monitors
    )
    return run, model


@pytest.mark.parametrize(("size", "epochs"), [(8, 16), (32, 40), (128, 120)])
def test_b10_batch_sharpness_stays_at_the_edge(
    verify: Verify, lab: "Lab", size: int, epochs: int
) -> None:
    run, _ = trained(lab, size, epochs, BatchSharpness())
    readings = 0.1 * run.values("rayleigh_quotient")
    early, late = readings[: len(readings) // 10], readings[len(readings) // 2 :]
    verify(
        "B10", f"eta times batch sharpness, S {size}, mean of the second half of {epochs} epochs",
        expected=2.0, measured=float(late.mean()), tolerance=("absolute", 0.4),
    )  # fmt: skip
    verify(
        "B10", f"eta times batch sharpness, S {size}, mean of the first tenth", expected=0.2,
        measured=float(early.mean()), tolerance="at_most",
    )  # fmt: skip
    newest = run.readings("batch_sharpness")[-1]
    assert 0.1 * newest.value == pytest.approx(float(readings[-20:].mean()))
    assert run.statuses("MinibatchEdge") <= {"holds", "undecided"}


def stand(
    lab: "Lab", model: nn.Sequential, monitor: gradwatch.Monitor, size: int, count: int
) -> "Run":
    """Looks at a point in many batches."""
    same = deepcopy(model)
    optimizer = torch.optim.SGD(same.parameters(), STILL)
    return lab.train(
        same, optimizer, lab.digits(1280), lab.classify, count, size=size, seed=9, every=1,
        monitors=[monitor],
    )  # fmt: skip


@dataclass(frozen=True)
class Exact:
    """Along the top eigenvector of the Hessian of all rows.

    Attributes:
        sharpness: its eigenvalue.
        variance: of the curvature of single rows.
    """

    sharpness: float
    variance: float

    @classmethod
    def of(cls, network: nn.Module, data: tuple[Tensor, Tensor]) -> "Exact":
        model = deepcopy(network).double()
        inputs, labels = data[0].double(), data[1]
        weights = list(model.parameters())
        hessian = Hessian(cross_entropy(model(inputs), labels), weights)
        vector = [torch.ones_like(item) for item in weights]
        for _ in range(100):
            length = torch.cat([item.flatten() for item in vector]).norm()
            vector = [*hessian([item / length for item in vector])]
        sharpness = torch.cat([item.flatten() for item in vector]).norm()
        direction = [item / sharpness for item in vector]

        def bend(row: Tensor, label: Tensor) -> Tensor:
            loss = cross_entropy(model(row[None]), label[None])
            image = Hessian(loss, weights)(direction)
            return torch.stack(
                [(one * two).sum() for one, two in zip(direction, image, strict=True)]
            ).sum()

        bends = torch.stack([bend(*pair) for pair in zip(inputs, labels, strict=True)])
        assert float(bends.mean()) == pytest.approx(float(sharpness), rel=1e-3)
        return cls(float(sharpness), float(bends.var()))


def test_b10_the_variance_of_the_curvature(verify: Verify, lab: "Lab") -> None:
    _, model = trained(lab, 32, 14)
    exact = Exact.of(model, lab.digits(1280))
    run = stand(lab, model, Sharpness(), 320, 60)
    found, sharpness = run.values("sharpness_variance"), run.values("sharpness")
    error = float(found.std()) / len(found) ** 0.5
    verify(
        "B10", "mean of sharpness_variance, 60 batches of 320, within 3 standard errors",
        expected=exact.variance, measured=float(found.mean()), tolerance=("absolute", 3 * error),
    )  # fmt: skip
    verify(
        "B10", "mean of sharpness, 60 batches of 320", expected=exact.sharpness,
        measured=float(sharpness.mean()), tolerance=("relative", 0.03),
    )  # fmt: skip
    verify(
        "B10", "s/lambda, of another training than that of the page", expected=1.13,
        measured=float(found.mean() ** 0.5 / sharpness.mean()), tolerance=("relative", 0.1),
    )  # fmt: skip
    told = [item.standard_error or 0.0 for item in run.readings("sharpness_variance")]
    verify(
        "B10", "standard error of one reading of sharpness_variance, as told, mean",
        expected=float(found.std()), measured=sum(told) / len(told), tolerance=("factor", 1.3),
    )  # fmt: skip

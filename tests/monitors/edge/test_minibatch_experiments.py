"""SGD in small batches: the batch sharpness at its edge, and how the curvature scatters."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vmap
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


Watched = tuple[list["Run"], list[nn.Sequential]]


@pytest.fixture(scope="module")
def watched(lab: "Lab") -> Watched:
    """SGD in batches of 32, and the network after 14, 20, 26 and 32 epochs of it."""
    model, data = lab.network(nn.ReLU, hidden=5), lab.digits(1280)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    runs, networks = [], []
    for seed, epochs in enumerate((14, 6, 6, 6)):
        steps, monitors = epochs * len(data[0]) // 32, [BatchSharpness()]
        runs.append(
            lab.train(
                model, optimizer, data, lab.classify, steps, size=32, seed=seed, every=5,
                monitors=monitors,
            )
        )  # fmt: skip
        networks.append(deepcopy(model))
    return runs, networks


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


@pytest.mark.parametrize(("size", "page"), [(8, 1.82), (32, 2.01), (128, 2.13)])
def test_b10_batch_sharpness_at_four_points_of_the_training(
    verify: Verify, lab: "Lab", watched: Watched, size: int, page: float
) -> None:
    runs = [stand(lab, model, BatchSharpness(), size, 100) for model in watched[1]]
    mean = 0.1 * float(torch.cat([run.values("rayleigh_quotient") for run in runs]).mean())
    verify(
        "B10", f"eta times batch sharpness, S {size}, mean over four points, page {page}",
        expected=2.0, measured=mean, tolerance=("absolute", 0.4),
    )  # fmt: skip
    for run in runs:  # what the monitor calls the mean is that of its newest 20 readings
        newest = run.readings("batch_sharpness")[-1]
        assert newest.value == pytest.approx(float(run.values("rayleigh_quotient")[-20:].mean()))


def test_b10_batch_sharpness_along_the_training(verify: Verify, watched: Watched) -> None:
    readings = torch.cat([run.values("rayleigh_quotient") for run in watched[0]])
    for what, tolerance, part in (
        ("first 100 steps", "at_most", readings[:20]),
        ("epochs 14 to 32", ("absolute", 0.4), readings[-144:]),
    ):
        verify(
            "B10", f"eta times batch sharpness, S 32, mean over the {what}", expected=2.0,
            measured=0.1 * float(part.mean()), tolerance=tolerance,
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
        named = dict(model.named_parameters())
        hessian = Hessian(cross_entropy(model(inputs), labels), list(named.values()))
        vector = [torch.ones_like(item) for item in named.values()]
        for _ in range(100):
            length = torch.cat([item.flatten() for item in vector]).norm()
            vector = [*hessian([item / length for item in vector])]
        sharpness = torch.cat([item.flatten() for item in vector]).norm()
        direction = {name: item / sharpness for name, item in zip(named, vector, strict=True)}
        point = {name: item.detach() for name, item in named.items()}

        def bend(row: Tensor, label: Tensor) -> Tensor:
            def loss(values: dict[str, Tensor]) -> Tensor:
                return cross_entropy(functional_call(model, values, (row[None],)), label[None])

            def slope(values: dict[str, Tensor]) -> Tensor:
                found: Tensor = jvp(loss, (values,), (direction,))[1]
                return found

            along: Tensor = jvp(slope, (point,), (direction,))[1]
            return along

        bends = vmap(bend)(inputs, labels)
        assert float(bends.mean()) == pytest.approx(float(sharpness), rel=1e-3)
        return cls(float(sharpness), float(bends.var()))


def test_b10_the_variance_of_the_curvature(verify: Verify, lab: "Lab", watched: Watched) -> None:
    model = watched[1][0]
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

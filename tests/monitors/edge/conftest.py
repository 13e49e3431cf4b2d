"""Watched trainings on digits, for the experiments on the edge of stability."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, Final

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

import gradwatch
from gradwatch.records import Measurement, Recommendation

Batch = tuple[Tensor, Tensor]
Loss = Callable[[nn.Module, Batch], Tensor]

KNOBS: Final = frozenset({"learning_rate", "batch_size", "momentum"})


@dataclass(frozen=True)
class Run:
    """What a watch said of a training.

    Attributes:
        reports: all of them.
        losses: of each step.
        standing: all advice at the end.
    """

    reports: Sequence[gradwatch.Report]
    losses: Sequence[float]
    standing: Sequence[Recommendation]

    def readings(self, metric: str) -> list[Measurement]:
        every = (item for report in self.reports for item in report.measurements)
        return [item for item in every if item.metric == metric]

    def values(self, metric: str) -> Tensor:
        return torch.tensor([item.value for item in self.readings(metric)], dtype=torch.float64)

    def at(self, metric: str, first: int, last: int) -> list[float]:
        return [item.value for item in self.readings(metric) if first <= item.step <= last]

    def statuses(self, bound: str, since: int = 0) -> set[str]:
        """Of the verdicts of a bound."""
        verdicts = (item for report in self.reports for item in report.verdicts)
        found = [item for item in verdicts if item.bound == bound]
        assert found
        return {item.status for item in found if item.measurement.step >= since}

    @property
    def advice(self) -> list[Recommendation]:
        """On learning rate, batch size and momentum, as often as it was said."""
        said = (item for report in self.reports for item in report.recommendations)
        return [item for item in said if item.knob in KNOBS]

    @property
    def final(self) -> Recommendation | None:
        """The advice on these knobs that stands at the end; there is never more than one."""
        found = [item for item in self.standing if item.knob in KNOBS]
        assert len(found) < 2
        return found[0] if found else None

    @property
    def late(self) -> float:
        """Mean of the newest losses."""
        newest = self.losses[-40:]
        return sum(newest) / len(newest)

    @property
    def came_down(self) -> bool:
        return self.late < 0.5 * self.losses[0]


@cache
def load_digits(rows: int) -> Batch:
    datasets = pytest.importorskip("sklearn.datasets")
    pixels, labels = (torch.as_tensor(part) for part in datasets.load_digits(return_X_y=True))
    order = torch.as_tensor(np.random.RandomState(0).permutation(len(pixels))[:rows])
    return pixels[order].float() / 16, labels[order]


def batches(data: Batch, size: int | None, seed: int) -> Iterator[Batch]:
    """In epochs without replacement; what is left over is left out."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for rows in torch.randperm(len(data[0]), generator=generator).split(size or len(data[0])):
            if size is None:
                yield data  # in the order that it has
            elif len(rows) == size:
                yield data[0][rows], data[1][rows]


class Lab:
    """Data, networks and trainings."""

    @staticmethod
    def digits(rows: int) -> Batch:
        """Pixels in [0, 1] and labels, shuffled by NumPy's legacy generator with seed 0."""
        return load_digits(rows)

    @staticmethod
    def seeded(make: Callable[[], nn.Sequential], seed: int = 0) -> nn.Sequential:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return make()

    def network(self, kind: type[nn.Module], hidden: int, seed: int = 0) -> nn.Sequential:
        """Hidden layers of 32, with PyTorch's initial weights."""

        def make() -> nn.Sequential:
            sizes = [64, *([32] * hidden)]
            layers = [
                item for one, two in pairwise(sizes) for item in (nn.Linear(one, two), kind())
            ]
            return nn.Sequential(*layers, nn.Linear(sizes[-1], 10))

        return self.seeded(make, seed)

    @staticmethod
    def half_square(model: nn.Module, batch: Batch) -> Tensor:
        """Half the squared error, a sum over outputs and a mean over rows."""
        outputs = model(batch[0])
        loss: Tensor = 0.5 * (outputs - one_hot(batch[1], 10).to(outputs)).square().sum(1).mean()
        return loss

    @staticmethod
    def classify(model: nn.Module, batch: Batch) -> Tensor:
        return cross_entropy(model(batch[0]), batch[1])

    @staticmethod
    def train(
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        data: Batch,
        loss_fn: Loss,
        steps: int,
        *,
        size: int | None = None,
        seed: int = 0,
        every: int = 50,
        **options: Any,
    ) -> Run:
        """Trains on batches of a size, or on all rows, watched with all monitors and rules."""
        told = gradwatch.MemorySink()
        given = {"budget": None, "train_size": len(data[0]), **options}
        watch = gradwatch.watch(
            model,
            optimizer,
            sinks=[told],
            every_n_steps=every,
            log_every_n_steps=every,
            loss_fn=loss_fn,
            track_loss=True,
            track_clipping=True,
            on_error="raise",
            **given,
        )
        losses = []
        for _, batch in zip(range(steps), batches(data, size, seed), strict=False):
            watch.observe(batch=batch)
            loss = loss_fn(model, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        standing = watch.recommendations
        watch.close()
        return Run(told.reports, losses, standing)

    @staticmethod
    def says_nothing(verify: Callable[..., None], experiment: str, what: str, run: Run) -> None:
        """A training that goes well is left in peace."""
        assert run.came_down
        verify(
            experiment,
            f"recommendations on learning rate, batch and momentum, {what}",
            expected=0,
            measured=len(run.advice),
            tolerance="at_most",
        )


@pytest.fixture(scope="session")
def lab() -> Lab:
    return Lab()

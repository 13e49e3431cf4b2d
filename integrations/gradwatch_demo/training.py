"""One watched training: the loop that a reader of the README would write."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

import gradwatch
from gradwatch import Monitor, ProbeView, Report, presets
from gradwatch.monitors import BatchSharpness, Sharpness
from gradwatch_demo.data import Digits
from gradwatch_demo.progress import ProgressSink, progress

BATCH_SIZE = 16
LEARNING_RATE = 0.005
PROBED_IMAGES = 128
"""The curvature is measured on so many: a small batch curves more than the data."""
RARELY = 25
"""Every so many probes one of the sharpness, which costs as much as ten of the others."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What both trainings of the demo have in common.

    Attributes:
        steps: how many optimizer steps.
        seed: of the order of the data.
    """

    steps: int
    seed: int


class OccasionalSharpness(Sharpness):
    """The sharpness in some probes only, in place of a budget that a clock would divide."""

    def __init__(self) -> None:
        super().__init__()
        self._asked = 0

    @override
    def probe(self, view: ProbeView) -> dict[str, Tensor]:
        self._asked += 1
        return super().probe(view) if self._asked % RARELY == 1 else {}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came out of a training.

    Attributes:
        accuracy: share of the test images that are classified correctly.
        summary: what the watch has to say at the end.
    """

    accuracy: float
    summary: Report


def train(model: nn.Module, digits: Digits, settings: Settings, logdir: Path) -> Outcome:
    """Trains a classifier by plain SGD, watched.

    Every second step is measured and probed, of the sharpness every fiftieth: a short training has
    no time for a budget.

    Args:
        model: the classifier, on the device of the data.
        digits: the data.
        settings: length and order.
        logdir: folder for the record of the run and its TensorBoard files.

    Returns:
        What came out of it.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    batches = digits.batches(steps=settings.steps, size=BATCH_SIZE, seed=settings.seed)
    with (
        progress(batches, total=settings.steps, title=logdir.name) as bar,
        gradwatch.watch(
            model,
            optimizer,
            logdir=logdir,
            every_n_steps=2,
            monitors=monitors(),
            loss_fn=loss_fn,
            probe_batch=(digits.train_images[:PROBED_IMAGES], digits.train_labels[:PROBED_IMAGES]),
            budget=None,
            track_loss=True,
            track_clipping=True,
            sinks=[ProgressSink(bar)],
        ) as watch,
    ):
        for batch in bar:
            loss = loss_fn(model, batch)
            loss.backward()
            watch.observe(batch=batch)
            optimizer.step()
            optimizer.zero_grad()
    return Outcome(accuracy(model, digits), watch.summary())


def monitors() -> list[Monitor]:
    """The default monitors, with an occasional sharpness, and none along each gradient.

    Returns:
        New monitors.
    """
    standard = [item for item in presets.standard() if not isinstance(item, BatchSharpness)]
    return [OccasionalSharpness() if isinstance(item, Sharpness) else item for item in standard]


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """What is trained on.

    Args:
        model: the classifier.
        batch: images and labels.

    Returns:
        () mean cross-entropy.
    """
    images, labels = batch
    return functional.cross_entropy(model(images), labels)


@torch.no_grad()
def accuracy(model: nn.Module, digits: Digits) -> float:
    """Share of the test images that a model classifies correctly.

    Args:
        model: the classifier.
        digits: the data.

    Returns:
        A number from 0 to 1.
    """
    model.eval()
    guesses = model(digits.test_images).argmax(dim=1)
    model.train()
    share: float = (guesses == digits.test_labels).float().mean().item()
    return share


@contextmanager
def one_thread() -> Iterator[None]:
    """Computes on one CPU thread inside: layers this small lose more by sharing than they gain.

    Yields:
        Nothing.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)

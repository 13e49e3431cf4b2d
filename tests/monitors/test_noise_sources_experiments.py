"""All ways to measure the gradient noise against the gradients of single samples.

The weights stay, samples are drawn independently, and the parts that a step was made of are known:
what the watch says must be the estimate from exactly those parts, and right on average.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import gradwatch
from gradwatch.monitors import GradientNoise

PAGE = "Learning-rate / batch-size ratio"

pytestmark = pytest.mark.usefixtures("one_thread")

Verify = Callable[..., None]
OnRanks = Callable[..., list[Any]]
Values = dict[str, Tensor]

SAMPLES = 48
STEPS = 300
METRICS = ("gradient_square", "gradient_variance")


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(SAMPLES, 6, generator=generator, dtype=torch.float64)
    return inputs, (inputs[:, 0] + inputs[:, 1] > 0).long() + (inputs[:, 2] > 0.5).long()


def net() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return cross_entropy(model(batch[0]), batch[1])


def each_gradient() -> Tensor:
    """(SAMPLES, P): the gradient of every sample by itself."""
    model, (inputs, labels) = net(), data()
    found = []
    for row in range(SAMPLES):
        loss = loss_fn(model, (inputs[row : row + 1], labels[row : row + 1]))
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        found.append(torch.cat([item.flatten() for item in gradients]))
    return torch.stack(found)


def truth() -> dict[str, float]:
    each = each_gradient()
    mean = each.mean(0)
    return {
        "gradient_square": float(mean @ mean),
        "gradient_variance": float((each - mean).square().sum(1).mean()),
    }


def rows_of(rank: int, batch: int, steps: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(rank)
    for _ in range(steps):
        yield torch.randint(SAMPLES, (batch,), generator=generator)


def estimates(parts: Sequence[Tensor], each: Tensor) -> tuple[float, float]:
    """The U-statistics of a step whose parts are the mean gradients of these rows."""
    gradients = torch.stack([each[rows].mean(0) for rows in parts])
    count, size = len(parts), len(parts[0])
    whole, squares = float(gradients.sum(0).square().sum()), float(gradients.square().sum())
    square = (whole - squares) / (count * (count - 1))
    return square, size * (squares - whole / count) / (count - 1)


def measure(
    model: nn.Module, micro: int, batch: int, *, adam: bool = False, **options: Any
) -> tuple[Values, set[str]]:
    """What is read in each step that draws `batch` samples in `micro` micro-batches a rank."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    steps, told = options.pop("steps", STEPS), gradwatch.MemorySink()
    optimizer: torch.optim.Optimizer = (
        torch.optim.Adam(model.parameters(), lr=0.0, betas=(0.9, 0.99))
        if adam
        else torch.optim.SGD(model.parameters(), lr=0.0)
    )
    watch = gradwatch.watch(
        model,
        optimizer,
        monitors=[GradientNoise()],
        sinks=[told],
        every_n_steps=1,
        log_every_n_steps=1,
        budget=None,
        track_clipping=True,
        on_error="raise",
        **options,
    )
    inputs, labels = data()
    for rows in rows_of(rank, batch, steps):
        if "loss_fn" in options:
            watch.observe(batch=(inputs[rows], labels[rows]))
        parts = rows.chunk(micro)
        for place, part in enumerate(parts):
            silent = model.no_sync if isinstance(model, DistributedDataParallel) else nullcontext
            with silent() if place < micro - 1 else nullcontext():
                (loss_fn(model, (inputs[part], labels[part])) / micro).backward()
        optimizer.step()
        optimizer.zero_grad()
    watch.close()
    found = [item for report in told.reports for item in report.measurements]
    values = {
        metric: torch.tensor([item.value for item in found if item.metric == metric]).double()
        for metric in METRICS
    }
    return values, {item.source for item in found if item.metric in METRICS}


def right(verify: Verify, source: str, values: Values, parts: Sequence[Sequence[Tensor]]) -> None:
    """Step by step the estimate of these parts, and on average the truth."""
    each = each_gradient()
    expected = torch.tensor([estimates(item, each) for item in parts], dtype=torch.float64)
    for column, (metric, exact) in enumerate(truth().items()):
        assert len(values[metric]) == len(parts)
        verify(
            "V3",
            f"largest error of a single {metric}, {source}",
            expected=0.0,
            measured=float((values[metric] - expected[:, column]).abs().max()),
            tolerance=("absolute", 1e-5 * float(expected[:, column].abs().max())),
        )
        error = float(values[metric].std()) / math.sqrt(len(parts))
        verify(
            "V3",
            f"mean {metric}, {source}, within 3 standard errors",
            expected=exact,
            measured=float(values[metric].mean()),
            tolerance=("absolute", 3 * error),
        )


@pytest.mark.parametrize(("micro", "batch"), [(2, 8), (4, 16)])
def test_v3_micro_batches(verify: Verify, micro: int, batch: int) -> None:
    values, sources = measure(net(), micro, batch)
    assert sources == {f"{micro} micro-batches"}
    parts = [rows.chunk(micro) for rows in rows_of(0, batch, STEPS)]
    right(verify, f"{micro} micro-batches of {batch // micro}", values, parts)


def test_v3_halves(verify: Verify) -> None:
    values, sources = measure(net(), 1, 16, loss_fn=loss_fn)
    assert sources == {"two halves of the batch"}
    right(verify, "halves of 8", values, [rows.chunk(2) for rows in rows_of(0, 16, STEPS)])


@pytest.mark.slow
def test_v8_the_state_of_adam(verify: Verify) -> None:
    """Over many times its memory of 100 steps, without the first 300 of them."""
    values, sources = measure(net(), 1, 8, adam=True, steps=2000)
    assert sources == {"the state of Adam"}
    for metric, exact in truth().items():
        verify(
            "V8",
            f"mean {metric}, the state of Adam in a watched run",
            expected=exact,
            measured=float(values[metric][300:].mean()),
            tolerance=("relative", 0.05),
        )


def on_two_ranks(micro: int) -> tuple[Values, set[str]]:
    return measure(DistributedDataParallel(net()), micro, 8)


@pytest.mark.slow
@pytest.mark.parametrize("micro", [1, 2])
def test_v3_ranks(verify: Verify, on_ranks: OnRanks, micro: int) -> None:
    """Ranks are parts as micro-batches are; the first one tells."""
    (values, sources), _ = on_ranks(on_two_ranks, micro)
    assert all(source.startswith("2 ranks") for source in sources)
    drawn = zip(rows_of(0, 8, STEPS), rows_of(1, 8, STEPS), strict=True)
    parts = [[*one.chunk(micro), *two.chunk(micro)] for one, two in drawn]
    right(verify, f"2 ranks with {micro} micro-batches of {8 // micro}", values, parts)

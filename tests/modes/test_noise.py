"""The noise of the gradient and the smoothness, against a float64 copy of the model."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.utils.checkpoint import checkpoint

import gradwatch

FAMILY = "Gradient noise and smoothness"
STEPS, BATCH, LR = 3, 8, 0.1

pytestmark = pytest.mark.usefixtures("one_thread")


def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
    loss: Tensor = model(batch).double().square().mean()
    return loss


class Blocks(nn.Module):
    """A small network, whose inner block may be checkpointed."""

    def __init__(self, reentrant: bool | None = None, normalised: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 16)
        self.block = nn.Sequential(
            nn.Linear(16, 16), nn.BatchNorm1d(16) if normalised else nn.Identity(), nn.Tanh()
        )
        self.last = nn.Linear(16, 4)
        self.reentrant = reentrant

    def forward(self, values: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(values))
        if self.reentrant is None:
            hidden = self.block(hidden)
        else:
            hidden = checkpoint(self.block, hidden, use_reentrant=self.reentrant)
        output: Tensor = self.last(hidden)
        return output


# --- The reference -----------------------------------------------------------------------------


def gradient(model: nn.Module, batch: Tensor) -> Tensor:
    """Of the mean loss of a batch, for all parameters together, in float64."""
    loss = model(batch.double()).square().mean()
    return torch.cat([item.flatten() for item in torch.autograd.grad(loss, [*model.parameters()])])


def twin(model: nn.Module) -> nn.Module:
    """A float64 copy that nobody watches and that keeps nothing for later."""
    other = Blocks(normalised=isinstance(model.block[1], nn.BatchNorm1d)).double()  # type: ignore[index]
    other.load_state_dict(model.state_dict())
    return other


def halves(model: nn.Module, batch: Tensor) -> dict[str, float]:
    """`g1 . g2` and `b ||g1 - g2||²/2` for halves of b examples."""
    half = len(batch) // 2
    first, second = (gradient(model, part) for part in (batch[:half], batch[half : 2 * half]))
    return {
        "gradient_square": float(first @ second),
        "gradient_variance": half * float((first - second).square().sum()) / 2,
    }


def pairs(model: nn.Module, batches: list[Tensor]) -> dict[str, float]:
    """From the inner products of the gradients of the parts of a step, one with another."""
    samples = sum(map(len, batches))
    shares = [len(batch) / samples for batch in batches]
    parts = [share * gradient(model, item) for share, item in zip(shares, batches, strict=True)]
    products = sum(float(one @ two) for one in parts for two in parts if one is not two)
    square = products / (1 - sum(share**2 for share in shares))
    total = float(torch.stack(parts).sum(0).square().sum())
    return {"gradient_square": square, "gradient_variance": samples * (total - square)}


def moments(gradients: list[Tensor]) -> dict[str, float]:
    """From what Adam's two running means of the gradients so far must be, for BATCH samples."""
    ages = range(len(gradients) - 1, -1, -1)
    fast, slow = ([beta**age for age in ages] for beta in (0.9, 0.999))
    fast = [weight / sum(fast) for weight in fast]
    slow = [weight / sum(slow) for weight in slow]
    mean = sum(weight * item for weight, item in zip(fast, gradients, strict=True))
    square = float(mean.square().sum())  # type: ignore[union-attr]
    second = sum(w * float(g.square().sum()) for w, g in zip(slow, gradients, strict=True))
    shrink = sum(weight**2 for weight in fast)
    noise = (second - square) / (1 - shrink)
    return {"gradient_square": square - shrink * noise, "gradient_variance": BATCH * noise}


def secant(model: nn.Module, batch: Tensor) -> dict[str, float]:
    """`||g(w - lr g) - g(w)|| / ||lr g||`."""
    before = gradient(model, batch)
    moved = copy.deepcopy(model)
    place = 0
    for item in moved.parameters():
        item.data -= LR * before[place : place + item.numel()].view_as(item)
        place += item.numel()
    change = gradient(moved, batch) - before
    return {"smoothness_secant": float(change.norm() / (LR * before).norm())}


# --- Trainings ---------------------------------------------------------------------------------


Expected = dict[str, dict[str, float]]  # source -> quantity -> value


@dataclass
class Run:
    """Reports, and for each what is expected in it."""

    reports: list[gradwatch.Report] = field(default_factory=list)
    expected: list[Expected] = field(default_factory=list)


def train(
    *,
    make: Callable[[], nn.Module] = Blocks,
    called: Callable[[nn.Module], Any] = lambda model: model,
    sizes: tuple[int, ...] = (BATCH,),
    optimizer: str = "SGD",
    precision: torch.dtype | None = None,
    scaled: bool = False,
    clipped: bool = False,
    closure: bool = False,
    weigh: bool = False,
    **options: Any,
) -> Run:
    """Some steps, each of micro-batches of these sizes that count by their samples."""
    inner = make()
    outer = called(inner)
    run, told, gradients = Run(), gradwatch.MemorySink(), list[Tensor]()
    chosen: Any = getattr(torch.optim, optimizer)(inner.parameters(), lr=LR)
    settings: dict[str, Any] = {
        "monitors": [gradwatch.monitors.GradientNoise(), gradwatch.monitors.Smoothness()],
        "every_n_steps": 1,
        "log_every_n_steps": 1,
        "loss_fn": loss_fn,
        "budget": None,
        "on_error": "raise",
        "sinks": [told],
    } | options
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, enabled=scaled)
    data = torch.Generator().manual_seed(1)
    with gradwatch.watch(outer, chosen, **settings) as watch:
        for _ in range(STEPS):
            batches = [torch.randn(size, 6, generator=data) for size in sizes]
            run.expected.append(expected_of(inner, batches, gradients))

            def evaluate(batches: list[Tensor] = batches) -> Tensor:
                chosen.zero_grad()
                for batch in batches:
                    with torch.autocast("cpu", torch.bfloat16, enabled=precision is not None):
                        loss = loss_fn(outer, batch) * len(batch) / sum(sizes)
                    scaler.scale(loss).backward()
                    if weigh:
                        watch.weigh_microbatch(len(batch))
                return loss

            if closure:
                chosen.step(evaluate)
                continue
            evaluate()
            scaler.unscale_(chosen)
            if clipped:
                clip_grad_norm_(inner.parameters(), 1e-3)
            scaler.step(chosen)
            scaler.update()
    run.reports = list(told.reports)
    return run


def expected_of(model: nn.Module, batches: list[Tensor], gradients: list[Tensor]) -> Expected:
    other = twin(model)
    several = pairs(other, batches) if len(batches) > 1 else {}
    adam = moments(gradients) if len(gradients) > 1 else {}
    gradients.append(gradient(other, torch.cat(batches)))
    return {
        "halves": halves(other, batches[-1]),
        "parts": several,
        "adam": adam,
        "secant": secant(other, batches[-1]),
    }


def check(cell: Any, mode: str, run: Run, source: str, rel: float = 1e-4) -> None:
    """Noise from this source, and the smoothness."""
    assert len(run.reports) == STEPS
    for report, expected in zip(run.reports, run.expected, strict=True):
        for quantity, value in {**expected[source], **expected["secant"]}.items():
            cell.equal(mode, quantity, report.value(quantity), value, rel=rel)


EXACT: dict[str, tuple[str, dict[str, Any]]] = {
    "loss_fn": ("halves", {}),
    "loss_fn, clip_grad_norm_": ("halves", {"clipped": True}),
    "loss_fn, closure": ("halves", {"closure": True}),
    "loss_fn, GradScaler": ("halves", {"scaled": True}),
    "loss_fn, Adam": ("halves", {"optimizer": "Adam"}),
    "loss_fn, activation checkpoint, non-reentrant": (
        "halves",
        {"make": partial(Blocks, reentrant=False)},
    ),
    "loss_fn, batch normalisation": ("halves", {"make": partial(Blocks, normalised=True)}),
    "loss_fn, gradient accumulation": ("parts", {"sizes": (8, 8, 8)}),
    "loss_fn, gradient accumulation, GradScaler": ("parts", {"sizes": (8, 8, 8), "scaled": True}),
    "loss_fn, gradient accumulation, clip_grad_norm_, track_clipping": (
        "parts",
        {"sizes": (8, 8), "clipped": True, "track_clipping": True},
    ),
    "loss_fn, gradient accumulation, unequal, weigh_microbatch": (
        "parts",
        {"sizes": (4, 10, 8), "weigh": True},
    ),
}


@pytest.mark.parametrize("mode", EXACT)
def test_the_values_are_those_of_a_copy_in_float64(mode: str, cell: Any) -> None:
    source, options = EXACT[mode]
    check(cell, mode, train(**options), source)


def test_autocast(cell: Any) -> None:
    """The probe computes as the training does, so only roughly as the reference."""
    run = train(precision=torch.bfloat16)
    check(cell, "loss_fn, autocast to bfloat16 (within 10 %)", run, "halves", rel=0.1)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_model(cell: Any) -> None:
    torch._dynamo.reset()
    run = train(called=lambda model: torch.compile(model, backend="eager"))
    check(cell, "loss_fn, torch.compile(model)", run, "halves")


def test_the_state_of_adam(cell: Any) -> None:
    run = train(optimizer="Adam", loss_fn=None)
    for report, expected in list(zip(run.reports, run.expected, strict=True))[2:]:
        for quantity, value in expected["adam"].items():
            cell.equal("Adam, no loss_fn", quantity, report.value(quantity), value, rel=1e-3)
        cell.unavailable(
            "Adam, no loss_fn", "smoothness_secant", report, "give the watch a loss_fn"
        )


Reasons = dict[str, str]
MISSING: dict[str, tuple[dict[str, Any], Reasons]] = {
    "SGD, no loss_fn": (
        {"loss_fn": None},
        {"gradient_square": "a loss_fn", "smoothness_secant": "give the watch a loss_fn"},
    ),
    "loss_fn, activation checkpoint, reentrant": (
        {"make": partial(Blocks, reentrant=True)},
        {"gradient_square": "use_reentrant=False", "smoothness_secant": "use_reentrant=False"},
    ),
    "loss_fn, weights in bfloat16": (
        {"make": lambda: Blocks().bfloat16(), "precision": torch.bfloat16},
        {"smoothness_secant": "half precision"},
    ),
    "gradient accumulation, clip_grad_norm_, no track_clipping, no loss_fn": (
        {"sizes": (8, 8), "clipped": True, "loss_fn": None},
        {"gradient_square": "track_clipping=True"},
    ),
    "loss_fn, batches of one": (
        {"sizes": (1,)},
        {"gradient_square": "a batch of one example"},
    ),
}


@pytest.mark.parametrize("mode", MISSING)
def test_what_cannot_be_known_is_said(mode: str, cell: Any) -> None:
    options, reasons = MISSING[mode]
    for report in train(**options).reports:
        for quantity, reason in reasons.items():
            cell.unavailable(mode, quantity, report, reason)
            if quantity == "gradient_square":
                cell.unavailable(mode, "gradient_variance", report, reason)


# --- Several processes -------------------------------------------------------------------------


def sharded(model: nn.Module) -> nn.Module:
    fully_shard(model)
    return model


def on_two(kind: str) -> list[gradwatch.Report]:
    wrap = DistributedDataParallel if kind == "DDP" else sharded
    model = wrap(Blocks())
    chosen = torch.optim.SGD(model.parameters(), lr=LR)
    told = gradwatch.MemorySink()
    with gradwatch.watch(
        model,
        chosen,
        monitors=[gradwatch.monitors.GradientNoise(), gradwatch.monitors.Smoothness()],
        every_n_steps=1,
        log_every_n_steps=1,
        loss_fn=loss_fn,
        budget=None,
        on_error="raise",
        track_clipping=True,
        sinks=[told],
    ):
        for batches in data_of_two():
            loss_fn(model, batches[dist.get_rank()]).backward()
            chosen.step()
            chosen.zero_grad()
    return list(told.reports)


def data_of_two() -> Iterator[list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        yield [torch.randn(BATCH, 6, generator=generator) for _ in range(2)]


def both_kinds() -> dict[str, list[gradwatch.Report]]:
    return {kind: on_two(kind) for kind in ("DDP", "FSDP2")}


def test_two_processes(on_ranks: Callable[..., list[Any]], cell: Any) -> None:
    found = on_ranks(both_kinds)[0]
    model = twin(Blocks())
    for step, batches in enumerate(data_of_two()):
        for kind in ("DDP", "FSDP2"):
            report = found[kind][step]
            for quantity, value in pairs(model, batches).items():
                cell.equal(kind, quantity, report.value(quantity), value, rel=1e-4)
        # Each rank takes the step of its own gradient; the values are averaged.
        each = [secant(model, batch)["smoothness_secant"] for batch in batches]
        measured = found["DDP"][step].value("smoothness_secant")
        cell.equal("DDP", "smoothness_secant", measured, sum(each) / 2, rel=1e-4)
        cell.unavailable("FSDP2", "smoothness_secant", found["FSDP2"][step], "sharded")
        moved = gradient(model, torch.cat(batches))
        place = 0
        for item in model.parameters():
            item.data -= LR * moved[place : place + item.numel()].view_as(item)
            place += item.numel()

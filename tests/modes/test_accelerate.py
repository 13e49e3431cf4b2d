"""Loops with accelerate: reported numbers against an independent replay in double precision."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import gradwatch

accelerate = pytest.importorskip("accelerate")

FAMILY = "accelerate"
MAX_NORM = 0.1
MICRO = 4

pytestmark = pytest.mark.usefixtures("one_thread", "own_accelerator")


@pytest.fixture
def own_accelerator() -> Iterator[None]:
    """Accelerate has one state a process, whose precision cannot be changed."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


@dataclass
class Step:
    """What one optimizer step was made of."""

    before: dict[str, Tensor]
    lr: float
    batches: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    used: dict[str, Tensor] = field(default_factory=dict)
    after: dict[str, Tensor] = field(default_factory=dict)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))


def samples() -> TensorDataset:
    random = torch.Generator().manual_seed(1)
    return TensorDataset(
        torch.randn(64, 6, generator=random), torch.randint(3, (64,), generator=random)
    )


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: item.grad.double() for name, item in model.named_parameters() if item.grad is not None
    }


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: item.detach().clone() for name, item in model.named_parameters()}


def train(
    told: gradwatch.Sink, *, accumulate: int = 1, clip: bool = False, precision: str = "no"
) -> list[Step]:
    """Trains as accelerate's own examples do, watched with all that needs no word of the user."""
    accelerator = accelerate.Accelerator(
        cpu=True, gradient_accumulation_steps=accumulate, mixed_precision=precision
    )
    plain = net()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    loader = DataLoader(samples(), batch_size=MICRO)
    model, optimizer, loader = accelerator.prepare(plain, optimizer, loader)
    steps: list[Step] = []
    with gradwatch.watch(
        model,
        optimizer,
        sinks=[told],
        every_n_steps=1,
        log_every_n_steps=1,
        track_loss=True,
        track_clipping=True,
        on_error="raise",
    ) as watch:
        begun = False
        for inputs, labels in loader:
            if not begun:
                steps.append(Step(parameters(plain), optimizer.param_groups[0]["lr"]))
                begun = True
            steps[-1].batches.append((inputs.clone(), labels.clone()))
            with accelerator.accumulate(model):
                loss = nn.functional.cross_entropy(model(inputs), labels)
                accelerator.backward(loss)
                if accelerator.sync_gradients and clip:
                    accelerator.clip_grad_norm_(model.parameters(), MAX_NORM)
                if accelerator.sync_gradients:
                    steps[-1].used = gradients(plain)
                optimizer.step()
                if accelerator.sync_gradients:
                    steps[-1].after = parameters(plain)
                    begun = False
                optimizer.zero_grad()
        assert watch.failures == {}
    return steps


@dataclass
class Replay:
    loss: float
    gradients: dict[str, Tensor]
    activations: dict[str, float]
    batch_size: int


def replay(step: Step, precision: str = "no") -> Replay:
    """The step once more, in double precision unless the training had mixed precision."""
    mixed = precision == "bf16"
    twin = net() if mixed else net().double()
    twin.load_state_dict(step.before)
    losses, norms = [], {}
    for inputs, labels in step.batches:
        values = inputs if mixed else inputs.double()
        for name, module in twin.named_children():
            with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
                values = module(values)
            if next(module.parameters(), None) is not None:
                norms[name] = values.detach().double().square().sum(1).mean().sqrt().item()
        losses.append(nn.functional.cross_entropy(values.double(), labels))
    loss = torch.stack(losses).mean()
    loss.backward()
    size = sum(len(inputs) for inputs, _ in step.batches)
    return Replay(loss.item(), gradients(twin), norms, size)


def sizes(values: dict[str, Tensor]) -> dict[str, float]:
    whole = torch.stack([item.norm() for item in values.values()]).norm().item()
    return {"model": whole, **{name: item.norm().item() for name, item in values.items()}}


def measured(report: gradwatch.Report, metric: str) -> dict[str, float]:
    return {item.scope: item.value for item in report.measurements if item.metric == metric}


MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulate": {"accumulate": 4},
    "clip_grad_norm_": {"clip": True},
    "accumulate and clip_grad_norm_": {"accumulate": 2, "clip": True},
    "bf16": {"precision": "bf16"},
}


@pytest.mark.parametrize("mode", MODES)
def test_the_numbers_are_those_of_the_replay(mode: str, cell: Any) -> None:
    options = MODES[mode]
    told = gradwatch.MemorySink()
    steps = train(told, **options)
    assert len(steps) == 64 // MICRO // options.get("accumulate", 1)
    precision = options.get("precision", "no")
    for report, step in zip(told.reports, steps, strict=True):
        expected = replay(step, precision)
        used = measured(report, "gradient_norm_used")
        moved = {name: step.after[name].double() - step.before[name].double() for name in step.used}
        cell.equal(mode, "gradient_norm_used", used, sizes(step.used))
        raw = step.used if precision == "bf16" else expected.gradients
        cell.equal(mode, "gradient_norm", measured(report, "gradient_norm"), sizes(raw))
        cell.equal(mode, "update_norm", report.value("update_norm"), sizes(moved)["model"])
        cell.equal(
            mode, "activation_norm", measured(report, "activation_norm"), expected.activations
        )
        cell.equal(mode, "loss", report.value("loss"), expected.loss)
        cell.equal(mode, "batch_size", report.value("batch_size"), expected.batch_size)
        cell.equal(mode, "lr", report.info.lr, step.lr)
        if options.get("clip"):
            assert used["model"] == pytest.approx(MAX_NORM, rel=1e-4)


# --- Several processes -------------------------------------------------------------------------


def train_on_this_rank() -> dict[str, Any]:
    told = gradwatch.MemorySink()
    steps = train(told, accumulate=2, clip=True)
    return {
        "reports": [report.to_dict() for report in told.reports],
        "steps": [vars(step) for step in steps],
    }


def test_two_processes_report_what_one_would(on_ranks: Callable[..., list[Any]], cell: Any) -> None:
    first, second = on_ranks(train_on_this_rank, joined=False)
    reports = [gradwatch.Report.from_dict(item) for item in first["reports"]]
    assert second["reports"] == []
    mode = "DDP, accumulate and clip_grad_norm_"
    steps = [[Step(**step) for step in rank["steps"]] for rank in (first, second)]
    assert len(reports) == 64 // MICRO // 2 // 2
    for report, own, other in zip(reports, *steps, strict=True):
        assert not torch.equal(own.batches[0][0], other.batches[0][0])
        expected = replay(Step(own.before, own.lr, own.batches + other.batches))
        parts = [replay(own), replay(Step(own.before, own.lr, other.batches))]
        activations = {
            name: math.hypot(value, parts[1].activations[name]) / math.sqrt(2)
            for name, value in parts[0].activations.items()
        }
        cell.equal(mode, "activation_norm", measured(report, "activation_norm"), activations)
        moved = {name: own.after[name].double() - own.before[name].double() for name in own.used}
        cell.equal(
            mode, "gradient_norm_used", measured(report, "gradient_norm_used"), sizes(own.used)
        )
        cell.equal(
            mode, "gradient_norm", measured(report, "gradient_norm"), sizes(expected.gradients)
        )
        cell.equal(mode, "update_norm", report.value("update_norm"), sizes(moved)["model"])
        cell.equal(mode, "loss", report.value("loss"), expected.loss)
        cell.equal(mode, "batch_size", report.value("batch_size"), expected.batch_size)
        cell.equal(mode, "lr", report.info.lr, own.lr)

"""Where the statements about plain SGD do not apply, the watch says so and gives no advice.

Every trap is a training that differs in one thing from one on which everything is decided.
"""

from collections.abc import Callable
from typing import Any, Final

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_

import gradwatch
from gradwatch import presets
from gradwatch.bounds import NoiseFloor, RandomlyStoppedSgd
from gradwatch.monitors import GradientNoise, LossValue, Smoothness, Stationarity
from gradwatch.rules import BatchSize, DataScale, Dropout, LearningRate, TrainingLength

pytestmark = pytest.mark.usefixtures("one_thread")

Batch = tuple[Tensor, Tensor]
Loss = Callable[[nn.Module, Batch], Tensor]

STEPS: Final = 210

TARGET = 1e-4
"""Whoever names one hears of it, unless a trap is set."""


def blobs() -> Batch:
    """Two classes that overlap."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (256,), generator=generator)
    return torch.randn(256, 6, generator=generator) + 0.7 * labels[:, None], labels


def small() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    return cross_entropy(model(batch[0]), batch[1])


def below_zero(model: nn.Module, batch: Batch) -> Tensor:
    return loss_fn(model, batch) - 5.0


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.3)


def train(
    steps: int = STEPS,
    *,
    make: Callable[[nn.Module], torch.optim.Optimizer] = sgd,
    loss: Loss = loss_fn,
    before_step: Callable[[nn.Module, torch.optim.Optimizer, int], object] = lambda *_: None,
    **options: Any,
) -> gradwatch.Watch:
    model, (inputs, labels) = small(), blobs()
    optimizer = make(model)
    watch = gradwatch.watch(
        model,
        optimizer,
        **{
            "monitors": [LossValue(), GradientNoise(), Smoothness(), Stationarity()],
            "bounds": [RandomlyStoppedSgd(), NoiseFloor()],
            "rules": [rule(TARGET) for rule in (LearningRate, BatchSize, TrainingLength, Dropout)],
            "every_n_steps": 1,
            "log_every_n_steps": 70,
            "loss_fn": loss,
            "budget": None,
            "track_loss": True,
            "track_clipping": True,
            "on_error": "raise",
            **options,
        },
    )
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        rows = torch.randint(len(inputs), (16,), generator=generator)
        watch.observe(batch=(inputs[rows], labels[rows]))
        for part in rows.chunk(4):
            (loss(model, (inputs[part], labels[part])) / 4).backward()
        before_step(model, optimizer, step)
        optimizer.step()
        optimizer.zero_grad()
    watch.close()
    return watch


def verdicts(watch: gradwatch.Watch) -> dict[str, gradwatch.Verdict]:
    return {item.bound: item for item in watch.summary().verdicts}


def of_the_floor(watch: gradwatch.Watch) -> list[gradwatch.Recommendation]:
    return [
        item
        for item in watch.recommendations
        if any(evidence.bound == "NoiseFloor" for evidence in item.evidence)
    ]


def test_without_a_trap_all_is_decided() -> None:
    watch = train()
    assert {name: item.status for name, item in verdicts(watch).items()} == {
        "RandomlyStoppedSgd": "holds",
        "NoiseFloor": "holds",
    }
    assert of_the_floor(watch)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), 0.01)


def decayed(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.3, weight_decay=0.01)


def two_rates(model: nn.Module) -> torch.optim.Optimizer:
    first, *rest = model.parameters()
    groups: list[dict[str, Any]] = [{"params": [first], "lr": 0.1}, {"params": rest}]
    return torch.optim.SGD(groups, 0.3)


def clip(model: nn.Module, _: torch.optim.Optimizer, step: int) -> None:
    clip_grad_norm_(model.parameters(), 1e-3)


def clip_seldom(model: nn.Module, _: torch.optim.Optimizer, step: int) -> None:
    clip_grad_norm_(model.parameters(), 1e-3 if step % 10 == 0 else 1e3)


TRAPS: dict[str, tuple[dict[str, Any], str]] = {
    "Adam": ({"make": adam}, "the optimizer is Adam"),
    "weight decay": ({"make": decayed}, "weight decay"),
    "groups": ({"make": two_rates}, "different learning rates"),
    "clipped": ({"before_step": clip}, "clipped in 100% of the steps"),
    "clipped seldom": ({"before_step": clip_seldom}, "clipped in 10% of the steps"),
    "short": ({"steps": 150}, "fewer than 200"),
    "negative loss": ({"loss": below_zero}, "lowest_loss"),
    "no curvature": (
        {"monitors": [LossValue(), GradientNoise(), Stationarity()]},
        "the smoothness L is unknown",
    ),
}


QUICK = ("Adam", "clipped", "short", "negative loss")


@pytest.mark.parametrize(
    "trap",
    [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in TRAPS],
)
def test_a_trap_leaves_it_undecided_and_gives_no_advice(trap: str) -> None:
    options, reason = TRAPS[trap]
    watch = train(**options)
    found = verdicts(watch)
    assert "NoiseFloor" in found
    for verdict in found.values():
        assert verdict.status == "undecided"
        assert reason in verdict.because
    assert of_the_floor(watch) == []


def test_a_learning_rate_that_changes_leaves_the_floor_undecided() -> None:
    def decay(_: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        optimizer.param_groups[0]["lr"] = 0.3 / (1 + step / 500)

    watch = train(before_step=decay)
    assert verdicts(watch)["NoiseFloor"].status == "undecided"
    assert "learning rate changed" in verdicts(watch)["NoiseFloor"].because
    assert verdicts(watch)["RandomlyStoppedSgd"].status == "holds"
    assert of_the_floor(watch) == []


def test_clipping_out_of_sight_is_not_taken_for_none() -> None:
    """By hand, where the watch was not even told to look for it."""

    def clip_by_hand(model: nn.Module, _: torch.optim.Optimizer, step: int) -> None:
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(0.1)

    watch = train(before_step=clip_by_hand, track_clipping=False)
    for verdict in verdicts(watch).values():
        assert verdict.status == "undecided"
        assert "track_clipping=True" in verdict.because
    assert of_the_floor(watch) == []


def digits() -> Batch:
    datasets = pytest.importorskip("sklearn.datasets")
    pixels, labels = (torch.as_tensor(part) for part in datasets.load_digits(return_X_y=True))
    return pixels.float() / 16, labels


NEW = (BatchSize, DataScale, Dropout, LearningRate, TrainingLength)


@pytest.mark.slow
@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_healthy_training_is_left_in_peace(seed: int, parts: int) -> None:
    """The default parts, at settings that the digits are learned with."""
    (inputs, labels), told = digits(), gradwatch.MemorySink()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    watch = gradwatch.watch(
        model,
        optimizer,
        rules=[rule for rule in presets.rules() if isinstance(rule, NEW)],
        sinks=[told],
        every_n_steps=1,
        log_every_n_steps=50,
        loss_fn=loss_fn,
        train_size=len(inputs),
        budget=None,
        track_loss=True,
        track_clipping=True,
        on_error="raise",
    )
    generator = torch.Generator().manual_seed(seed)
    for _ in range(600):
        rows = torch.randint(len(inputs), (32,), generator=generator)
        watch.observe(batch=(inputs[rows], labels[rows]))
        for part in rows.chunk(parts):
            (loss_fn(model, (inputs[part], labels[part])) / parts).backward()
        optimizer.step()
        optimizer.zero_grad()
    watch.close()
    said = [item for report in told.reports for item in report.recommendations]
    assert said  # the rules are not just asleep
    assert {item.severity for item in said} == {"info"}
    assert float(loss_fn(model, (inputs, labels)).detach()) < 0.4

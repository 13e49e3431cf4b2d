"""Probes that several processes make together: one curvature of all batches, and nobody waits."""

import math
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW, Optimizer

import gradwatch
from gradwatch.capture.probe.view import ProbeView
from gradwatch.errors import ClosedError
from gradwatch.monitors import GradientNorm
from gradwatch.monitors.batch_sharpness import BatchSharpness
from gradwatch.monitors.sharpness import Sharpness

OnRanks = Callable[..., list[Any]]
Batch = tuple[Tensor, Tensor]
STEPS, BATCH, PRODUCTS = 7, 32, 9
EIGENVALUES = ("sharpness", "preconditioned_sharpness")
OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda parameters: SGD(parameters, lr=0.1, momentum=0.5),
    "adamw": lambda parameters: AdamW(parameters, lr=1e-2, amsgrad=True),
}


def net(dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 17), nn.Tanh(), nn.Dropout(dropout), nn.Linear(17, 5))


def ddp(dropout: float = 0.0) -> nn.Module:
    return DistributedDataParallel(net(dropout))


def fsdp(dropout: float = 0.0) -> nn.Module:
    model = net(dropout)
    model[3].bias.requires_grad = False
    fully_shard(model[0])
    fully_shard(model)
    return model


def one(dropout: float = 0.0) -> nn.Module:
    return net(dropout)


def one_as_fsdp(dropout: float = 0.0) -> nn.Module:
    model = net(dropout)
    model[3].bias.requires_grad = False
    return model


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1])


def batch_of(step: int, rank: int = 0, world: int = 1) -> Batch:
    draws = torch.Generator().manual_seed(step)
    x = torch.randn(BATCH, 6, generator=draws)
    y = torch.randint(0, 5, (BATCH,), generator=draws)
    share = BATCH // world
    mine = slice(rank * share, (rank + 1) * share)
    return x[mine], y[mine]


def train(
    model: nn.Module,
    optimizer: str = "sgd",
    *,
    rank: int = 0,
    world: int = 1,
    watched: bool = True,
    tell: bool = True,
    before_step: Callable[[int, gradwatch.Watch], None] = lambda step, watch: None,
    hook: Callable[[Optimizer], None] = lambda optimizer: None,
    monitors: list[gradwatch.Monitor] | None = None,
    **options: Any,
) -> dict[str, Any]:
    steps = OPTIMIZERS[optimizer](item for item in model.parameters() if item.requires_grad)
    told = gradwatch.MemorySink()
    watch = None
    if watched:
        settings: dict[str, Any] = {
            "monitors": monitors or [Sharpness(PRODUCTS), BatchSharpness(), GradientNorm()],
            "loss_fn": loss_fn,
            "every_n_steps": 1,
            "log_every_n_steps": 1,
            "budget": None,
            "sinks": [told],
        }
        watch = gradwatch.watch(model, steps, **(settings | options))
    hook(steps)
    torch.manual_seed(7 + rank)
    losses = []
    for step in range(STEPS):
        batch = batch_of(step, rank, world)
        if watch is not None and tell:
            with suppress(ClosedError):
                watch.observe(batch=batch)
        loss = loss_fn(model, batch)
        loss.backward()
        if watch is not None:
            before_step(step, watch)
        take(steps)
        steps.zero_grad()
        losses.append(loss.item())
    outcome: dict[str, Any] = {
        "losses": losses,
        "weights": [full(item) for item in model.parameters()],
        "random": torch.get_rng_state(),
    }
    if watch is None:
        return outcome
    watch.close()
    return outcome | {
        "failures": dict(watch.failures),
        "notes": watch.summary().notes,
        "points": points(told),
    }


def take(optimizer: Optimizer) -> None:
    try:
        optimizer.step()
    except (OSError, KeyboardInterrupt):
        optimizer.step()


def full(tensor: Tensor) -> Tensor:
    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.detach().clone()


def points(told: gradwatch.MemorySink) -> dict[tuple[str, int], float]:
    return {
        (item.metric, item.step): item.value
        for report in told.reports
        for item in report.measurements
    }


# --- What the ranks do -------------------------------------------------------------------------


class Breaks(Sharpness):
    """On one rank the second probe ends before its time."""

    def __init__(self, after: int, error: Exception) -> None:
        super().__init__(PRODUCTS)
        self.after, self.error = after, error

    def probe(self, view: ProbeView) -> dict[str, Tensor]:
        sums, left = view.sums, self.after
        if dist.get_rank() == 0 or self._probes != 1 or sums is None:
            return super().probe(view)
        real = sums.sum

        def counted(parts: Any) -> list[Tensor]:
            nonlocal left
            if left == 0:
                raise self.error
            left -= 1
            return real(parts)

        sums.sum = counted  # type: ignore[method-assign]
        try:
            return super().probe(view)
        finally:
            del sums.sum


class OtherSums(Sharpness):
    """On one rank it wants other sums than on the other."""

    def joint_sums(self, view: ProbeView) -> int:
        return super().joint_sums(view) + dist.get_rank()


class MoreThanItSaid(Sharpness):
    def joint_sums(self, view: ProbeView) -> int:
        return super().joint_sums(view) - 2


def interrupts(model: nn.Module, batch: Batch, left: list[int] = [3]) -> Tensor:  # noqa: B006
    """On one rank somebody presses a key in the middle of a probe."""
    probing = not isinstance(model, DistributedDataParallel)
    if probing and dist.get_rank() == 1 and left:
        left[0] -= 1
        if left[0] == 0:
            left.clear()
            raise KeyboardInterrupt
    return loss_fn(model, batch)


def closes(*, other_first: bool) -> Callable[[int, gradwatch.Watch], None]:
    def before_step(step: int, watch: gradwatch.Watch) -> None:
        if step != 3:
            return
        if (dist.get_rank() == 1) == other_first:
            time.sleep(1.0)
        if dist.get_rank() == 1:
            watch.close()

    return before_step


def capture_is_lost(step: int, watch: gradwatch.Watch) -> None:
    if step == 3 and dist.get_rank() == 1:
        watch._isolation.failures["capture"] = "on purpose"


def own_schedule(step: int, watch: gradwatch.Watch) -> None:
    """One rank does not want to probe in two of the steps."""
    probes = watch._session.probes
    if step in {2, 5} and dist.get_rank() == 1 and probes is not None:
        probes._due = []


def raises_once(optimizer: Optimizer) -> None:
    left = [1] if dist.get_rank() == 1 else []

    def hook(*_: Any) -> None:
        if left:
            left.pop()
            raise OSError("the step failed")

    optimizer.register_step_pre_hook(hook)


def all_of_them() -> dict[str, Any]:
    place: dict[str, Any] = {"rank": dist.get_rank(), "world": 2}
    found: dict[str, Any] = {}
    for kind in (ddp, fsdp):
        for optimizer in OPTIMIZERS:
            found[f"{kind.__name__} {optimizer}"] = train(kind(), optimizer, **place)
        watched, bare = (train(kind(0.3), watched=watched, **place) for watched in (True, False))
        found[f"spectator {kind.__name__}"] = [watched, bare]
    for after in (0, 1, 7):
        monitors = [Breaks(after, OSError("on one rank")), BatchSharpness()]
        found[f"breaks {after}"] = train(ddp(), monitors=monitors, **place)
    monitors = [Breaks(0, OSError("on one rank")), BatchSharpness()]
    found["reported late"] = train(ddp(), monitors=monitors, log_every_n_steps=STEPS, **place)
    monitors = [Breaks(2, OSError("on one rank")), BatchSharpness()]
    found["on_error"] = train(ddp(), monitors=monitors, on_error="raise", **place)
    found["interrupt"] = train(ddp(), loss_fn=interrupts, **place)
    memory = torch.OutOfMemoryError("out of memory")
    found["memory"] = train(fsdp(), monitors=[Breaks(1, memory), BatchSharpness()], **place)
    found["no batch"] = train(ddp(), tell=dist.get_rank() == 0, **place)
    for first in (True, False):
        closing = closes(other_first=first)
        found[f"closes {first}"] = train(ddp(), before_step=closing, **place)
    found["capture"] = train(ddp(), before_step=capture_is_lost, **place)
    found["schedule"] = train(ddp(), before_step=own_schedule, **place)
    found["raises"] = train(ddp(), hook=raises_once, **place)
    found["other sums"] = train(ddp(), monitors=[OtherSums(PRODUCTS)], **place)
    found["too many"] = train(ddp(), monitors=[MoreThanItSaid(PRODUCTS)], **place)
    return found


@pytest.fixture(scope="module")
def cache() -> dict[str, Any]:
    return {}


@pytest.fixture
def ranks(cache: dict[str, Any], on_ranks: OnRanks) -> dict[str, list[Any]]:
    if not cache:
        cache["failed"] = []  # not again for each test
        first, second = on_ranks(all_of_them, timeout=240)
        cache.update({name: [first[name], second[name]] for name in first})
    return cache


# --- What is expected --------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_the_curvature_is_that_of_one_process_with_all_batches(
    kind: str, optimizer: str, ranks: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A single process makes fewer products where the last probe needed fewer.
    monkeypatch.setattr("gradwatch.monitors.sharpness.FEWEST", PRODUCTS)
    single = train(one() if kind == "ddp" else one_as_fsdp(), optimizer)["points"]
    wanted = {
        place: value
        for place, value in single.items()
        if place[0] in {*EIGENVALUES, "rayleigh_quotient"}
    }
    metrics = {metric for metric, _ in wanted}
    assert metrics >= {"sharpness", "rayleigh_quotient"}
    assert ("preconditioned_sharpness" in metrics) == (optimizer == "adamw")
    for found in ranks[f"{kind} {optimizer}"]:
        assert found["failures"] == {}
        told = {place: value for place, value in found["points"].items() if place[0] in metrics}
        if told or found is ranks[f"{kind} {optimizer}"][0]:  # one rank speaks
            assert told == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_training_with_joint_probes_is_bit_identical(
    kind: str, ranks: dict[str, Any], assert_identical: Callable[[Any, Any], None]
) -> None:
    for watched, bare in ranks[f"spectator {kind}"]:
        assert watched["failures"] == {}
        assert_identical({name: watched[name] for name in bare}, bare)


@pytest.mark.parametrize("after", [0, 1, 7])
def test_a_joint_probe_that_breaks_on_one_rank_is_off_on_all(
    after: int, ranks: dict[str, Any]
) -> None:
    part = "probe of monitor Breaks"
    first, second = ranks[f"breaks {after}"]
    assert second["failures"] == {part: "OSError: on one rank"}
    assert first["failures"] == {part: "it failed on another rank"}
    assert steps_of(first, "sharpness") == [0]
    assert steps_of(first, "rayleigh_quotient") == list(range(STEPS)), "the others go on"


def test_the_others_go_on_before_the_next_report(ranks: dict[str, Any]) -> None:
    first, second = ranks["reported late"]
    assert first["failures"].keys() == second["failures"].keys()
    assert steps_of(first, "rayleigh_quotient") == list(range(STEPS))


@pytest.mark.parametrize("name", ["interrupt", "on_error"])
def test_what_leaves_a_probe_leaves_nobody_waiting_for_the_next_one(
    name: str, ranks: dict[str, Any]
) -> None:
    first, second = ranks[name]
    assert_same(first["weights"], second["weights"])
    assert steps_of(first, "rayleigh_quotient")[-2:] == [STEPS - 2, STEPS - 1]


def assert_same(one: list[Tensor], other: list[Tensor]) -> None:
    assert all(torch.equal(mine, its) for mine, its in zip(one, other, strict=True))


def test_a_rank_that_runs_out_of_memory_is_not_waited_for(ranks: dict[str, Any]) -> None:
    first, second = ranks["memory"]
    (failure,) = second["failures"].values()
    assert "memory" in failure
    assert first["failures"].keys() == second["failures"].keys()
    assert steps_of(first, "rayleigh_quotient") == list(range(STEPS))


def test_a_rank_without_a_batch_leaves_the_value_out(ranks: dict[str, Any]) -> None:
    first, second = ranks["no batch"]
    assert first["failures"] == second["failures"] == {}
    assert not steps_of(first, "sharpness")
    assert any("sharpness" in note for note in first["notes"])
    assert steps_of(first, "gradient_norm_used") == list(range(STEPS))


@pytest.mark.parametrize("first", [True, False])
def test_a_rank_may_close_while_another_waits_in_a_probe(
    first: bool, ranks: dict[str, Any]
) -> None:
    speaking, closed = ranks[f"closes {first}"]
    assert speaking["failures"] == closed["failures"] == {}
    assert steps_of(speaking, "sharpness")[:3] == [0, 1, 2]
    assert any("another rank was closed" in note for note in speaking["notes"])
    assert all(math.isfinite(value) for value in speaking["points"].values())


def test_a_rank_that_captures_nothing_any_more_is_not_waited_for(ranks: dict[str, Any]) -> None:
    first, second = ranks["capture"]
    assert "capture" in first["failures"]
    assert "capture" in second["failures"]
    assert steps_of(first, "sharpness") == [0, 1, 2]


def test_ranks_that_do_not_agree_on_a_probe_do_not_wait(ranks: dict[str, Any]) -> None:
    first, _ = ranks["schedule"]
    assert first["failures"] == {}
    assert steps_of(first, "sharpness") == [0, 1, 3, 4, 6]
    assert steps_of(first, "gradient_norm_used") == list(range(STEPS))


def test_a_step_that_is_taken_again_on_one_rank_keeps_nobody_waiting(ranks: dict[str, Any]) -> None:
    first, second = ranks["raises"]
    assert first["failures"] == second["failures"] == {}
    assert steps_of(first, "gradient_norm_used")[1:] == list(range(1, STEPS))
    assert steps_of(first, "sharpness")[-3:] == list(range(STEPS))[-3:]


def test_different_sums_on_the_ranks_are_no_sums(ranks: dict[str, Any]) -> None:
    first, second = ranks["other sums"]
    assert first["failures"] == second["failures"] == {}
    assert not steps_of(first, "sharpness")


def test_a_probe_that_takes_more_sums_than_it_said_is_off(ranks: dict[str, Any]) -> None:
    for found in ranks["too many"]:
        (failure,) = found["failures"].values()
        assert "it must take as many sums as its joint_sums() says" in failure


def steps_of(found: dict[str, Any], metric: str) -> list[int]:
    return [step for name, step in found["points"] if name == metric]

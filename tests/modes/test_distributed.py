"""Several real processes report what one process with the whole batch reports."""

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

import gradwatch

FAMILY = "Several processes"
STEPS, BATCH, MAX_NORM = 3, 8, 0.05
Told = list[gradwatch.Report]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4)
    )


def ddp(model: nn.Sequential) -> nn.Module:
    return DistributedDataParallel(model)


def fsdp(model: nn.Sequential) -> nn.Module:
    for layer in (model[0], model[2]):
        fully_shard(layer)
    fully_shard(model)
    return model


def hsdp(model: nn.Sequential) -> nn.Module:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    fully_shard(model[2], mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def fsdp_with_tensor_parallelism(model: nn.Sequential) -> nn.Module:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    parallelize_module(model, mesh["tensor"], plan)
    fully_shard(model, mesh=mesh["data"])
    return model


def alone(model: nn.Sequential) -> nn.Module:
    return model


def batches(micro_batches: int) -> Iterator[list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        yield list(torch.randn(micro_batches * BATCH, 6, generator=generator).split(BATCH))


def my_part(batch: Tensor, replicas: int) -> Tensor:
    if replicas == 1:
        return batch
    place = dist.get_rank() * replicas // dist.get_world_size()
    return batch.chunk(replicas)[place]


def train(
    wrap: Callable[[nn.Sequential], nn.Module],
    replicas: int,
    *,
    micro_batches: int = 1,
    clip: bool = False,
    **options: Any,
) -> tuple[Told, gradwatch.Report]:
    """What rank 0 tells its sinks, and the summary that every rank has."""
    model = wrap(net())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, foreach=False)
    told = gradwatch.MemorySink()
    settings: dict[str, Any] = {"track_loss": True, "track_clipping": True, "on_error": "raise"}
    settings |= {
        "monitors": gradwatch.presets.full(),
        "every_n_steps": 1,
        "log_every_n_steps": 1,
        "sinks": [told],
    }
    with gradwatch.watch(model, optimizer, **settings | options) as watch:
        for step in batches(micro_batches):
            for place, batch in enumerate(step):
                last = place == micro_batches - 1
                silent = getattr(model, "no_sync", nullcontext)
                with nullcontext() if last else silent():
                    output = model(my_part(batch, replicas))
                    (output.square().mean() / micro_batches).backward()
            if clip:
                clip_grad_norm_(model.parameters(), MAX_NORM)
            optimizer.step()
            optimizer.zero_grad()
        summary = watch.summary()
    return list(told.reports), summary


# --- Modes -------------------------------------------------------------------------------------

Modes = dict[str, tuple[Callable[[nn.Sequential], nn.Module], dict[str, Any]]]
TWO: Modes = {
    "DDP": (ddp, {}),
    "DDP, accumulation with no_sync": (ddp, {"micro_batches": 3}),
    "DDP, clip_grad_norm_": (ddp, {"clip": True}),
    "FSDP2": (fsdp, {}),
    "FSDP2, clip_grad_norm_": (fsdp, {"clip": True}),
}
FOUR: Modes = {
    "HSDP": (hsdp, {"clip": True}),
    "FSDP2 with tensor parallelism": (fsdp_with_tensor_parallelism, {}),
}
WITHOUT_ACTIVATIONS = "FSDP2 with tensor parallelism"


def train_all(modes: list[str]) -> dict[str, Any]:
    replicas = {WITHOUT_ACTIVATIONS: 2}
    return {
        name: train((TWO | FOUR)[name][0], replicas.get(name, dist.get_world_size()), **options)
        for name, (_, options) in (TWO | FOUR).items()
        if name in modes
    }


@pytest.mark.parametrize(("modes", "world"), [(TWO, 2), (FOUR, 4)], ids=["two", "four"])
def test_all_ranks_together_are_one_process_with_the_whole_batch(
    modes: Modes, world: int, on_ranks: Callable[..., list[Any]], cell: Any
) -> None:
    found = on_ranks(train_all, list(modes), world=world)
    for name, (_, options) in modes.items():
        expected, _ = train(alone, 1, **options)
        reports, _ = found[0][name]
        assert [report.step for report in reports] == list(range(STEPS))
        for report, reference in zip(reports, expected, strict=True):
            check(cell, name, report, reference)
        for rank in range(1, world):
            assert found[rank][name][0] == [], "only rank 0 tells the sinks"
            assert found[rank][name][1] == found[0][name][1], "but all know the same"


def check(cell: Any, mode: str, report: gradwatch.Report, reference: gradwatch.Report) -> None:
    for quantity in ("gradient_norm_used", "gradient_norm", "update_norm"):
        cell.equal(mode, quantity, values(report, quantity), values(reference, quantity))
    if mode == WITHOUT_ACTIVATIONS:
        cell.unavailable(mode, "activation_norm", report, "tensor parallelism")
    else:
        mine, other = values(report, "activation_norm"), values(reference, "activation_norm")
        # The reference sees the last micro-batch only, and so does each rank.
        cell.equal(mode, "activation_norm", mine, other)
        assert list(mine) == list(other)
    cell.equal(mode, "loss", report.info.loss, reference.info.loss)
    cell.equal(mode, "batch_size", report.info.batch_size, reference.info.batch_size)
    cell.equal(mode, "lr", report.info.lr, reference.info.lr)
    if report.step == 0 and mode != WITHOUT_ACTIVATIONS:
        ranks, micro_batches = (4 if mode == "HSDP" else 2), 3 if "no_sync" in mode else 1
        expected = rms_of_parts(0, micro_batches, ranks)
        assert report.value("microbatch_gradient_norm") == pytest.approx(expected, rel=1e-5)
        assert report.value("microbatches") == ranks * micro_batches
    for quantity in ("clip_coefficient", "parameter_norm", "update_ratio", "unmoved_fraction"):
        assert values(report, quantity) == pytest.approx(values(reference, quantity), rel=1e-5)


def rms_of_parts(step: int, micro_batches: int, parts: int) -> float:
    """Of the gradients of each rank's part of each micro-batch, at the first parameters."""
    model = net()
    squares = []
    for batch in list(batches(micro_batches))[step]:
        for part in batch.chunk(parts):
            loss = model(part).square().mean() / micro_batches
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            squares.append(sum(float(item.double().square().sum()) for item in gradients))
    return math.sqrt(sum(squares) / len(squares))


def values(report: gradwatch.Report, metric: str) -> dict[str, float]:
    return {item.scope: item.value for item in report.measurements if item.metric == metric}

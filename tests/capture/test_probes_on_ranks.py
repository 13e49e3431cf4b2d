"""Several processes probe in the same steps, and what they find is told together."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import gradwatch
from gradwatch.capture.probe.view import ProbeView

OnRanks = Callable[..., list[Any]]
STEPS, BATCH = 24, 8


class Product(gradwatch.Monitor):
    """The product of the gradients of the two halves; keeps the samples in which it ran."""

    metrics = ("product",)
    probed = ("product",)

    def __init__(self) -> None:
        self.ran: list[int] = []
        self.found: list[float] = []
        self.samples = 0

    def probe(self, view: ProbeView) -> dict[str, Tensor]:
        self.ran.append(self.samples)
        if view.last.examples < 2:
            return {}
        halves = [
            torch.cat([item.flatten() for item in view.gradient(view.last, rows=rows).values()])
            for rows in (slice(BATCH // 2), slice(BATCH // 2, BATCH))
        ]
        self.found.append(float(halves[0] @ halves[1]))
        return {"product": halves[0] @ halves[1]}

    def read(self, view: gradwatch.StepView) -> Iterator[gradwatch.Reading]:
        self.samples += 1
        if "product" in view.probed:
            yield gradwatch.Reading("product", view.probed["product"])


class Slow(Product):
    """Takes long on one of the ranks."""

    def probe(self, view: ProbeView) -> dict[str, Tensor]:
        time.sleep(0.02 * dist.get_rank())
        return super().probe(view)


class Breaks(Product):
    def probe(self, view: ProbeView) -> dict[str, Tensor]:
        if dist.get_rank() == 1 and len(self.ran) == 2:
            raise OSError("on one rank")
        return super().probe(view)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 4))


def ddp() -> nn.Module:
    return DistributedDataParallel(net())


def fsdp() -> nn.Module:
    model = net()
    fully_shard(model[0])
    fully_shard(model)
    return model


def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
    loss: Tensor = model(batch).square().mean()
    return loss


def batch_of(step: int, rank: int, size: int = BATCH) -> Tensor:
    return torch.randn(size, 6, generator=torch.Generator().manual_seed(100 * rank + step))


def train(
    model: nn.Module,
    *,
    watched: bool = True,
    steps: int = STEPS,
    size: Callable[[int], int] = lambda step: BATCH,
    **options: Any,
) -> dict[str, Any]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    told = gradwatch.MemorySink()
    settings: dict[str, Any] = {
        "every_n_steps": 1,
        "log_every_n_steps": 1,
        "budget": None,
        "loss_fn": loss_fn,
        "sinks": [told],
    } | options
    watch = gradwatch.watch(model, optimizer, **settings) if watched else None
    torch.manual_seed(7 + dist.get_rank())
    losses, clocks = [], []
    for step in range(steps):
        loss = loss_fn(model, batch_of(step, dist.get_rank(), size(step)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if watch is not None:
            probes = watch._session.probes
            clocks.append(None if probes is None else probes.schedule._clock)
    outcome: dict[str, Any] = {
        "losses": losses,
        "weights": [full(item) for item in model.parameters()],
        "momentum": [full(state["momentum_buffer"]) for state in optimizer.state.values()],
        "random": torch.get_rng_state(),
    }
    if watch is None:
        return outcome
    watch.close()
    summary = watch.summary()
    mine = next((item for item in settings["monitors"] if isinstance(item, Product)), Product())
    return outcome | {
        "failures": dict(watch.failures),
        "notes": summary.notes,
        "probes": str(summary.probes),
        "summary": repr(summary.measurements),  # in which NaN equals NaN
        "reports": list(told.reports),
        "clocks": clocks,
        "ran": mine.ran,
        "found": mine.found,
    }


def full(tensor: Tensor) -> Tensor:
    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.detach().clone()


def points(found: dict[str, Any], metric: str) -> dict[int, float]:
    return {
        item.step: item.value
        for report in found["reports"]
        for item in report.measurements
        if item.metric == metric
    }


# --- What the ranks do -------------------------------------------------------------------------


def different_clocks() -> dict[str, Any]:
    monitors = [Slow(), *gradwatch.presets.noise()]
    options: dict[str, Any] = {"every_n_steps": 2, "log_every_n_steps": 4, "budget": 0.5}
    return train(ddp(), steps=80, monitors=monitors, **options)


def a_batch_without_halves() -> dict[str, Any]:
    """On one rank, now and then."""

    def size(step: int) -> int:
        return 1 if dist.get_rank() == 1 and step % 3 == 2 else BATCH

    options: dict[str, Any] = {"log_every_n_steps": 2, "budget": 0.5}
    return train(ddp(), steps=60, monitors=[Product()], size=size, **options)


def breaks_on_one() -> dict[str, Any]:
    options: dict[str, Any] = {"log_every_n_steps": 4, "track_clipping": True}
    return train(ddp(), monitors=[Breaks(), *gradwatch.presets.noise()], **options)


def means() -> dict[str, Any]:
    return train(ddp(), steps=3, monitors=[Product()])


def sharded() -> dict[str, Any]:
    return train(fsdp(), monitors=gradwatch.presets.noise(), track_clipping=True)


def everything(build: Callable[[], nn.Module], *, watched: bool) -> dict[str, Any]:
    monitors = gradwatch.presets.full()
    found = train(build(), watched=watched, monitors=monitors, on_error="raise")
    return {name: found[name] for name in ("losses", "weights", "momentum", "random")} | {
        "curvature": watched and len(points(found, "noise_curvature"))
    }


def all_of_them() -> dict[str, Any]:
    return {
        "clocks": different_clocks(),
        "no halves": a_batch_without_halves(),
        "breaks": breaks_on_one(),
        "means": means(),
        "sharded": sharded(),
        "ddp": [everything(ddp, watched=False), everything(ddp, watched=True)],
        "fsdp": [everything(fsdp, watched=False), everything(fsdp, watched=True)],
    }


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return {}


@pytest.fixture
def ranks(found: dict[str, Any], on_ranks: OnRanks) -> dict[str, list[Any]]:
    if not found:
        first, second = on_ranks(all_of_them, timeout=240)
        found.update({name: [first[name], second[name]] for name in first})
    return found


# --- What is expected --------------------------------------------------------------------------


def test_under_a_budget_all_ranks_probe_in_the_same_steps(ranks: dict[str, Any]) -> None:
    first, second = ranks["clocks"]
    assert first["failures"] == second["failures"] == {}
    assert first["clocks"] == second["clocks"]
    ran = [found["ran"] for found in (first, second)]
    assert ran[0] == ran[1]
    assert 0 < len(ran[0]) < 40, "neither none of the sampled steps nor all of them"
    assert first["summary"] == second["summary"]
    assert first["probes"] == second["probes"]
    assert "budget 50 %" in first["probes"]
    assert "Slow about step" in first["probes"]


def test_what_one_rank_cannot_do_changes_no_schedule(ranks: dict[str, Any]) -> None:
    first, second = ranks["no halves"]
    assert first["failures"] == second["failures"] == {}
    ran = [found["ran"] for found in (first, second)]
    assert ran[0] == ran[1]
    assert first["summary"] == second["summary"]
    told = points(first, "product")
    assert told
    assert not [step for step in told if step % 3 == 2], "half of it is not told"
    assert any("product: only some of the ranks" in note for note in first["notes"])


def test_values_are_means_over_the_ranks(ranks: dict[str, Any]) -> None:
    first, second = ranks["means"]
    mine, other = (item["found"] for item in (first, second))
    expected = {step: (mine[step] + other[step]) / 2 for step in range(3)}
    assert mine[0] != other[0]
    assert points(first, "product") == pytest.approx(expected, rel=1e-5)


def test_a_probe_that_breaks_on_one_rank_is_off_on_all(ranks: dict[str, Any]) -> None:
    first, second = ranks["breaks"]
    part = "probe of monitor Breaks"
    assert second["failures"] == {part: "OSError: on one rank"}
    assert first["failures"] == {part: "it failed on another rank"}
    # The other one hears of it at the next report.
    assert first["ran"] == [0, 1, 2, 3, 4]
    assert second["ran"] == [0, 1]
    assert len(points(first, "smoothness_secant")) == STEPS
    assert first["summary"] == second["summary"]


def test_the_ranks_give_the_noise_so_halves_are_not_needed(ranks: dict[str, Any]) -> None:
    for name in ("breaks", "sharded"):
        sources = {
            item.source
            for report in ranks[name][0]["reports"]
            for item in report.measurements
            if item.metric == "gradient_variance"
        }
        assert sources == {"2 ranks"}
        assert len(points(ranks[name][0], "gradient_square")) == STEPS


def test_sharded_parameters_cannot_be_probed_and_it_is_said(ranks: dict[str, Any]) -> None:
    for found in ranks["sharded"]:
        assert found["failures"] == {}
        assert any(
            note.startswith("smoothness_secant") and "sharded parameters" in note
            for note in found["notes"]
        )
    assert not points(ranks["sharded"][0], "smoothness_secant")


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_a_probed_training_is_bit_identical(
    name: str, ranks: dict[str, Any], assert_identical: Callable[[Any, Any], None]
) -> None:
    for rank, (bare, watched) in enumerate(ranks[name]):
        probed = watched.pop("curvature")
        assert probed == (STEPS if name == "ddp" and rank == 0 else 0)
        assert bare.pop("curvature") is False
        assert_identical(bare, watched)

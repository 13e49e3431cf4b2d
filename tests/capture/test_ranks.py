"""Several processes never wait for one another in vain, and never train differently."""

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

import gradwatch
from gradwatch.capture import session as session_module
from gradwatch.capture.ranks import rendezvous

OnRanks = Callable[..., list[Any]]
STEPS = 6


class ExplosionError(Exception):
    pass


class FailsOnOne(gradwatch.Monitor):
    metrics = ("fragile",)

    def read(self, view: gradwatch.StepView) -> gradwatch.Reading:
        if dist.get_rank() == 1 and view.step == 2:
            raise ExplosionError
        return gradwatch.Reading("fragile", torch.tensor(1.0))


class AlwaysAdvises(gradwatch.Rule):
    def advise(self, history: gradwatch.History) -> list[gradwatch.Recommendation]:
        if len(history) < 2:
            return []
        return [
            gradwatch.Recommendation(
                knob="learning_rate", scope="model", severity="warning", reason="a test"
            )
        ]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4))


def ddp() -> nn.Module:
    return DistributedDataParallel(net())


def fsdp() -> nn.Module:
    model = net()
    fully_shard(model[0])
    fully_shard(model)
    return model


def watched(
    model: nn.Module, **options: Any
) -> tuple[gradwatch.Watch, torch.optim.Optimizer, gradwatch.MemorySink]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    told = gradwatch.MemorySink()
    settings: dict[str, Any] = {
        "every_n_steps": 1,
        "log_every_n_steps": 1,
        "sinks": [told],
    } | options
    return gradwatch.watch(model, optimizer, **settings), optimizer, told


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(10 * dist.get_rank() + seed)
    model(torch.randn(8, 6, generator=generator)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def outcome(watch: gradwatch.Watch, told: gradwatch.MemorySink) -> dict[str, Any]:
    watch.close()
    return {
        "failures": dict(watch.failures),
        "reported": [report.step for report in told.reports],
        "notes": watch.summary().notes,
        "fragile": [report.value("fragile") for report in told.reports],
        "batch_size": watch.summary().info.batch_size,
        "norm": watch.summary().value("gradient_norm_used"),
    }


# --- What goes wrong on one rank ---------------------------------------------------------------


def monitor_fails_on_one() -> dict[str, Any]:
    model = ddp()
    watch, optimizer, told = watched(model, monitors=[*gradwatch.presets.standard(), FailsOnOne()])
    for _ in range(STEPS):
        step(model, optimizer)
    return outcome(watch, told)


def capture_fails_on_one() -> dict[str, Any]:
    model = fsdp()
    watch, optimizer, told = watched(model, log_every_n_steps=2)
    original = vars(session_module)["collect"]

    def explode(session: Any) -> Any:
        if dist.get_rank() == 1 and session.step == 2:
            raise ExplosionError
        return original(session)

    vars(session_module)["collect"] = explode
    for _ in range(STEPS):
        step(model, optimizer)
    vars(session_module)["collect"] = original
    return outcome(watch, told)


def summary_on_one_only() -> dict[str, Any]:
    model = ddp()
    watch, optimizer, told = watched(model, log_every_n_steps=4)
    for _ in range(STEPS):
        step(model, optimizer)
        if dist.get_rank() == 0:
            watch.summary()
    return outcome(watch, told)


def one_leaves_early() -> dict[str, Any]:
    model = ddp()
    watch, optimizer, told = watched(model)
    for place in range(STEPS):
        if place == 3 and dist.get_rank() == 1:
            watch.close()
        step(model, optimizer)
    return outcome(watch, told)


def one_alone(build: Callable[[], nn.Module]) -> dict[str, Any]:
    rendezvous.PATIENCE = 1.0  # type: ignore[misc]
    model = build()
    told = gradwatch.MemorySink()
    optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch = None
    if dist.get_rank() == 0:
        watch, optimizer, told = watched(model)
    for _ in range(STEPS):
        step(model, optimizer)
    return {} if watch is None else outcome(watch, told)


def out_of_data() -> dict[str, Any]:
    model = ddp()
    watch, optimizer, told = watched(model)
    with model.join():  # type: ignore[operator]
        for _ in range(STEPS - dist.get_rank()):
            step(model, optimizer)
    return outcome(watch, told)


def odd_loss() -> dict[str, Any]:
    """A loss of another shape, on one rank alone."""
    model = ddp()
    watch, optimizer, told = watched(model)
    for _ in range(STEPS):
        if dist.get_rank() == 0:
            watch.observe(loss=torch.ones(1, 1))
        step(model, optimizer)
    return outcome(watch, told)


def differing_monitors() -> dict[str, Any]:
    model = ddp()
    both = (gradwatch.presets.full(), gradwatch.presets.essentials())
    watch, optimizer, told = watched(model, monitors=both[dist.get_rank()])
    for _ in range(STEPS):
        step(model, optimizer)
    return outcome(watch, told)


def state_on_one_only() -> dict[str, Any]:
    model = ddp()
    watch, optimizer, _ = watched(model)
    for _ in range(2):
        step(model, optimizer)
    state = watch.state_dict()
    watch.close()
    watch, optimizer, told = watched(model, every_n_steps=3, log_every_n_steps=3)
    if dist.get_rank() == 0:
        watch.load_state_dict(state)
    for _ in range(STEPS):
        step(model, optimizer)
    return outcome(watch, told)


def closed_before_the_first_step() -> dict[str, Any]:
    model = ddp()
    watch, optimizer, told = watched(model)
    if dist.get_rank() == 1:
        watch.close()
    for _ in range(STEPS):
        step(model, optimizer)
    return outcome(watch, told)


def closed_between_backward_and_step() -> dict[str, Any]:
    model = ddp()
    watch, optimizer, told = watched(model)
    for place in range(STEPS):
        model(torch.ones(8, 6)).square().mean().backward()
        if place == 3 and dist.get_rank() == 1:
            time.sleep(0.5)  # the other one waits already
            watch.close()
        optimizer.step()
        optimizer.zero_grad()
    return outcome(watch, told)


def checkpoint_on_one_rank() -> dict[str, Any]:
    """The usual checkpoint, and advice that acts on the training."""
    model = ddp()
    acted = []

    def act(item: gradwatch.Recommendation) -> None:
        acted.append(watch.step)
        for group in optimizer.param_groups:
            group["lr"] = 0.01

    watch, optimizer, told = watched(
        model, log_every_n_steps=4, rules=[AlwaysAdvises()], on_recommendation=act
    )
    for _ in range(STEPS):
        step(model, optimizer)
        if dist.get_rank() == 0:
            watch.state_dict()
    weights = [float(item.double().sum()) for item in model.parameters()]
    return outcome(watch, told) | {"acted": acted, "weights": weights}


def observed_on_one_only() -> dict[str, Any]:
    model = fsdp()
    watch, optimizer, told = watched(model)
    for _ in range(STEPS):
        model(torch.ones(8, 6)).square().mean().backward()
        if dist.get_rank() == 0:
            watch.observe(loss=1.0)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        optimizer.step()
        optimizer.zero_grad()
    raw = [report.value("gradient_norm") for report in told.reports]
    clipped = [report.info.grads_clipped for report in told.reports]
    return outcome(watch, told) | {"raw": raw, "clipped": clipped}


def flat_shards() -> dict[str, Any]:
    model = FullyShardedDataParallel(net(), device_id=torch.device("cpu"), use_orig_params=True)
    watch, optimizer, told = watched(model)
    for _ in range(2):
        step(model, optimizer)
    return outcome(watch, told)


def layer_unfrozen_later() -> dict[str, Any]:
    inner = net()
    first, last = inner[0], inner[2]
    first.requires_grad_(False)
    model = DistributedDataParallel(inner)
    optimizer = torch.optim.SGD(last.parameters(), lr=0.1)
    told = gradwatch.MemorySink()
    watch = gradwatch.watch(model, optimizer, every_n_steps=1, log_every_n_steps=1, sinks=[told])
    for place in range(STEPS):
        if place == 3:
            first.requires_grad_(True)
            optimizer.add_param_group({"params": list(first.parameters())})
        step(model, optimizer)
    return outcome(watch, told)


def each_its_own_model() -> dict[str, Any]:
    model = net()
    watch, optimizer, told = watched(model)
    for _ in range(STEPS + dist.get_rank()):
        step(model, optimizer)
    return outcome(watch, told)


def troubles() -> dict[str, dict[str, Any]]:
    return {
        "monitor": monitor_fails_on_one(),
        "capture": capture_fails_on_one(),
        "summary": summary_on_one_only(),
        "leaves": one_leaves_early(),
        "join": out_of_data(),
        "own": each_its_own_model(),
        "odd loss": odd_loss(),
        "monitors": differing_monitors(),
        "state": state_on_one_only(),
        "closed first": closed_before_the_first_step(),
        "closed between": closed_between_backward_and_step(),
        "checkpoint": checkpoint_on_one_rank(),
        "observed": observed_on_one_only(),
        "unfrozen": layer_unfrozen_later(),
        "flat": flat_shards(),
        # Last, as from now on the ranks have not made the same watches any more.
        "alone": one_alone(ddp),
        "alone, sharded": one_alone(fsdp),
    }


@pytest.fixture(scope="module")
def found() -> dict[str, list[dict[str, Any]]]:
    return {}


@pytest.fixture
def trouble(found: dict[str, list[Any]], on_ranks: OnRanks) -> dict[str, list[dict[str, Any]]]:
    if not found:
        first, second = on_ranks(troubles, timeout=240)
        found.update({name: [first[name], second[name]] for name in first})
    return found


Trouble = dict[str, list[dict[str, Any]]]
EVERY = list(range(STEPS))


def test_a_monitor_that_fails_on_one_rank_is_off_on_all(trouble: Trouble) -> None:
    speaking, failing = trouble["monitor"]
    assert failing["failures"] == {"monitor FailsOnOne": "ExplosionError: "}
    assert speaking["failures"] == {"monitor FailsOnOne": "it failed on another rank"}
    assert speaking["reported"] == EVERY
    assert speaking["fragile"] == [1.0, 1.0, 1.0, 1.0, None, None]  # told with the next step


def test_a_capture_that_fails_on_one_rank_is_off_on_all(trouble: Trouble) -> None:
    speaking, failing = trouble["capture"]
    assert failing["failures"] == {"capture": "ExplosionError: "}
    assert speaking["failures"] == {"capture": "it failed on another rank"}
    assert speaking["reported"] == [0, 1], "what was not whole is not reported"
    assert speaking["norm"] == failing["norm"]


def test_a_summary_on_one_rank_waits_for_nobody(trouble: Trouble) -> None:
    speaking, other = trouble["summary"]
    assert speaking["reported"] == [0, 4, 5], "reports are made at the same steps on all ranks"
    assert speaking["failures"] == other["failures"] == {}
    assert speaking["norm"] == other["norm"]
    assert speaking["batch_size"] == 16


def test_a_rank_that_closes_its_watch_is_not_waited_for(trouble: Trouble) -> None:
    speaking, _ = trouble["leaves"]
    assert speaking["reported"] == EVERY
    assert speaking["batch_size"] == 8
    assert any("another rank was closed" in note for note in speaking["notes"])


def test_a_watch_on_one_rank_only_says_whose_values_it_tells(trouble: Trouble) -> None:
    alone, _ = trouble["alone"]
    assert alone["reported"] == EVERY
    assert alone["batch_size"] == 8
    assert any("rank 0 alone: it is not watched on every rank" in note for note in alone["notes"])


def test_half_of_a_sharded_gradient_is_not_told(trouble: Trouble) -> None:
    alone, _ = trouble["alone, sharded"]
    assert alone["reported"] == []
    assert "watch the model on every rank" in alone["failures"]["capture"]


def test_ranks_that_run_out_of_data_are_not_waited_for(trouble: Trouble) -> None:
    longer, shorter = trouble["join"]
    assert longer["reported"] == EVERY
    assert longer["failures"] == shorter["failures"] == {}
    assert any("join()" in note for note in longer["notes"])


def test_ranks_that_train_models_of_their_own_have_nothing_to_do_with_each_other(
    trouble: Trouble,
) -> None:
    for rank, told in enumerate(trouble["own"]):
        assert told["reported"] == list(range(STEPS + rank))
        assert told["batch_size"] == 8
        assert told["failures"] == {}
    assert trouble["own"][0]["norm"] != trouble["own"][1]["norm"]


def test_a_loss_of_another_shape_is_a_loss(trouble: Trouble) -> None:
    speaking, other = trouble["odd loss"]
    assert speaking["reported"] == EVERY
    assert speaking["failures"] == other["failures"] == {}


@pytest.mark.parametrize("name", ["monitors", "state"])
def test_watches_that_differ_do_not_wait_for_each_other(trouble: Trouble, name: str) -> None:
    speaking, _ = trouble[name]
    assert speaking["batch_size"] == 8
    assert any("its watches differ between the ranks" in note for note in speaking["notes"])


@pytest.mark.parametrize("name", ["closed first", "closed between"])
def test_a_rank_may_close_at_any_moment(trouble: Trouble, name: str) -> None:
    speaking, leaving = trouble[name]
    assert speaking["failures"] == leaving["failures"] == {}
    missing = {3} if name == "closed between" else set()
    assert speaking["reported"] == [place for place in EVERY if place not in missing]
    assert any("another rank was closed" in note for note in speaking["notes"])


def test_advice_acts_on_all_ranks_at_the_same_step(trouble: Trouble) -> None:
    speaking, other = trouble["checkpoint"]
    assert speaking["acted"] == other["acted"] != []
    assert speaking["weights"] == other["weights"]


def test_what_some_ranks_know_of_a_sharded_gradient_is_not_told(trouble: Trouble) -> None:
    speaking, _ = trouble["observed"]
    assert speaking["raw"] == speaking["clipped"] == [None] * STEPS
    assert any("only some of the ranks" in note for note in speaking["notes"])
    assert speaking["norm"] == pytest.approx(1e-3, rel=1e-2)


def test_flat_shards_are_refused(trouble: Trouble) -> None:
    for told in trouble["flat"]:
        assert told["reported"] == []
        assert "use fully_shard" in told["failures"]["capture"]


def test_a_layer_that_is_trained_later_is_measured(trouble: Trouble) -> None:
    speaking, other = trouble["unfrozen"]
    assert speaking["failures"] == other["failures"] == {}
    assert speaking["reported"] == EVERY
    assert speaking["batch_size"] == 16


# --- The training ------------------------------------------------------------------------------


def train(build: Callable[[], nn.Module], watch_it: bool) -> dict[str, Any]:
    model = build()
    optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    calls = 0
    original = dist.all_reduce

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        return original(*arguments, **options)

    dist.all_reduce = counted
    watch = None
    if watch_it:
        watch, optimizer, _ = watched(model, every_n_steps=2, log_every_n_steps=4)
    for seed in range(STEPS):
        step(model, optimizer, seed)
    if watch is not None:
        watch.close()
    dist.all_reduce = original
    return {
        "weights": {name: full(item) for name, item in model.named_parameters()},
        "momentum": [full(state["momentum_buffer"]) for state in optimizer.state.values()],
        "random": torch.get_rng_state(),
        "calls": calls,
    }


def full(tensor: torch.Tensor) -> torch.Tensor:
    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.detach().clone()


def both() -> dict[str, list[dict[str, Any]]]:
    return {build.__name__: [train(build, False), train(build, True)] for build in (ddp, fsdp)}


def test_the_training_is_bit_identical_and_the_ranks_talk_once_a_sampled_step(
    on_ranks: OnRanks, assert_identical: Callable[[Any, Any], None]
) -> None:
    for found in on_ranks(both):
        for bare, observed in found.values():
            extra = observed.pop("calls") - bare.pop("calls")
            assert extra == STEPS // 2
            assert_identical(bare, observed)


def raise_on_one() -> str:
    model = ddp()
    watch, optimizer, _ = watched(model, log_every_n_steps=4)
    try:
        with watch:
            for place in range(STEPS):
                if place == 2 and dist.get_rank() == 1:
                    raise ExplosionError
                if place == 2:
                    return "waiting for the other would be the loop's own fault"
                step(model, optimizer)
    except ExplosionError:
        return "raised"
    return "never"


def test_an_error_on_one_rank_ends_its_watch_without_the_others(on_ranks: OnRanks) -> None:
    assert on_ranks(raise_on_one)[1] == "raised"


def test_distributed_without_processes_is_refused() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(gradwatch.ConfigError, match="init_process_group"):
        gradwatch.watch(model, optimizer, distributed=True)

"""The gradient norm of each micro-batch against `autograd.grad` of that micro-batch alone."""

import copy
import gc
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import gradwatch
from gradwatch.capture.hooks import HookHandles
from gradwatch.capture.part import MICROBATCHES
from gradwatch.capture.step.microbatch import MicrobatchCapture, MicrobatchNorms
from gradwatch.isolation import Isolation
from gradwatch.monitors import MicrobatchGradientNorm


class Watched:
    """A model whose training forwards are told to a capture, as the session's gate tells them."""

    def __init__(self, model: nn.Module, inner: nn.Module | None = None, **options: Any) -> None:
        self.model: Any = inner or model
        self.isolation = Isolation("raise")
        self.capture = MicrobatchCapture(model, self.parameters, self.isolation, **options)
        self.handles = HookHandles()
        self.handles.add(
            self.model.register_forward_pre_hook(lambda *_: self.capture.begin_microbatch())
        )

    def parameters(self) -> dict[str, Tensor]:
        return dict(self.model.named_parameters())

    def hooks(self) -> int:
        return sum(
            len(getattr(item, kind) or {})
            for item in self.model.parameters()
            for kind in ("_backward_hooks", "_post_accumulate_grad_hooks")
        )


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def batches(count: int, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(5, 6, generator=generator) for _ in range(count)]


def loss_of(model: Callable[..., Any], batch: Tensor) -> Tensor:
    return cast(Tensor, model(batch).square().mean())


def expected(model: nn.Module, data: Sequence[Tensor], factor: float = 1.0) -> Tensor:
    """The squares by autograd alone, on a copy that no hook is on."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        module._forward_pre_hooks.clear()
    squares = []
    for batch in data:
        gradients = torch.autograd.grad(factor * loss_of(twin, batch), list(twin.parameters()))
        squares.append(sum(item.double().square().sum() for item in gradients))
    return torch.stack(cast(list[Tensor], squares)).float()


def assert_squares(norms: MicrobatchNorms, truth: Tensor, rtol: float = 1e-5) -> None:
    assert norms.unavailable is None
    torch.testing.assert_close(norms.squares, truth, rtol=rtol, atol=0)


@pytest.fixture
def watched() -> Iterator[Watched]:
    made = Watched(mlp())
    yield made
    made.capture.remove()


def accumulate(watched: Watched, data: Sequence[Tensor]) -> None:
    for batch in data:
        loss_of(watched.model, batch).backward()


# --- What is measured --------------------------------------------------------------------------


def test_one_batch_is_the_gradient_itself(watched: Watched) -> None:
    data = batches(1)
    watched.capture.begin_step()
    accumulate(watched, data)
    norms = watched.capture.take()
    assert_squares(norms, expected(watched.model, data))
    whole = sum(
        item.grad.square().sum() for item in watched.model.parameters() if item.grad is not None
    )
    torch.testing.assert_close(norms.squares.sum(), whole)


def test_each_accumulated_microbatch_has_its_own(watched: Watched) -> None:
    data = batches(4)
    watched.capture.begin_step()
    accumulate(watched, data)
    norms = watched.capture.take()
    assert_squares(norms, expected(watched.model, data))
    assert norms.forwards == (1, 1, 1, 1)


def test_steps_do_not_mix(watched: Watched) -> None:
    data = batches(5)
    watched.capture.begin_step()
    accumulate(watched, data[:3])
    watched.capture.take()
    watched.model.zero_grad()
    accumulate(watched, data[:1])
    watched.model.zero_grad()
    watched.capture.begin_step()
    accumulate(watched, data[3:])
    assert_squares(watched.capture.take(), expected(watched.model, data[3:]))


def test_several_forwards_before_one_backward_are_one_microbatch(watched: Watched) -> None:
    one, other = batches(2)
    watched.capture.begin_step()
    (loss_of(watched.model, one) + loss_of(watched.model, other)).backward()
    norms = watched.capture.take()
    both = torch.cat([one, other])
    assert_squares(norms, expected(watched.model, [both], factor=2.0))
    assert norms.forwards == (2,)


def test_a_forward_that_raises_is_not_counted(watched: Watched) -> None:
    data = batches(1)
    watched.capture.begin_step()
    with pytest.raises(RuntimeError, match="shapes"):
        watched.model(torch.zeros(2, 5))
    watched.capture.abandon_microbatch()
    accumulate(watched, data)
    assert watched.capture.take().forwards == (1,)


def test_a_scaled_loss_gives_the_scaled_gradient(watched: Watched) -> None:
    data = batches(2)
    watched.capture.begin_step()
    for batch in data:
        (1024 * loss_of(watched.model, batch)).backward()
    assert_squares(watched.capture.take(), expected(watched.model, data, factor=1024))


def test_users_hooks_come_first(watched: Watched) -> None:
    data = batches(1)
    truth = expected(watched.model, data)
    for parameter in watched.model.parameters():
        parameter.register_hook(lambda gradient: 3 * gradient)
    watched.capture.begin_step()
    accumulate(watched, data)
    assert_squares(watched.capture.take(), 9 * truth)


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.complex64])
def test_types(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Linear(6, 8).to(dtype)
    data = [batch.to(dtype) for batch in batches(2)]
    truth = []
    for batch in data:
        gradients = torch.autograd.grad(model(batch).abs().sum(), list(model.parameters()))
        truth.append(sum(item.abs().double().square().sum() for item in gradients))
    watched = Watched(model)
    watched.capture.begin_step()
    for batch in data:
        model(batch).abs().sum().backward()
    norms = watched.capture.take()
    assert norms.squares.dtype == torch.float32
    assert_squares(norms, torch.stack(cast(list[Tensor], truth)).float())


def test_half_precision_beyond_its_range() -> None:
    model = nn.Linear(4, 1, bias=False, dtype=torch.float16)
    watched = Watched(model)
    watched.capture.begin_step()
    (model(torch.full((1, 4), 256.0, dtype=torch.float16)) * 128).sum().backward()
    assert_squares(watched.capture.take(), torch.tensor([4 * 32_768.0**2]))


def test_sparse_rows_that_repeat() -> None:
    torch.manual_seed(0)
    model = nn.Embedding(10, 3, sparse=True)
    watched = Watched(model)
    data = [torch.tensor([1, 1, 4]), torch.tensor([2, 4, 4, 4])]
    dense = nn.Embedding.from_pretrained(model.weight.detach().clone(), freeze=False)
    truth = []
    for batch in data:
        (gradient,) = torch.autograd.grad(dense(batch).pow(3).sum(), [dense.weight])
        truth.append(gradient.square().sum())
    watched.capture.begin_step()
    for batch in data:
        model(batch).pow(3).sum().backward()
    assert_squares(watched.capture.take(), torch.stack(truth))


def test_a_tied_parameter_counts_once_and_summed() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    watched = Watched(model)
    data = batches(2)
    watched.capture.begin_step()
    accumulate(watched, data)
    assert_squares(watched.capture.take(), expected(model, data))


def test_frozen_and_unused_parameters_add_nothing() -> None:
    model = mlp()
    truth = expected(model, batches(2))
    model.register_parameter("frozen", nn.Parameter(torch.ones(2), requires_grad=False))
    model.register_parameter("unused", nn.Parameter(torch.ones(2)))
    watched = Watched(model)
    watched.capture.begin_step()
    accumulate(watched, batches(2))
    assert_squares(watched.capture.take(), truth)


def test_disjoint_losses_of_one_forward_add_up() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"one": nn.Linear(6, 2), "other": nn.Linear(6, 2)})
    watched = Watched(model)
    (batch,) = batches(1)
    watched.capture.begin_step()
    watched.capture.begin_microbatch()
    loss_of(model["one"], batch).backward()
    loss_of(model["other"], batch).backward()
    truth = expected(model["one"], [batch]) + expected(model["other"], [batch])
    assert_squares(watched.capture.take(), truth)


def test_one_backward_needs_no_forward_to_be_seen() -> None:
    model = mlp()
    capture = MicrobatchCapture(
        model, lambda: dict(model.named_parameters()), Isolation("raise"), sees_forwards=False
    )
    data = batches(2)
    capture.begin_step()
    loss_of(model, data[0]).backward()
    assert_squares(capture.take(), expected(model, data[:1]))
    model.zero_grad()
    capture.begin_step()
    for batch in data:
        loss_of(model, batch).backward()
    assert "several parts" in str(capture.take().unavailable)


# --- What must not count -----------------------------------------------------------------------


def test_gradients_that_the_user_asks_for_do_not_count(watched: Watched) -> None:
    model, data = watched.model, batches(2)
    watched.capture.begin_step()
    for batch in data:
        loss = loss_of(model, batch)
        torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        loss.backward(retain_graph=True)
        torch.autograd.grad(loss, list(model.parameters()))
    assert_squares(watched.capture.take(), expected(model, data))


def test_a_gradient_penalty_is_part_of_the_loss(watched: Watched) -> None:
    def penalised(model: nn.Module, batch: Tensor) -> Tensor:
        batch = batch.clone().requires_grad_()
        loss = loss_of(model, batch)
        (slope,) = torch.autograd.grad(loss, batch, create_graph=True)
        return loss + slope.square().sum()

    model, data = watched.model, batches(2)
    truth = []
    for batch in data:
        gradients = torch.autograd.grad(penalised(model, batch), list(model.parameters()))
        truth.append(sum(item.square().sum() for item in gradients))
    watched.capture.begin_step()
    for batch in data:
        penalised(model, batch).backward()
    assert_squares(watched.capture.take(), torch.stack(cast(list[Tensor], truth)))


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_a_backward_that_keeps_its_graph(watched: Watched) -> None:
    data = batches(2)
    watched.capture.begin_step()
    for batch in data:
        loss_of(watched.model, batch).backward(create_graph=True)
    norms = watched.capture.take()
    assert not norms.squares.requires_grad
    assert_squares(norms, expected(watched.model, data))


def test_what_was_reset_before_the_step_does_not_count(watched: Watched) -> None:
    data = batches(4)
    watched.capture.begin_step()
    accumulate(watched, data[:2])
    watched.model.zero_grad()  # as SAM and the closures of LBFGS do
    accumulate(watched, data[2:])
    norms = watched.capture.take()
    assert_squares(norms, expected(watched.model, data[2:]))
    assert norms.forwards == (1, 1)


def test_a_step_that_is_taken_again_begins_anew(watched: Watched) -> None:
    data = batches(3)
    watched.capture.begin_step()
    accumulate(watched, data[:1])
    watched.capture.begin_step()
    watched.model.zero_grad()
    accumulate(watched, data[1:])
    assert_squares(watched.capture.take(), expected(watched.model, data[1:]))


# --- What is said instead of a wrong number ----------------------------------------------------


def reason(watched: Watched) -> str:
    norms = watched.capture.take()
    assert norms.squares.numel() == 0
    return str(norms.unavailable)


def test_two_losses_of_one_forward(watched: Watched) -> None:
    watched.capture.begin_step()
    output = watched.model(batches(1)[0])
    output.sum().backward(retain_graph=True)
    output.square().sum().backward()
    assert "several parts" in reason(watched)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_of_a_shared_module(reentrant: bool) -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, batch: Tensor) -> Tensor:
            for _ in range(2):
                batch = checkpoint(self.layer, batch, use_reentrant=reentrant)
            return batch

    torch.manual_seed(0)
    watched = Watched(Shared())
    (batch,) = batches(1)
    watched.capture.begin_step()
    loss_of(watched.model, batch.clone().requires_grad_()).backward()
    if reentrant:
        assert "several parts" in reason(watched)
    else:
        norms = watched.capture.take()
        watched.capture.remove()
        assert_squares(norms, expected(watched.model, [batch]))


def test_a_gradient_that_is_zeroed_in_place(watched: Watched) -> None:
    watched.capture.begin_step()
    accumulate(watched, batches(1))
    watched.model.zero_grad(set_to_none=False)
    accumulate(watched, batches(1))
    assert "changed in place" in reason(watched)


def test_a_gradient_that_is_partly_reset(watched: Watched) -> None:
    watched.capture.begin_step()
    accumulate(watched, batches(1))
    next(watched.model.parameters()).grad = None
    accumulate(watched, batches(1))
    assert "others not" in reason(watched)


def test_a_gradient_that_was_put_there_by_hand(watched: Watched) -> None:
    watched.capture.begin_step()
    watched.model[0].requires_grad_(False)
    accumulate(watched, batches(1))
    watched.model[0].weight.grad = torch.ones_like(watched.model[0].weight)
    assert "0.weight came without a backward()" in reason(watched)


def test_optimizers_that_take_turns(watched: Watched) -> None:
    watched.capture.begin_step()
    accumulate(watched, batches(1))
    watched.capture.optimizer_stepped()
    accumulate(watched, batches(1))
    assert "one after another" in reason(watched)


def test_a_step_inside_the_backward(watched: Watched) -> None:
    taken = []
    last = next(watched.model.parameters())
    last.register_post_accumulate_grad_hook(lambda _: taken.append(watched.capture.take()))
    watched.capture.begin_step()
    accumulate(watched, batches(1))
    assert "inside backward()" in str(taken[0].unavailable)


def test_no_backward(watched: Watched) -> None:
    watched.capture.begin_step()
    watched.model(batches(1)[0])
    assert "no backward()" in reason(watched)


def test_a_step_without_end_does_not_grow(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradwatch.capture.step.microbatch.record.MOST", 3)
    watched.capture.begin_step()
    accumulate(watched, batches(5))
    assert "more than" in reason(watched)


def test_a_failure_does_not_reach_the_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(tensor: Tensor) -> Tensor:
        raise ArithmeticError("broken on purpose")

    monkeypatch.setattr("gradwatch.capture.step.microbatch.leaf.norm", broken)
    watched = Watched(mlp())
    watched.isolation.on_error = "disable"
    watched.capture.begin_step()
    accumulate(watched, batches(2))
    assert "failed" in reason(watched)
    assert "broken on purpose" in watched.isolation.failures[MICROBATCHES]
    watched.capture.begin_step()
    accumulate(watched, batches(1))
    assert watched.hooks() == 0


class HostReads(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "_local_scalar_dense" in str(func):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def test_nothing_is_read_on_the_host(watched: Watched) -> None:
    with HostReads() as reads:
        watched.capture.begin_step()
        accumulate(watched, batches(3))
        norms = watched.capture.take()
        assert reads.found == []
        norms.squares.sum().item()
    assert len(reads.found) == 1


# --- What is left behind -----------------------------------------------------------------------


def test_hooks_are_there_from_the_first_forward_to_the_end_of_the_step(watched: Watched) -> None:
    assert watched.hooks() == 0
    accumulate(watched, batches(1))
    assert watched.hooks() == 0
    watched.capture.begin_step()
    assert watched.hooks() == 0
    watched.model(batches(1)[0])
    assert watched.hooks() == 8
    watched.capture.take()
    assert watched.hooks() == 0


def test_removal_in_the_middle_of_a_step(watched: Watched) -> None:
    watched.capture.begin_step()
    accumulate(watched, batches(1))
    watched.capture.remove()
    assert watched.hooks() == 0
    accumulate(watched, batches(1))


def test_no_graph_and_no_gradient_is_kept(watched: Watched) -> None:
    gone = []
    watched.capture.begin_step()
    loss = loss_of(watched.model, batches(1)[0])
    loss.backward()
    gone += [weakref.ref(loss)]
    gone += [weakref.ref(item.grad) for item in watched.model.parameters() if item.grad is not None]
    del loss
    watched.model.zero_grad()
    gc.collect()
    assert [item() for item in gone] == [None] * len(gone)


def test_a_training_is_bit_identical(assert_identical: Callable[..., None]) -> None:
    def train(watch: bool) -> Any:
        model = mlp()
        watched = Watched(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        for _ in range(4):
            if watch:
                watched.capture.begin_step()
            accumulate(watched, batches(3))
            optimizer.step()
            watched.capture.take()
            optimizer.zero_grad()
        return model.state_dict()

    assert_identical(train(watch=True), train(watch=False))


def test_a_compiled_model_is_not_compiled_again() -> None:
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model = mlp()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    watched = Watched(nn.Sequential(cast(nn.Module, compiled)))
    data = batches(2)
    for step in range(4):
        if step % 2 == 0:
            watched.capture.begin_step()
        accumulate(watched, data)
        if step % 2 == 0:
            assert_squares(watched.capture.take(), expected(model, data))
        watched.model.zero_grad()
    assert len(graphs) == 1


# --- Several processes -------------------------------------------------------------------------


def rank_batches(count: int) -> list[Tensor]:
    return batches(count, seed=10 + distributed.get_rank())


def ddp_accumulation(synchronised: bool) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    from contextlib import nullcontext

    model = mlp()
    wrapped = nn.parallel.DistributedDataParallel(model)
    watched = Watched(wrapped, inner=model)
    data = rank_batches(3)
    watched.capture.begin_step()
    for number, batch in enumerate(data):
        last = number == len(data) - 1
        with nullcontext() if last or synchronised else wrapped.no_sync():
            loss_of(wrapped, batch).backward()
    norms = watched.capture.take()
    assert norms.unavailable is None
    return norms.squares, expected(model, data), norms.forwards


@pytest.mark.parametrize("synchronised", [True, False])
def test_ddp_sees_the_gradient_of_its_own_rank(
    synchronised: bool, on_ranks: Callable[..., list[Any]]
) -> None:
    results = on_ranks(ddp_accumulation, synchronised)
    for squares, truth, forwards in results:
        torch.testing.assert_close(squares, truth, rtol=1e-5, atol=0)
        assert forwards == (1, 1, 1)
    assert not torch.allclose(results[0][0], results[1][0])


def sharded(model: nn.Sequential, **options: Any) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, **options)
    return cast(nn.Module, fully_shard(model, **options))


def fsdp_microbatches(synchronised: bool, reduce_dtype: torch.dtype | None, mesh: Any) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy

    plain = mlp()
    options: dict[str, Any] = {"mp_policy": MixedPrecisionPolicy(reduce_dtype=reduce_dtype)}
    if mesh:
        options["mesh"] = init_device_mesh("cpu", mesh, mesh_dim_names=("replicate", "shard"))
    model = sharded(copy.deepcopy(plain), **options)
    watched = Watched(model)
    results = []
    for _ in range(2):  # the second step sees no more than its own
        data = rank_batches(3)
        watched.capture.begin_step()
        for number, batch in enumerate(data):
            last = number == len(data) - 1
            cast(Any, model).set_requires_gradient_sync(synchronised or last)
            loss_of(model, batch).backward()
        results.append(watched.capture.take())
        model.zero_grad()
    whole = [torch.cat(data)] if not synchronised else data
    return results, expected(plain, whole, factor=1.0 if synchronised else 3.0), watched.hooks()


@pytest.mark.parametrize("reduce_dtype", [None, torch.bfloat16])
def test_fsdp2_sees_the_gradient_of_its_own_rank(
    reduce_dtype: torch.dtype | None, on_ranks: Callable[..., list[Any]]
) -> None:
    results = on_ranks(fsdp_microbatches, True, reduce_dtype, None)
    for steps, truth, hooks in results:
        for norms in steps:
            assert_squares(norms, truth, rtol=1e-5 if reduce_dtype is None else 5e-3)
            assert norms.forwards == (1, 1, 1)
        assert hooks == 0
    assert not torch.allclose(results[0][1], results[1][1])


def test_fsdp2_that_reduces_once_a_step_has_one_microbatch(
    on_ranks: Callable[..., list[Any]],
) -> None:
    for steps, truth, _ in on_ranks(fsdp_microbatches, False, None, None):
        for norms in steps:
            assert_squares(norms, truth)
            assert norms.forwards == (3,)


def test_hybrid_sharding(on_ranks: Callable[..., list[Any]]) -> None:
    for steps, truth, _ in on_ranks(fsdp_microbatches, True, None, (2, 2), world=4):
        for norms in steps:
            assert_squares(norms, truth)


def test_fsdp2_that_divides_first(on_ranks: Callable[..., list[Any]]) -> None:
    for steps, _, _ in on_ranks(fsdp_microbatches, True, torch.float16, None):
        assert all("divides" in str(norms.unavailable) for norms in steps)


def fsdp_training(watch: bool) -> Any:
    model = sharded(mlp())
    watched = Watched(model) if watch else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for step in range(4):
        if watched is not None and step % 2 == 0:
            watched.capture.begin_step()
        for batch in rank_batches(2):
            loss_of(model, batch).backward()
        optimizer.step()
        if watched is not None and step % 2 == 0:
            assert watched.capture.take().unavailable is None
        optimizer.zero_grad()
    return {name: cast(Any, item).to_local() for name, item in model.state_dict().items()}


def test_fsdp2_is_bit_identical(
    on_ranks: Callable[..., list[Any]], assert_identical: Callable[..., None]
) -> None:
    assert_identical(on_ranks(fsdp_training, True), on_ranks(fsdp_training, False))


def fsdp_comms() -> dict[str, Any]:
    from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultReduceScatter

    class Own(DefaultReduceScatter):
        calls = 0

        def __call__(self, *arguments: Any, **options: Any) -> Any:
            Own.calls += 1
            return super().__call__(*arguments, **options)

    def comms() -> list[Any]:
        states = [item._get_fsdp_state() for item in (model, model[0], model[2])]
        return [group._reduce_scatter_comm for item in states for group in item._fsdp_param_groups]

    model = cast(Any, sharded(mlp()))
    own = Own()
    model[0].set_custom_reduce_scatter(own)
    before = comms()
    first, second = Watched(model), Watched(model)
    model[2].set_allocate_memory_from_process_group_for_comm(False)  # refuses comms of others
    first.capture.begin_step()
    second.capture.begin_step()
    loss_of(model, rank_batches(1)[0]).backward()
    replaced = [item.capture.take().unavailable for item in (first, second)]
    calls = Own.calls
    first.capture.remove()
    second.capture.begin_step()
    loss_of(model, rank_batches(1)[0]).backward()
    second.capture.take()
    second.capture.remove()
    after = comms()
    return {
        "replaced": replaced,
        "calls": (calls, Own.calls),
        "back": after[0] is before[0] is own and type(after[1]) is type(before[1]),
    }


def test_fsdp2_keeps_what_the_user_has_set(on_ranks: Callable[..., list[Any]]) -> None:
    for seen in on_ranks(fsdp_comms):
        assert seen["calls"] == (1, 2)
        assert seen["back"]
        assert all("replaced" in item for item in seen["replaced"])


def tensor_parallel(with_fsdp: bool) -> str | None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    model = mlp()
    model[2] = nn.Linear(8, 4)
    parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    if with_fsdp:
        fully_shard(model, mesh=mesh["data"])
    watched = Watched(model)
    watched.capture.begin_step()
    loss_of(model, batches(1)[0]).backward()
    return watched.capture.take().unavailable


@pytest.mark.parametrize("with_fsdp", [True, False])
def test_tensor_parallelism_is_stated(with_fsdp: bool, on_ranks: Callable[..., list[Any]]) -> None:
    assert all("no rank has" in str(item) for item in on_ranks(tensor_parallel, with_fsdp, world=4))


@pytest.mark.parametrize("unscale", [False, True])
def test_loss_scaling_is_taken_out(unscale: bool) -> None:
    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    told = gradwatch.MemorySink()
    watch = gradwatch.watch(
        model,
        optimizer,
        monitors=[MicrobatchGradientNorm()],
        sinks=[told],
        every_n_steps=1,
        log_every_n_steps=1,
        on_error="raise",
    )
    values = torch.randn(5, 6)
    gradients = torch.autograd.grad(model(values).square().mean(), list(model.parameters()))
    expected = math.sqrt(sum(float(item.double().square().sum()) for item in gradients))
    scaler.scale(model(values).square().mean()).backward()
    if unscale:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    watch.close()
    measured = told.reports[0].value("microbatch_gradient_norm")
    assert measured == pytest.approx(expected, rel=1e-5)

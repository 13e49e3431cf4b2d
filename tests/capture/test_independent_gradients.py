"""The parts of a step's gradient, against per-example gradients by `vmap(grad)`."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.func import functional_call, grad, vmap
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.utils._python_dispatch import TorchDispatchMode

import gradwatch
from gradwatch.capture.step.microbatch.expectation import Expectation

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = 64


class Recorder(gradwatch.Monitor):
    """Keeps what each sampled step shows."""

    metrics = ("gradient_square", "gradient_variance")
    needs = frozenset({"independent_gradients"})

    def __init__(self) -> None:
        self.found: list[tuple[float, float, float, str] | None] = []
        self.reasons: list[str | None] = []

    def read(self, view: gradwatch.StepView) -> Iterable[gradwatch.Reading]:
        parts = view.independent_gradients
        self.reasons.append(view.independent_gradients_unavailable)
        self.found.append(
            None
            if parts is None
            else (
                float(parts.total_square),
                float(parts.part_squares),
                float(parts.share_squares),
                parts.source,
            )
        )
        if parts is not None:
            yield gradwatch.Reading("gradient_square", parts.total_square, unit="L²/P²")


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(ROWS, 5, generator=generator), torch.randn(ROWS, 3, generator=generator)


def draws(sizes: Sequence[int], steps: int) -> Iterator[list[Tensor]]:
    """Rows with replacement, so that examples are independent."""
    generator = torch.Generator().manual_seed(2)
    for _ in range(steps):
        yield list(torch.randint(ROWS, (sum(sizes),), generator=generator).split(list(sizes)))


def summed_loss(model: nn.Module, rows: Tensor) -> Tensor:
    inputs, targets = data()
    losses: Tensor = (model(inputs[rows]) - targets[rows]).square().mean(dim=1)
    return losses.sum()


def truth() -> tuple[float, float]:
    """`||G||²` and `tr Sigma`, example by example."""
    model = net().double()
    parameters = {name: item.detach() for name, item in model.named_parameters()}

    def loss(values: dict[str, Tensor], row: Tensor, target: Tensor) -> Tensor:
        output: Tensor = functional_call(model, values, (row,))
        return (output - target).square().mean()

    inputs, targets = (item.double() for item in data())
    each = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, inputs, targets)
    flat = torch.cat([item.reshape(ROWS, -1) for item in each.values()], dim=1)
    mean = flat.mean(dim=0)
    return float(mean.square().sum()), float((flat - mean).square().sum() / ROWS)


def exact(parts: Sequence[Tensor], weights: Sequence[float]) -> tuple[float, float, float]:
    """S², q and the shares by their definition, for contributions `sum(loss of part) / total`."""
    model = net().double()
    inputs, targets = (item.double() for item in data())
    total = sum(map(len, parts))
    contributions = []
    for rows in parts:
        loss = (model(inputs[rows]) - targets[rows]).square().mean(dim=1).sum() / total
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        contributions.append(torch.cat([item.reshape(-1) for item in gradients]))
    whole = torch.stack(contributions).sum(dim=0)
    shares = [weight / sum(weights) for weight in weights]
    return (
        float(whole.square().sum()),
        sum(float(item.square().sum()) for item in contributions),
        sum(share**2 for share in shares),
    )


def train(
    sizes: Sequence[int],
    steps: int,
    *,
    model: nn.Module | None = None,
    weigh: bool = False,
    before_step: Callable[[nn.Module], object] = lambda _: None,
    **options: Any,
) -> Recorder:
    """Steps of no length, so that all gradients are of the same parameters."""
    model = net() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    recorder = Recorder()
    settings: dict[str, Any] = {"every_n_steps": 1, "log_every_n_steps": 1, "on_error": "raise"}
    settings |= options
    with gradwatch.watch(model, optimizer, monitors=[recorder], **settings) as watch:
        for parts in draws(sizes, steps):
            optimizer.zero_grad()
            for rows in parts:
                loss = summed_loss(model, rows) / sum(sizes)
                if weigh:
                    watch.weigh_microbatch(torch.tensor(len(rows)))
                loss.backward()
            before_step(model)
            optimizer.step()
    return recorder


def assert_unbiased(found: Iterable[Any], examples: int) -> None:
    """The means of both estimates are within three standard errors of the truth."""
    squares, variances = [], []
    for total, parts, shares, _ in found:
        square = (total - parts) / (1 - shares)
        squares.append(square)
        variances.append(total - square)
    square, variance = truth()
    for values, expected in ((squares, square), (variances, variance / examples)):
        estimates = torch.tensor(values, dtype=torch.float64)
        error = float(estimates.std() / math.sqrt(len(values)))
        assert error < 0.2 * expected, "too few draws to see a bias"
        assert abs(float(estimates.mean()) - expected) < 3 * error


# --- Accumulation ------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(6, 6, 6, 6), (2, 6, 12)], ids=["equal", "unequal"])
def test_they_are_what_they_are_defined_as(sizes: tuple[int, ...]) -> None:
    recorder = train(sizes, 4, weigh=True)
    for found, parts in zip(recorder.found, draws(sizes, 4), strict=True):
        assert found is not None
        assert found[:3] == pytest.approx(exact(parts, sizes), rel=1e-5)
        assert found[3] == f"{len(sizes)} micro-batches"


@pytest.mark.parametrize("sizes", [(6, 6, 6, 6), (2, 6, 12)], ids=["equal", "unequal"])
def test_the_estimates_are_unbiased(sizes: tuple[int, ...]) -> None:
    assert_unbiased(train(sizes, 400, weigh=len(set(sizes)) > 1).found, sum(sizes))


def test_untold_weights_are_equal() -> None:
    (found,) = train((6, 6, 6), 1).found
    assert found is not None
    assert found[2] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    "told", [(2.0, None, 1.0), (2.0,), (None, None, None)], ids=["unknown", "some", "none known"]
)
def test_weights_that_are_not_known_are_not_guessed(told: tuple[float | None, ...]) -> None:
    model, recorder = net(), Recorder()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradwatch.watch(model, optimizer, monitors=[recorder], on_error="raise") as watch:
        for place, rows in enumerate(next(draws((6, 6, 6), 1))):
            summed_loss(model, rows).backward()
            if place < len(told):
                watch.weigh_microbatch(told[place])
        optimizer.step()
    assert recorder.found == [None]
    assert "weights" in str(recorder.reasons[0])


@pytest.mark.parametrize("wrong", [-1.0, math.nan, "8", torch.ones(2)])
def test_a_weight_is_one_number(wrong: Any) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with (
        gradwatch.watch(model, optimizer) as watch,
        pytest.raises(gradwatch.errors.ConfigError, match="weight must be"),
    ):
        watch.weigh_microbatch(wrong)


def test_a_closed_watch_takes_no_weight() -> None:
    model = net()
    watch = gradwatch.watch(model, torch.optim.SGD(model.parameters(), lr=0.1))
    watch.close()
    with pytest.raises(gradwatch.errors.ClosedError, match="weigh_microbatch"):
        watch.weigh_microbatch(1.0)


def test_microbatches_that_were_thrown_away_do_not_count() -> None:
    model, recorder = net(), Recorder()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    parts = next(draws((6, 6, 6), 1))
    with gradwatch.watch(model, optimizer, monitors=[recorder], on_error="raise"):
        summed_loss(model, parts[0]).backward()
        optimizer.zero_grad()
        for rows in parts[1:]:
            (summed_loss(model, rows) / 12).backward()
        optimizer.step()
    assert recorder.found[0] is not None
    assert recorder.found[0][:3] == pytest.approx(exact(parts[1:], (6, 6)), rel=1e-5)


# --- Before clipping, after unscaling ----------------------------------------------------------


def clip(model: nn.Module) -> None:
    clip_grad_norm_(model.parameters(), 0.01)


def test_the_gradient_is_that_before_clipping() -> None:
    sizes = (6, 6)
    (found,) = train(sizes, 1, before_step=clip, track_clipping=True).found
    assert found is not None
    assert found[:3] == pytest.approx(exact(next(draws(sizes, 1)), sizes), rel=1e-4)


def clamp(model: nn.Module) -> None:
    for item in model.parameters():
        assert item.grad is not None
        item.grad.clamp_(-1e-3, 1e-3)


def replace(model: nn.Module) -> None:
    for item in model.parameters():
        assert item.grad is not None
        item.grad = item.grad * 0.5


@pytest.mark.parametrize("change", [clip, clamp, replace])
def test_a_gradient_that_was_changed_unseen_is_not_taken(change: Callable[..., Any]) -> None:
    recorder = train((6, 6), 2, before_step=change)
    assert recorder.found == [None, None]
    assert all("track_clipping=True" in str(reason) for reason in recorder.reasons)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("track_clipping", [False, True])
def test_the_loss_scale_is_taken_out(fused: bool, track_clipping: bool) -> None:
    model, recorder, sizes = net(), Recorder(), (6, 6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    parts = next(draws(sizes, 1))
    with gradwatch.watch(
        model,
        optimizer,
        monitors=[recorder],
        on_error="raise",
        track_clipping=track_clipping,
    ):
        for rows in parts:
            scaler.scale(summed_loss(model, rows) / 12).backward()
        scaler.step(optimizer)
        scaler.update()
    (found,) = recorder.found
    # To unscale in place may look like any other change, which is never taken for clipping.
    if found is not None or fused or track_clipping:
        assert found is not None
        assert found[:3] == pytest.approx(exact(parts, sizes), rel=1e-5)


# --- What it costs -----------------------------------------------------------------------------


class Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def steps_with(
    forwards: Iterable[int], look: Callable[[nn.Module], object], *, together: bool = False
) -> list[Any]:
    """What `look` sees after the last backward of each step."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = []
    with gradwatch.watch(
        model, optimizer, monitors=[Recorder()], every_n_steps=1, log_every_n_steps=1
    ):
        for count in forwards:
            optimizer.zero_grad()
            parts = next(draws((4,) * count, 1))
            if together:
                torch.stack([summed_loss(model, rows) for rows in parts]).sum().backward()
            else:
                for rows in parts:
                    summed_loss(model, rows).backward()
            found.append(look(model))
            optimizer.step()
    return found


@pytest.fixture
def listens(hooks_on: Callable[..., dict[str, list[str]]]) -> Callable[[nn.Module], bool]:
    return lambda model: any(place.startswith("parameter") for place in hooks_on(model))


def test_one_gradient_a_step_is_listened_to_once(listens: Callable[[nn.Module], bool]) -> None:
    assert steps_with([1, 1, 1, 1], listens) == [True, False, False, False]


def test_accumulated_ones_are_listened_to_always(listens: Callable[[nn.Module], bool]) -> None:
    assert steps_with([3, 3, 3], listens) == [True, True, True]


def test_accumulation_that_begins_later_is_noticed(listens: Callable[[nn.Module], bool]) -> None:
    assert steps_with([1, 1, 2, 2, 1, 1], listens) == [True, False, False, True, True, False]


def test_two_forwards_for_one_gradient_are_one(listens: Callable[[nn.Module], bool]) -> None:
    assert steps_with([2, 2, 2], listens, together=True) == [True, False, False]


def test_one_gradient_a_step_costs_no_operator() -> None:
    counts = []
    for needed in (frozenset[str](), frozenset({"independent_gradients"})):
        model, recorder = net(), Recorder()
        recorder.needs = needed  # type: ignore[misc, assignment]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with gradwatch.watch(
            model, optimizer, monitors=[recorder], every_n_steps=1, log_every_n_steps=1
        ):
            for number, (rows,) in enumerate(draws((4,), 3)):
                with Operators() as operators:
                    optimizer.zero_grad()
                    summed_loss(model, rows).backward()
                    optimizer.step()
                if number > 0:
                    counts.append(operators.names)
    assert counts[:2] == counts[2:]


def test_a_scaler_is_observed_only_where_there_is_something_to_hear() -> None:
    before = torch.amp.GradScaler.scale
    seen = steps_with([1, 1], lambda _: torch.amp.GradScaler.scale is before)
    assert seen == [False, True]


class Alone:
    joint, replicas = False, 1


def test_a_skipped_step_is_no_accumulation() -> None:
    expectation = Expectation(Alone())
    expectation.forwards_seen(1, 1)
    expectation.parts_seen(1, 1)
    expectation.forwards_seen(52, 51)
    assert not expectation.worth_trying
    expectation.forwards_seen(200, 101)
    assert expectation.parts == 4


def test_training_is_bit_identical(
    training_state: Callable[..., Any], assert_identical: Callable[..., None]
) -> None:
    states = []
    for watched in (False, True):
        model = net()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        watch = (
            gradwatch.watch(model, optimizer, monitors=[Recorder()], every_n_steps=1)
            if watched
            else None
        )
        for parts in draws((4, 4, 4), 3):
            optimizer.zero_grad()
            for rows in parts:
                summed_loss(model, rows).backward()
                if watch is not None:
                    watch.weigh_microbatch(len(rows))
            optimizer.step()
        if watch is not None:
            watch.close()
        states.append(training_state(model, optimizer))
    assert_identical(*states)


def test_nothing_is_said_where_nobody_asked() -> None:
    recorder = Recorder()
    recorder.needs = frozenset()  # type: ignore[misc]
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradwatch.watch(model, optimizer, monitors=[recorder]):
        for rows in next(draws((4, 4), 1)):
            summed_loss(model, rows).backward()
        optimizer.step()
    assert (recorder.found, recorder.reasons) == ([None], [None])


def test_a_step_of_one_gradient_says_so() -> None:
    recorder = train((8,), 2)
    assert recorder.found == [None, None]
    assert all("several micro-batches or ranks" in str(reason) for reason in recorder.reasons)


# --- Several processes -------------------------------------------------------------------------


def ddp(model: nn.Sequential) -> nn.Module:
    return DistributedDataParallel(model)


def fsdp(model: nn.Sequential) -> nn.Module:
    fully_shard(model[0])
    fully_shard(model)
    return model


def hsdp(model: nn.Sequential) -> nn.Module:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    fully_shard(model, mesh=mesh)
    return model


def summing_fsdp(model: nn.Sequential) -> nn.Module:
    wrapped: Any = fully_shard(model)
    wrapped.set_force_sum_reduction_for_comms(True)
    wrapped.set_gradient_divide_factor(1.0)
    return model


WRAPPERS: dict[str, Callable[[nn.Sequential], nn.Module]] = {
    "DDP": ddp,
    "FSDP2": fsdp,
    "HSDP": hsdp,
    "sum": summing_fsdp,
}
Found = list[tuple[float, float, float, str] | None]


def on_this_rank(
    wrapper: str, sizes: Sequence[int], steps: int, **options: Any
) -> tuple[Found, list[str | None], gradwatch.Report]:
    """Each rank takes its own of the parts of each step, one after another."""
    model = WRAPPERS[wrapper](net())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    recorder, world, rank = Recorder(), dist.get_world_size(), dist.get_rank()
    settings: dict[str, Any] = {"track_clipping": True, "on_error": "raise"} | options
    with gradwatch.watch(
        model, optimizer, monitors=[recorder], every_n_steps=1, log_every_n_steps=1, **settings
    ) as watch:
        for parts in draws(sizes, steps):
            mine = parts[rank::world]
            optimizer.zero_grad()
            for place, rows in enumerate(mine):
                last = place == len(mine) - 1
                silent = getattr(model, "no_sync", nullcontext)
                with nullcontext() if last else silent():
                    # Wrappers take the mean over ranks.
                    loss = summed_loss(model, rows) * world / sum(sizes)
                    watch.weigh_microbatch(len(rows))
                    loss.backward()
            clip(model)
            optimizer.step()
        summary = watch.summary()
    return recorder.found, recorder.reasons, summary


def two_ranks() -> dict[str, Any]:
    return {
        "DDP": on_this_rank("DDP", (8, 8), 200),
        "both": on_this_rank("DDP", (6, 6, 6, 6), 200),
        "uneven": on_this_rank("DDP", (4, 6, 8), 3),
        "FSDP2": on_this_rank("FSDP2", (8, 8), 200),
        "FSDP2 and accumulation": on_this_rank("FSDP2", (4, 8, 8, 4), 3),
        "alone": on_this_rank("DDP", (8, 8), 2, distributed=False),
        "clipped unseen": on_this_rank("DDP", (8, 8), 2, track_clipping=False),
        "summed": on_this_rank("sum", (8, 8), 2),
        "one sees it": on_this_rank("DDP", (8, 8), 2, track_clipping=dist.get_rank() == 0),
    }


def test_of_two_processes(on_ranks: Callable[..., list[Any]]) -> None:
    ranks = on_ranks(two_ranks)
    sizes = {
        "DDP": (8, 8),
        "both": (6, 6, 6, 6),
        "uneven": (4, 6, 8),
        "FSDP2": (8, 8),
        "FSDP2 and accumulation": (4, 8, 8, 4),
    }
    sources = {
        "DDP": "2 ranks",
        "both": "2 ranks x 2 micro-batches",
        "uneven": "2 ranks x 2 micro-batches",
        "FSDP2": "2 ranks",
        "FSDP2 and accumulation": "2 ranks x 2 micro-batches",
    }
    for mode, parts in sizes.items():
        found = ranks[0][mode][0]
        for values, rows in zip(found, draws(parts, len(found)), strict=True):
            assert values[:3] == pytest.approx(exact(rows, parts), rel=1e-4)
        assert found[0][3] == sources[mode]
        assert [item[:3] for item in found] == [item[:3] for item in ranks[1][mode][0]]
        if len(found) > 100:
            assert_unbiased(found, sum(parts))
        assert math.isfinite(ranks[0][mode][2].value("gradient_square"))
    half_known = ranks[0]["one sees it"][2]
    assert not any(item.metric == "gradient_square" for item in half_known.measurements)
    assert "gradient_square, gradient_variance: only some of the ranks" in str(half_known.notes)
    for mode, reason in (
        ("alone", "other processes"),
        ("clipped unseen", "track_clipping=True"),
        ("summed", "weights"),
    ):
        for rank in (0, 1):
            assert ranks[rank][mode][0] == [None, None]
            assert all(reason in str(said) for said in ranks[rank][mode][1])


def four_ranks() -> Any:
    return on_this_rank("HSDP", (2, 4, 6, 4), 2)


@pytest.mark.slow
def test_of_a_mesh_that_shards_and_replicates(on_ranks: Callable[..., list[Any]]) -> None:
    found, _, _ = on_ranks(four_ranks, world=4)[0]
    for values, rows in zip(found, draws((2, 4, 6, 4), 2), strict=True):
        assert values[:3] == pytest.approx(exact(rows, (2, 4, 6, 4)), rel=1e-4)
        assert values[3] == "4 ranks"

"""What an Adam remembers, against its definition and against the gradients that it was fed with."""

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam
from torch.utils._python_dispatch import TorchDispatchMode

import gradwatch
from gradwatch.capture.step.adam import state_moments

pytestmark = pytest.mark.usefixtures("one_thread")

BETAS = (0.8, 0.95)


class Recorder(gradwatch.Monitor):
    """Keeps the moments of each sampled step."""

    metrics = ("gradient_square", "gradient_variance")
    needs = frozenset({"independent_gradients", "adam_moments"})

    def __init__(self) -> None:
        self.found: list[tuple[float, float, float] | None] = []

    def read(self, view: gradwatch.StepView) -> Iterable[gradwatch.Reading]:
        moments = view.adam_moments
        self.found.append(
            None
            if moments is None
            else (float(moments.first_square), float(moments.second), float(moments.shrink))
        )
        return ()


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def batches(steps: int, size: int = 4) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(2)
    for _ in range(steps):
        yield torch.randn(size, 5, generator=generator)


def shrink_after(steps: int, beta: float) -> float:
    """The sum of the squared weights of the gradients in `m_hat`."""
    weights = [(1 - beta) * beta**age / (1 - beta**steps) for age in range(steps)]
    return sum(weight**2 for weight in weights)


def defined(optimizer: Optimizer) -> tuple[float, float, float]:
    first, second = optimizer.param_groups[0]["betas"]
    m_hat, v_hat, steps = 0.0, 0.0, 0
    for state in optimizer.state.values():
        steps = int(state["step"])
        m_hat += float((state["exp_avg"].double() / (1 - first**steps)).square().sum())
        v_hat += float((state["exp_avg_sq"].double() / (1 - second**steps)).sum())
    return m_hat, v_hat, shrink_after(steps, first)


def run(
    model: nn.Module, optimizer: Optimizer, steps: int, **options: Any
) -> tuple[Recorder, list[tuple[float, float, float]]]:
    """What was recorded in each step, and what the state said before it."""
    recorder, expected = Recorder(), []
    settings: dict[str, Any] = {"every_n_steps": 1, "log_every_n_steps": 1, "on_error": "raise"}
    with gradwatch.watch(model, optimizer, monitors=[recorder], **settings | options):
        for batch in batches(steps):
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            expected.append(defined(optimizer))
            optimizer.step()
    return recorder, expected


KINDS: dict[str, Callable[..., Optimizer]] = {
    "Adam": Adam,
    "AdamW": AdamW,
    "AdamW with decay": lambda parameters, **given: AdamW(parameters, weight_decay=0.1, **given),
    "fused": lambda parameters, **given: AdamW(parameters, fused=True, **given),
    "foreach": lambda parameters, **given: Adam(parameters, foreach=True, **given),
    "maximize": lambda parameters, **given: Adam(parameters, maximize=True, **given),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.99)])
def test_they_are_what_they_are_defined_as(kind: str, betas: tuple[float, float]) -> None:
    model = net()
    recorder, expected = run(model, KINDS[kind](model.parameters(), lr=0.01, betas=betas), 6)
    assert recorder.found[:2] == [None, None]  # nothing to remember yet, and then no mean
    for found, truth in zip(recorder.found[2:], expected[2:], strict=True):
        assert found == pytest.approx(truth, rel=1e-5)


REFUSED: dict[str, Callable[..., Optimizer]] = {
    "SGD": SGD,
    "NAdam": NAdam,
    "RAdam": RAdam,
    "Adamax": Adamax,
    "amsgrad": lambda parameters, **given: Adam(parameters, amsgrad=True, **given),
    "decay in the gradient": lambda parameters, **given: Adam(
        parameters, weight_decay=0.1, **given
    ),
    "different betas": lambda parameters, **given: Adam(
        [
            {"params": [parameter], "betas": (0.9, 0.99 + 0.001 * place)}
            for place, parameter in enumerate(parameters)
        ],
        **given,
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_others_are_not_taken_for_it(kind: str) -> None:
    model = net()
    optimizer = REFUSED[kind](model.parameters(), lr=0.01)
    for batch in batches(3):
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()
    assert state_moments(optimizer, dict(model.named_parameters())) is None


def test_a_subclass_may_keep_something_else() -> None:
    class Mine(Adam):
        pass

    model = net()
    assert run(model, Mine(model.parameters()), 3)[0].found == [None] * 3


def test_a_look_leaves_no_state_behind() -> None:
    model = net()
    optimizer = Adam(model.parameters())
    assert state_moments(optimizer, dict(model.named_parameters())) is None
    assert not optimizer.state


def test_one_step_is_no_mean() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    optimizer = Adam([parameter])
    shrinks = []
    for _ in range(2):
        parameter.grad = torch.ones(3)
        optimizer.step()
        moments = state_moments(optimizer, {"it": parameter})
        assert moments is not None
        shrinks.append(float(moments.shrink))
    assert math.isnan(shrinks[0])
    assert shrinks[1] == pytest.approx(shrink_after(2, 0.9))


def test_a_parameter_without_a_gradient_is_left_out() -> None:
    model = net()
    model[0].weight.requires_grad_(False)
    optimizer = Adam(model.parameters(), lr=0.01)
    recorder, expected = run(model, optimizer, 3)
    assert recorder.found[-1] == pytest.approx(expected[-1], rel=1e-5)


def test_half_precision_is_added_up_in_full() -> None:
    parameter = nn.Parameter(torch.zeros(3000, dtype=torch.bfloat16))
    optimizer = Adam([parameter], betas=BETAS)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moments = state_moments(optimizer, {"it": parameter})
    assert moments is not None
    assert float(moments.seconds.values) == pytest.approx(3000, rel=1e-2)


def test_betas_may_be_tensors() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    optimizer = Adam([parameter], betas=BETAS)
    for value in (1.0, 3.0):
        parameter.grad = torch.full((3,), value)
        optimizer.step()
    plain = state_moments(optimizer, {"it": parameter})
    optimizer.param_groups[0]["betas"] = tuple(map(torch.tensor, BETAS))
    of_tensors = state_moments(optimizer, {"it": parameter})
    assert plain is not None
    assert of_tensors is not None
    torch.testing.assert_close(of_tensors.first_squares.values, plain.first_squares.values)
    torch.testing.assert_close(of_tensors.seconds.values, plain.seconds.values)
    torch.testing.assert_close(of_tensors.shrink, plain.shrink)


class Reads(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "_local_scalar_dense" in str(func)
        return func(*args, **(kwargs or {}))


def test_nothing_is_read_on_the_host() -> None:
    model = net()
    optimizer = AdamW(model.parameters())
    run(model, optimizer, 2)
    with Reads() as reads:  # type: ignore[no-untyped-call]
        assert state_moments(optimizer, dict(model.named_parameters())) is not None
    assert reads.count == 0


def test_of_stationary_gradients_they_tell_square_and_variance() -> None:
    """Steps of no length; the state is looked at when it has forgotten the last look."""
    size, steps, every = 4, 2000, 40
    model = net()
    optimizer = Adam(model.parameters(), lr=0.0, betas=BETAS)
    recorder, each = Recorder(), []
    with gradwatch.watch(
        model, optimizer, monitors=[recorder], every_n_steps=every, log_every_n_steps=every
    ):
        for batch in batches(steps, size):
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            each.append(torch.cat([item.grad.flatten() for item in model.parameters()]))  # type: ignore[union-attr]
            optimizer.step()
    found = [item for item in recorder.found if item is not None]
    assert len(found) == steps // every - 1
    variances = torch.tensor([(v - m) / (1 - shrink) for m, v, shrink in found])
    squares = torch.tensor([v for _, v, _ in found]) - variances
    gradients = torch.stack(each).double()
    spread = gradients.var(dim=0).sum()
    square = gradients.mean(dim=0).square().sum() - spread / steps
    for values, expected in ((variances, spread), (squares, square)):
        error = float(values.std()) / math.sqrt(len(values))
        assert error < 0.2 * float(expected)
        assert abs(float(values.mean()) - float(expected)) < 3 * error


def test_independent_gradients_are_better() -> None:
    model = net()
    optimizer = Adam(model.parameters(), lr=0.01)
    recorder = Recorder()
    with gradwatch.watch(
        model, optimizer, monitors=[recorder], every_n_steps=1, log_every_n_steps=1
    ):
        for batch in batches(3):
            optimizer.zero_grad()
            for part in batch.chunk(2):
                model(part).square().mean().backward()
            optimizer.step()
    assert recorder.found == [None] * 3


def test_training_is_bit_identical(
    training_state: Callable[..., Any], assert_identical: Callable[..., None]
) -> None:
    model = net()
    twin = copy.deepcopy(model)
    mine, other = Adam(model.parameters(), lr=0.01), Adam(twin.parameters(), lr=0.01)
    run(model, mine, 4)
    for batch in batches(4):
        other.zero_grad()
        twin(batch).square().mean().backward()
        other.step()
    assert_identical(training_state(model, mine), training_state(twin, other))


# --- Several processes -------------------------------------------------------------------------


def on_this_rank(wrapped: str) -> list[Any]:
    """All ranks have the same batch; the gradients cannot be told apart before they are reduced."""
    model: nn.Module = net()
    if wrapped == "FSDP2":
        fully_shard(model)
    elif wrapped == "DDP":
        model = DistributedDataParallel(model)
    optimizer = Adam(model.parameters(), lr=0.01)
    recorder = Recorder()
    recorder.needs = frozenset({"adam_moments"})  # type: ignore[misc]
    with gradwatch.watch(
        model, optimizer, monitors=[recorder], every_n_steps=1, log_every_n_steps=1
    ):
        for batch in batches(4):
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            optimizer.step()
    return recorder.found


def both_wrappers() -> dict[str, list[Any]]:
    return {wrapped: on_this_rank(wrapped) for wrapped in ("DDP", "FSDP2")}


def test_parts_on_several_ranks_are_added_up(on_ranks: Callable[..., list[Any]]) -> None:
    model = net()
    _, expected = run(model, Adam(model.parameters(), lr=0.01), 4)
    ranks = on_ranks(both_wrappers)
    for wrapped in ("DDP", "FSDP2"):
        assert ranks[0][wrapped] == ranks[1][wrapped]
        for found, truth in zip(ranks[0][wrapped][2:], expected[2:], strict=True):
            assert found == pytest.approx(truth, rel=1e-5)

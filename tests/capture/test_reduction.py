"""What the ranks send one another, with ranks that are made up."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gradwatch.capture.ranks.reduction import INCOMPLETE, Reduction
from gradwatch.capture.step_tensors import StepTensors
from gradwatch.capture.view import NamedValues
from gradwatch.isolation import Isolation


class Twins:
    """Two ranks that know the same, each one half of every sharded parameter."""

    size, replicas, in_parts = 2, 2, True

    def share(self, parameter: Tensor) -> float:
        return 1.0

    def sum(self, values: Tensor) -> Tensor:
        return values.mul_(2)


class Reads(TorchDispatchMode):
    """Counts the numbers that are read on the host."""

    count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.count += "_local_scalar_dense" in str(function)
        return function(*args, **(kwargs or {}))


def reduction() -> tuple[Reduction, dict[str, Tensor]]:
    parameters = {"a": torch.ones(2), "b": torch.ones(3)}
    ranks: Any = Twins()
    return Reduction(ranks, parameters, ["first", "last"], ["capture"]), parameters


def step(names: tuple[str, ...] = ("a", "b")) -> StepTensors:
    values = NamedValues(names, torch.full((len(names),), 3.0))
    return StepTensors(
        used=values,
        raw=values,
        updates=values,
        unmoved=values,
        pushed=values,
        parameters=values,
        activations=NamedValues(("last",), torch.tensor([2.0])),
        loss=torch.tensor(0.5),
        samples=8,
        found_inf=torch.tensor(0.0),
        microbatch_squares=torch.tensor(4.0),
        microbatches=2,
        weights=torch.tensor(3.0),
        weight_squares=torch.tensor(5.0),
        first_squares=values,
        seconds=values,
        shrink=torch.tensor(0.1),
    )


def test_halves_make_a_whole() -> None:
    whole, flags = reduction()[0].combine(step(), Isolation("raise"))
    assert whole is not None
    assert whole.raw is not None
    assert whole.used.values.tolist() == pytest.approx([18**0.5] * 2)
    assert whole.raw.values.tolist() == pytest.approx([18**0.5] * 2)
    assert whole.activations is not None
    assert whole.activations.values.tolist() == pytest.approx([2.0])
    assert (float(whole.loss or 0), float(whole.samples or 0)) == (0.5, 16.0)
    assert flags.tolist() == [0.0] * 6


def test_what_the_gradients_are_made_of_adds_up() -> None:
    whole, _ = reduction()[0].combine(step(), Isolation("raise"))
    assert whole is not None
    numbers = (whole.microbatch_squares, whole.microbatches, whole.weights, whole.weight_squares)
    assert [float(number or 0) for number in numbers] == [8.0, 4.0, 6.0, 10.0]
    assert whole.first_squares is not None
    assert whole.seconds is not None
    assert whole.first_squares.values.tolist() == [6.0, 6.0]
    assert whole.seconds.values.tolist() == [6.0, 6.0]
    assert float(whole.shrink or 0) == pytest.approx(0.1)


class OneKnows(Twins):
    """The other rank knows nothing but its gradients."""

    def sum(self, values: Tensor) -> Tensor:
        return values


@pytest.mark.parametrize("known", [True, False])
def test_weights_that_one_rank_alone_knows_are_worthless(known: bool) -> None:
    ranks: Any = OneKnows()
    parameters = {"a": torch.ones(2), "b": torch.ones(3)}
    exchange = Reduction(ranks, parameters, ["first", "last"], ["capture"])
    local = step() if known else replace(step(), weights=None, weight_squares=None)
    _, flags = exchange.combine(local, Isolation("raise"))
    worthless = dict(zip(INCOMPLETE, flags[-len(INCOMPLETE) :].tolist(), strict=True))
    assert (worthless["weights"] > 0) == known
    assert "gradient_variance" in INCOMPLETE["weights"]


def test_nothing_is_read_on_the_host() -> None:
    exchange, _ = reduction()
    with Reads() as reads:  # type: ignore[no-untyped-call]
        exchange.combine(step(), Isolation("raise"))
    assert reads.count == 0


def test_parameters_that_change_from_step_to_step_do_not_fill_the_memory() -> None:
    names = [f"expert{number}" for number in range(100)]
    ranks: Any = Twins()
    exchange = Reduction(ranks, dict.fromkeys(names, torch.ones(2)), [], ["capture"])
    for name in names:
        whole, _ = exchange.combine(
            StepTensors(used=NamedValues((name,), torch.tensor([1.0]))), Isolation("raise")
        )
        assert whole is not None
        assert whole.used.values.tolist() == pytest.approx([2**0.5])
    assert len(exchange._places) <= 32

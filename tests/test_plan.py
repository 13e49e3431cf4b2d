"""Planning: settings from constants, and networks compared before training."""

import math
import random
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from gradwatch import plan
from gradwatch.errors import ConfigError
from gradwatch.plan.measure import top_eigenvalue
from gradwatch.plan.table import CAVEAT, groups
from gradwatch.theory import gradient_convergence as theory

PAGE = Path(__file__).parents[1] / "docs" / "plan.md"
KNOWN: dict[str, Any] = {"smoothness": 10.0, "variance": 50.0}

positive = st.floats(min_value=1e-2, max_value=1e2)
costs = st.lists(st.integers(min_value=1, max_value=1000), min_size=1, max_size=12).map(sorted)


class Bowl(nn.Module):
    """Loss 1/2 mean over samples of sum_j bend_j (w_j - x_j)²: all its constants are known."""

    bends: Tensor

    def __init__(self, bends: tuple[float, ...]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(len(bends), dtype=torch.float64))
        self.register_buffer("bends", torch.tensor(bends, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * ((self.weight - x) ** 2 @ self.bends)


def mean_loss(model: nn.Module, batch: Tensor) -> Tensor:
    loss: Tensor = model(batch).mean()
    return loss


def draws(batches: int = 4, size: int = 64, dimensions: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (batches, size, dimensions)
    return list(1 + torch.randn(shape, generator=generator, dtype=torch.float64))


# --- Settings from constants ---------------------------------------------------------------------


@given(positive, positive, positive, st.integers(1, 1000), positive)
def test_learning_rate_and_steps_reach_the_target(
    gap: float, smoothness: float, variance: float, batch: int, target: float
) -> None:
    rate = plan.learning_rate(
        smoothness=smoothness, variance=variance, batch_size=batch, target=target
    )
    steps = plan.steps(
        loss_gap=gap,
        smoothness=smoothness,
        variance=variance,
        batch_size=batch,
        learning_rate=rate,
        target=target,
    )
    split = theory.stationarity_bound(gap, smoothness, variance, batch, rate, steps)
    assert rate <= 0.5 / smoothness
    assert split.bound <= target * (1 + 1e-9)
    assert split.noise_term <= target / 2 * (1 + 1e-9)
    assert rate == 0.5 / smoothness or split.noise_term == pytest.approx(target / 2)


def test_learning_rate_for_planned_steps_is_the_best_one() -> None:
    rate = plan.learning_rate(**KNOWN, batch_size=128, loss_gap=2.3026, steps=10_000)
    assert rate == pytest.approx(0.01028438329051, rel=1e-9)


def test_batch_size_with_and_without_a_number_of_steps() -> None:
    floor = plan.batch_size(**KNOWN, learning_rate=0.03, target=0.02)
    assert theory.noise_floor(10, 50, floor, 0.03) <= 0.01
    assert theory.noise_floor(10, 50, floor - 1, 0.03) > 0.01
    whole = plan.batch_size(**KNOWN, learning_rate=0.03, target=0.02, loss_gap=2.3026, steps=10_000)
    assert whole == 805


DROPOUT: dict[str, Any] = {
    "data_variance": 9.5,
    "smoothness": 1.0,
    "batch_size": 32,
    "learning_rate": 0.3,
}


def test_dropout_is_the_largest_one_within_the_target_and_moves_a_little() -> None:
    law = 8.75
    at_half = plan.dropout(current=0.5, mask_variance=law, target=0.24, **DROPOUT)
    assert at_half == 0.5, "it is never raised"
    p = plan.dropout(current=0.7, mask_variance=law * 0.7 / 0.3, target=0.24, **DROPOUT)
    assert p == pytest.approx(1 - 0.41646834840554)
    p = plan.dropout(current=0.9, mask_variance=law * 9, target=0.24, **DROPOUT)
    assert p == pytest.approx(0.7), "by 0.2 at most"
    assert plan.dropout(current=0.5, mask_variance=law, target=0.1, **DROPOUT) is None


BASE: Any = theory.Setting(2.3026, 10, 50, 128, 0.03, 10_000)
OTHER: Any = {"same": plan.Constants(2.3026, 10, 50)}


def test_same_convergence_family() -> None:
    base = BASE
    others = {"same": plan.Constants(2.3026, 10, 50), "wide": plan.Constants(2.0, 20, 90)}
    family = plan.same_convergence_family(base=base, others=others)
    assert family["same"] == pytest.approx(base)
    assert family["wide"].bound.bound == pytest.approx(base.bound.bound)
    assert family["wide"].batch_size == pytest.approx(230.4)


WRONG: Any = plan  # called with what the types forbid


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda: plan.learning_rate(**KNOWN, batch_size=1), "either target"),
        (lambda: plan.learning_rate(**KNOWN, batch_size=1, target=1, steps=5), "either target"),
        (lambda: plan.learning_rate(**KNOWN, batch_size=1, target=-1), "target"),
        (lambda: plan.batch_size(**KNOWN, learning_rate=0.1, target=1, steps=5), "together"),
        (lambda: plan.batch_size(**KNOWN, learning_rate=0.0, target=1), "learning_rate"),
        (
            lambda: plan.dropout(current=1.0, mask_variance=1, target=1, **DROPOUT),
            "current",
        ),
        (lambda: WRONG.dropout(current="0.5", mask_variance=1, target=1, **DROPOUT), "current"),
        (lambda: WRONG.dropout(current=0.5, mask_variance=1, target=None, **DROPOUT), "target"),
        (lambda: WRONG.learning_rate(**KNOWN, batch_size=True, target=1), "batch_size.*a number"),
        (lambda: WRONG.learning_rate(**KNOWN, batch_size=1, target=True), "target.*a number"),
        (lambda: WRONG.learning_rate(**KNOWN, batch_size=1, target="1"), "target.*a number"),
        (lambda: WRONG.batch_size(**KNOWN, learning_rate=0.1, target=None), "target.*a number"),
        (lambda: WRONG.batch_size(**KNOWN, learning_rate=10**400, target=1), "too large"),
        (lambda: WRONG.same_convergence_family(base=(1, 2), others=OTHER), "base.*Setting"),
        (lambda: WRONG.same_convergence_family(base=BASE, others=[1.0]), "others.*name"),
        (lambda: WRONG.same_convergence_family(base=BASE, others={"a": (1, 2)}), "'a'.*Constants"),
        (
            lambda: WRONG.same_convergence_family(
                base=BASE, others={"a": WRONG.Constants(1, "2", 3)}
            ),
            "smoothness.*a number",
        ),
        (
            lambda: WRONG.same_convergence_family(
                base=theory.Setting(1, 1, 1, 1, 0.1, 10), others={}
            ),
            "others",
        ),
    ],
)
def test_wrong_numbers_are_named(call: Callable[[], object], names: str) -> None:
    with pytest.raises(ConfigError, match=names):
        call()


# --- What is measured ----------------------------------------------------------------------------


def test_constants_of_a_bowl() -> None:
    batches = draws(batches=8, size=512)
    (row,) = plan.network([lambda: Bowl((3.0, 1.0))], batches, mean_loss, target=0.1).rows
    x = torch.cat(batches)
    assert row.name == "0"
    assert row.parameters == 2
    assert row.batch_size == 512
    assert row.smoothness == pytest.approx(3.0, rel=1e-2)
    assert row.loss_gap == pytest.approx(
        0.5 * float((x**2).mean(dim=0) @ torch.tensor([3.0, 1.0]).double())
    )
    # Gradient of a sample: -bend_j x_j, of variance bend_j².
    assert row.variance == pytest.approx(10.0, abs=4 * row.variance_error)
    assert 0.05 < row.cost_error < 0.4
    assert row.gradient_square == pytest.approx(10.0, abs=4 * row.gradient_square_error)
    assert 0.0 < row.gradient_square_error < 1.0
    assert row.target == 0.1
    assert row.noise == row.variance / 512
    assert row.cost == 512 * row.steps


def test_the_error_of_the_variance_is_its_spread() -> None:
    """Over many data sets; the pairs have up to twice the variance of the estimate itself."""
    estimates, errors = [], []
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        batches = list(torch.randn((3, 16, 4), generator=generator, dtype=torch.float64))
        answer = plan.network([lambda: Bowl((1.0,) * 4)], batches, mean_loss, target=0.1)
        estimates.append(answer.rows[0].variance)
        errors.append(answer.rows[0].variance_error)
    assert np.mean(estimates) == pytest.approx(4.0, rel=0.1)
    assert 0.9 < np.mean(errors) / np.std(estimates) < 1.9


@pytest.mark.parametrize(("middle", "largest_error"), [(0.0, 4.0), (2.0, 1.6)])
def test_the_square_of_the_gradient_is_unbiased_and_its_error_is_its_spread(
    middle: float, largest_error: float
) -> None:
    """Over many data sets; the square of the mean gradient alone would be 4/48 too large."""
    estimates, errors = [], []
    for seed in range(80):
        generator = torch.Generator().manual_seed(seed)
        draw = torch.randn((3, 16, 4), generator=generator, dtype=torch.float64)
        answer = plan.network(
            [lambda: Bowl((1.0,) * 4)], list(middle + draw), mean_loss, target=0.1
        )
        estimates.append(answer.rows[0].gradient_square)
        errors.append(answer.rows[0].gradient_square_error)
    spread = float(np.std(estimates))
    assert np.mean(estimates) == pytest.approx(4 * middle**2, abs=3 * spread / math.sqrt(80))
    assert 0.8 < np.mean(errors) / spread < largest_error


class Matrix:
    """Stands for a Hessian."""

    def __init__(self, values: list[float]) -> None:
        self.values = torch.tensor(values, dtype=torch.float64)
        self.parameters = (torch.zeros(len(values), dtype=torch.float64),)

    def __call__(self, vector: Any) -> tuple[Tensor, ...]:
        return (self.values * vector[0],)


@pytest.mark.parametrize(
    ("values", "top"),
    [
        ([3.0, 1.0, -2.0], 3.0),
        ([2.0, 1.0, -3.0], 2.0),
        ([3.0, -3.0, 1.0, -1.0], 3.0),  # power iteration stands still between the first two
        ([-1.0, -3.0], -1.0),
        ([0.0, 0.0], 0.0),
        ([1.0] * 100, 1.0),
        ([1.0, math.nan], math.nan),
    ],
)
def test_the_top_eigenvalue_is_the_largest_not_the_strongest(
    values: list[float], top: float
) -> None:
    torch.manual_seed(0)
    found = top_eigenvalue(Matrix(values))  # type: ignore[arg-type]
    assert found == pytest.approx(top, rel=1e-9, abs=1e-12, nan_ok=True)


def test_the_top_eigenvalue_of_a_large_matrix() -> None:
    torch.manual_seed(0)
    values = [1.05, *torch.linspace(-1.2, 1.0, 500).tolist()]
    assert top_eigenvalue(Matrix(values)) == pytest.approx(1.05, rel=1e-2)  # type: ignore[arg-type]


DIGITS = {64: (9.3, 1.08), 128: (13.1, 1.31), 256: (21.0, 2.06), 512: (38.9, 3.81)}


def digits(rows: int, size: int) -> list[tuple[Tensor, Tensor]]:
    datasets = pytest.importorskip("sklearn.datasets")
    pixels, labels = (torch.as_tensor(part) for part in datasets.load_digits(return_X_y=True))
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))[:rows]
    return [(pixels[some] / 16, labels[some]) for some in order.split(size)]


def classify(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def test_wider_networks_are_noisier_and_steeper() -> None:
    def builder(width: int) -> Callable[[], nn.Module]:
        return lambda: nn.Sequential(nn.Linear(64, width), nn.Tanh(), nn.Linear(width, 10)).double()

    answer = plan.network(
        {str(width): builder(width) for width in DIGITS},
        digits(1500, 250),
        classify,
        target=0.05,
        batch_size=32,
    )
    for width, (variance, smoothness) in DIGITS.items():
        row = answer[str(width)]
        assert row.variance == pytest.approx(variance, rel=0.25)
        assert row.smoothness == pytest.approx(smoothness, rel=0.25)
        assert row.loss_gap == pytest.approx(math.log(10), rel=0.05)
    assert [row.name for row in answer.rows] == ["64", "128", "256", "512"]
    assert answer.equivalent == ("64",)


def test_dropout_adds_noise() -> None:
    def builder(p: float) -> Callable[[], nn.Module]:
        return lambda: nn.Sequential(
            nn.Linear(64, 64), nn.Tanh(), nn.Dropout(p), nn.Linear(64, 10)
        ).double()

    answer = plan.network(
        {"0.5": builder(0.5), "0": builder(0.0)}, digits(1000, 250), classify, target=0.05
    )
    added = answer["0.5"].variance - answer["0"].variance
    assert added == pytest.approx(8.8, rel=0.35)  # of the masks, with the law of hidden dropout
    assert answer["0.5"].cost > answer["0"].cost


# --- The scale of the gradient -------------------------------------------------------------------


class Scaled(nn.Module):
    """A network whose parameters, outputs or loss are measured in other units."""

    def __init__(self, *, parameters: float = 1.0, outputs: float = 1.0, loss: float = 1.0) -> None:
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.second = nn.Linear(64, 10)
        self.double()
        self.scales = (parameters, outputs, loss)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.div_(parameters)

    def forward(self, x: Tensor) -> Tensor:
        unit, outputs, _ = self.scales
        hidden = nn.functional.linear(x, unit * self.first.weight, unit * self.first.bias).relu()
        return outputs * nn.functional.linear(
            hidden, unit * self.second.weight, unit * self.second.bias
        )


def scaled_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    assert isinstance(model, Scaled)
    return model.scales[2] * classify(model, batch)


def costs_of(candidates: dict[str, Callable[[], nn.Module]], **aim: float) -> dict[str, float]:
    answer = plan.network(
        candidates,
        digits(1500, 250),
        scaled_loss,
        batch_size=32,
        **aim,  # type: ignore[arg-type]
    )
    return {row.name: row.cost for row in answer.rows}


UNITS: dict[str, Callable[[], nn.Module]] = {
    "plain": Scaled,
    "parameters": lambda: Scaled(parameters=3.0),
    "loss": lambda: Scaled(loss=10.0),
}


def test_a_relative_target_knows_no_units() -> None:
    relative = costs_of(UNITS, relative_target=0.1)
    assert relative["parameters"] == pytest.approx(relative["plain"], rel=0.02)
    assert relative["loss"] == pytest.approx(relative["plain"], rel=0.02)
    absolute = costs_of(UNITS, target=0.05)
    assert absolute["parameters"] > 10 * absolute["plain"], "the same training in other units"
    assert absolute["loss"] > 10 * absolute["plain"]


def test_costs_of_other_output_scales_do_not_compare() -> None:
    """The numbers of the page."""
    outputs: dict[str, Callable[[], nn.Module]] = {
        "0.1": lambda: Scaled(outputs=0.1),
        "1": Scaled,
        "3": lambda: Scaled(outputs=3.0),
    }
    absolute = costs_of(outputs, target=0.05)
    assert absolute == pytest.approx({"0.1": 160, "1": 7.3e3, "3": 5.5e5}, rel=0.25)
    relative = costs_of(outputs, relative_target=0.1)
    assert relative == pytest.approx({"0.1": 3.1e6, "1": 3.8e5, "3": 2.0e5}, rel=0.1)


def test_a_relative_target_is_a_share_of_what_was_measured() -> None:
    (row,) = plan.network([lambda: Bowl((3.0, 1.0))], draws(), mean_loss, relative_target=0.1).rows
    assert row.target == pytest.approx(0.1 * row.gradient_square)
    assert row.target_error == pytest.approx(0.1 * row.gradient_square_error)
    (same,) = plan.network([lambda: Bowl((3.0, 1.0))], draws(), mean_loss, target=row.target).rows
    assert (same.steps, same.learning_rate) == (row.steps, row.learning_rate)
    assert row.cost_error > same.cost_error, "that of the target is added"


def test_no_relative_target_where_noise_hides_the_gradient() -> None:
    at_the_minimum = [batch - 1 for batch in draws()]
    answer = plan.network([lambda: Bowl((1.0, 1.0))], at_the_minimum, mean_loss, target=0.1)
    assert abs(answer.rows[0].gradient_square) < 0.1, "measured, and shown, all the same"
    with pytest.raises(ConfigError, match="relative_target needs a square of the gradient"):
        plan.network([lambda: Bowl((1.0, 1.0))], at_the_minimum, mean_loss, relative_target=0.1)


# --- What is left alone, and what is the same ----------------------------------------------------


def streams() -> tuple[object, ...]:
    return random.getstate(), repr(np.random.get_state()), torch.get_rng_state().tolist()


def noisy() -> nn.Module:
    random.random()
    np.random.rand()
    return nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.5), nn.Linear(3, 1)).double()


def square_loss(model: nn.Module, batch: Tensor) -> Tensor:
    loss: Tensor = model(batch).square().mean()
    return loss


def test_the_random_streams_stay_and_every_candidate_has_the_same_seed() -> None:
    torch.manual_seed(1)
    before = streams()
    answer = plan.network([noisy, noisy], draws(), square_loss, target=0.1)
    assert streams() == before
    one, other = answer.rows
    assert (one.smoothness, one.variance, one.steps) == (
        other.smoothness,
        other.variance,
        other.steps,
    )
    torch.manual_seed(2)
    assert plan.network([noisy, noisy], draws(), square_loss, target=0.1) == answer
    assert plan.network([noisy], draws(), square_loss, target=0.1, seed=3).rows[0] != one


class Counted(nn.Module):
    """Counts its calls, as layers with a schedule of their own do."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        out: Tensor = self.layers(x)
        return out


@torch.no_grad()
def test_the_model_is_as_it_was_built() -> None:
    model = Counted(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)).double()
    before = {name: item.clone() for name, item in model.state_dict().items()}
    plan.network([lambda: model], draws(size=4), square_loss, target=0.1)
    assert model.calls == 0
    assert all(torch.equal(before[name], item) for name, item in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_batches_of_different_sizes_are_cut_into_equal_parts() -> None:
    sizes: list[int] = []

    def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
        sizes.append(len(batch))
        return square_loss(model, batch)

    batches = [*draws(batches=2, size=33), draws(batches=1, size=17)[0]]
    plan.network([noisy], batches, loss_fn, target=0.1)
    assert sizes[:3] == [33, 33, 17]
    assert set(sizes[3:]) == {2}
    assert len(sizes[3:]) == 16 + 16 + 8


# --- The table -----------------------------------------------------------------------------------


def row(cost: int, error: float = 0.0, target_error: float = 0.0) -> plan.PlanRow:
    return plan.PlanRow(
        name=f"of {cost}",
        parameters=1,
        gradient_square=1.0,
        gradient_square_error=0.1,
        smoothness=1.0,
        variance=1.0,
        variance_error=error,
        loss_gap=1.0,
        target=1.0,
        target_error=target_error,
        batch_size=1,
        learning_rate=0.1,
        steps=cost,
    )


@given(costs)
def test_groups_are_within_a_quarter_and_apart_by_more(given_costs: list[int]) -> None:
    found = groups([row(cost) for cost in given_costs])
    assert found[0] == 1
    assert all(0 <= after - before <= 1 for before, after in pairwise(found))
    starts = [
        cost
        for place, cost in enumerate(given_costs)
        if place == 0 or found[place] != found[place - 1]
    ]
    for cost, group in zip(given_costs, found, strict=True):
        assert cost <= 1.25 * starts[group - 1]
    assert all(after > 1.25 * before for before, after in pairwise(starts))


def test_an_inexact_measurement_makes_more_candidates_equivalent() -> None:
    assert groups([row(100), row(140)]) == [1, 2]
    assert groups([row(100, error=0.2), row(140, error=0.2)]) == [1, 1]
    assert groups([row(100, target_error=0.1), row(140, target_error=0.1)]) == [1, 1]


def test_the_table() -> None:
    answer = plan.network(
        {"flat": lambda: Bowl((1.0, 1.0)), "steep": lambda: Bowl((8.0, 8.0))},
        draws(),
        mean_loss,
        target=0.05,
        lowest_loss=0.5,
    )
    lines = str(answer).splitlines()
    assert "0.05" in lines[0]
    assert lines[1].split()[:2] == ["candidate", "parameters"]
    assert [line.split()[0] for line in lines[3:5]] == ["flat", "steep"]
    assert "|grad|²" in lines[1]
    assert "only between candidates of the same output scale" in lines[-2]
    assert lines[-1] == CAVEAT
    assert "Constants are those at initialisation" in CAVEAT
    assert answer.equivalent == ("flat",)
    with pytest.raises(KeyError):
        answer["round"]


def test_the_table_of_a_relative_target() -> None:
    answer = plan.network([lambda: Bowl((1.0, 1.0))], draws(), mean_loss, relative_target=0.25)
    lines = str(answer).splitlines()
    assert "0.25 of |grad|² at initialisation" in lines[0]
    assert "equal relative decrease" in lines[-2]
    assert lines[-1] == CAVEAT


ONE = draws(batches=1)[0]


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"candidates": {}}, "candidates"),
        ({"candidates": nn.Sequential(nn.Linear(2, 1))}, "a mapping or a list"),
        ({"candidates": [nn.Linear(2, 1)]}, "'0' must be a function.*got a Linear"),
        ({"candidates": {"name": "model"}}, "'name' must be a function"),
        ({"batches": ONE}, "list of batches"),
        ({"batches": 3}, "list of batches"),
        ({"batches": [ONE, ONE]}, "same at 0 and 1"),
        ({"batches": [ONE, draws()[1], ONE.clone()]}, "same at 0 and 2"),
        ({"batches": [(ONE, 1), (ONE, 2)]}, "same at 0 and 1"),
        ({"batches": draws(batches=2, size=3)}, "4 micro-batches.*sizes .3, 3."),
        ({"target": True}, "target must be a number"),
        ({"target": "0.1"}, "target must be a number"),
        ({"target": None}, "either target or relative_target"),
        ({"relative_target": 0.1}, "either target or relative_target"),
        ({"target": None, "relative_target": 1.0}, "relative_target must lie"),
        ({"batch_size": 1.5}, "batch_size"),
        ({"batch_size": True}, "batch_size"),
        ({"lowest_loss": None}, "lowest_loss must be a number"),
        ({"lowest_loss": -math.inf}, "lowest_loss"),
        ({"seed": -1}, "seed"),
        ({"seed": 0.5}, "seed"),
        ({"loss_fn": None}, "loss_fn"),
        ({"loss_fn": nn.MSELoss()}, "loss_fn"),
        ({"batches": draws(batches=1)}, "two probe batches"),
        ({"batches": [torch.ones(1, 2), torch.ones(1, 2)]}, "two samples"),
        ({"target": 0.0}, "target"),
        ({"target": math.nan}, "target"),
        ({"batch_size": 0}, "batch_size"),
        ({"lowest_loss": 1e9}, "lowest_loss"),
        ({"candidates": {"of nan": lambda: Bowl((math.nan, 1.0))}}, "'of nan'.*finite"),
        ({"candidates": {"flat": lambda: Bowl((-1.0, -1.0))}, "lowest_loss": -1e9}, "bend upwards"),
        ({"candidates": [nn.Identity]}, "no parameters"),
        ({"candidates": [lambda: 3]}, "torch.nn.Module"),
        ({"loss_fn": lambda model, batch: model(batch)}, "scalar"),
    ],
)
def test_wrong_input_is_named(change: dict[str, Any], names: str) -> None:
    arguments: dict[str, Any] = {
        "candidates": {"bowl": lambda: Bowl((1.0, 1.0))},
        "batches": draws(),
        "loss_fn": mean_loss,
        "target": 0.1,
    }
    with pytest.raises(ConfigError, match=names):
        plan.network(**{**arguments, **change})


def test_the_examples_of_the_page_run() -> None:
    pytest.importorskip("sklearn")
    names: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 2
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)

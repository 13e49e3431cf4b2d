"""Sharpness against exact Hessians, and what it does with the state of the optimizer."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import hessian
from torch.func import functional_call
from torch.nn import functional
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop
from torch.utils.checkpoint import checkpoint
from typing_extensions import override

import gradwatch
from gradwatch.capture.probe.batch import LastBatch
from gradwatch.capture.probe.objective import LossFunction
from gradwatch.capture.probe.undisturbed import undisturbed
from gradwatch.capture.probe.view import ProbeView
from gradwatch.errors import ConfigError
from gradwatch.interfaces import Monitor
from gradwatch.monitors.edge_of_stability import EdgeOfStability
from gradwatch.monitors.sharpness import ANEW, FEWEST, Sharpness
from gradwatch.records import Measurement, ModelInfo, StepInfo

Batch = tuple[Tensor, Tensor]
Probe = Callable[..., dict[str, Tensor]]
Step = Callable[..., StepInfo]
Measured = Callable[..., list[Measurement]]
Check = Callable[[Callable[[], Monitor], Sequence[str]], None]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def data(count: int = 24) -> Batch:
    draws = torch.Generator().manual_seed(1)
    x = torch.randn(count, 4, generator=draws).double()
    return x, torch.randint(3, (count,), generator=draws)


def exact_hessian(model: nn.Module, batch: Batch, names: Sequence[str] | None = None) -> Tensor:
    """Of the cross-entropy by the named parameters, (D, D)."""
    values = {name: item.detach().clone() for name, item in model.named_parameters()}
    wanted = list(values) if names is None else list(names)
    sizes = [values[name].numel() for name in wanted]

    def loss(flat: Tensor) -> Tensor:
        parts = flat.split(sizes)
        changed = {
            name: part.view_as(values[name]) for name, part in zip(wanted, parts, strict=True)
        }
        return functional.cross_entropy(
            functional_call(model, values | changed, batch[0]), batch[1]
        )

    return torch.as_tensor(hessian(loss, torch.cat([values[name].flatten() for name in wanted])))


# --- The eigenvalues ---------------------------------------------------------------------------


def test_both_ends_of_the_spectrum(probe: Probe) -> None:
    model, batch = net(), data()
    found = probe(Sharpness(), model, batch)
    spectrum = torch.linalg.eigvalsh(exact_hessian(model, batch))
    assert spectrum[0] < 0 < spectrum[-1]
    assert float(found["sharpness"]) == pytest.approx(float(spectrum[-1]), rel=1e-3)
    assert float(found["smallest_eigenvalue"]) == pytest.approx(float(spectrum[0]), rel=2e-2)
    for end, truth in (("sharpness", spectrum[-1]), ("smallest_eigenvalue", spectrum[0])):
        assert abs(found[end] - truth) <= found[f"{end}_error"]
        assert found[f"{end}_error"] < 0.1 * abs(truth)


class Quadratic(nn.Module):
    """`sum_k curvatures_k w_k² / 2`, the mean over examples that each have their curvatures."""

    def __init__(self, start: Sequence[float] = (1.0, 1.0)) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(start, dtype=torch.float64))

    def forward(self, curvatures: Tensor) -> Tensor:
        return (curvatures * self.weight.square()).sum(1).mean() / 2


def view_of(
    model: nn.Module, batch: Any, optimizer: Optimizer | None = None, **facts: Any
) -> ProbeView:
    batches = LastBatch()
    batches.tell(batch)

    def loss_fn(module: nn.Module, given: Any) -> Tensor:
        loss: Tensor = module(given)
        return loss

    objective = LossFunction(model, loss_fn, batches)
    return ProbeView(model=ModelInfo(**facts), objective=objective, optimizer=optimizer)


def probed(monitor: Monitor, view: ProbeView) -> dict[str, float]:
    with undisturbed(view.last.model):
        return {name: float(value) for name, value in monitor.probe(view).items()}


@pytest.mark.parametrize(
    "curvatures", [(-5.0, 1.0), (1.0, -5.0), (-5.0, -1.0), (5.0, 1.0), (0.0, 0.0), (3.0, 3.0)]
)
def test_the_sign_is_right(curvatures: tuple[float, float]) -> None:
    found = probed(Sharpness(), view_of(Quadratic(), torch.tensor([curvatures] * 4).double()))
    assert found["sharpness"] == pytest.approx(max(curvatures), abs=1e-9)
    assert found["smallest_eigenvalue"] == pytest.approx(min(curvatures), abs=1e-9)


def test_only_what_is_trained_counts() -> None:
    model, batch = net(), data()
    model[0].weight.requires_grad = False
    batches = LastBatch()
    batches.tell(batch)
    objective = LossFunction(
        model, lambda module, given: functional.cross_entropy(module(given[0]), given[1]), batches
    )
    held = frozenset({"2.weight", "0.weight"})
    found = probed(Sharpness(), ProbeView(model=ModelInfo(), objective=objective, optimized=held))
    exact = torch.linalg.eigvalsh(exact_hessian(model, batch, ["2.weight"]))[-1]
    assert found["sharpness"] == pytest.approx(float(exact), rel=1e-6)


def test_activation_checkpoints_change_nothing(probe: Probe) -> None:
    """They compute the forward again in each product, with the parameters of the probe."""

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = net()

        def forward(self, x: Tensor) -> Tensor:
            return torch.as_tensor(checkpoint(self.inner, x, use_reentrant=False))

    plain, checkpointed = (probe(Sharpness(), made(), data()) for made in (net, Checkpointed))
    assert plain.keys() == checkpointed.keys()
    for name, value in plain.items():
        torch.testing.assert_close(checkpointed[name], value, rtol=1e-9, atol=1e-9)


# --- From probe to probe -----------------------------------------------------------------------


def next_products(monitor: Sharpness, probes: dict[str, float], step: StepInfo) -> int:
    needed = probes["sharpness_products"]
    found = Measurement(metric="sharpness_products", scope="model", step=0, value=needed)
    assert not list(monitor.derive(step, [found], ModelInfo()))
    return monitor._next


def test_it_follows_an_eigenvector_with_few_products(step: Step) -> None:
    torch.manual_seed(0)
    curvatures = torch.rand(200).double()
    curvatures[17] = 2.0
    model = Quadratic([1.0] * 200)
    monitor = Sharpness()
    found = probed(monitor, view_of(model, curvatures.expand(4, -1)))
    first = next_products(monitor, found, step())
    assert FEWEST < first <= 20
    curvatures[17] = 1.9
    found = probed(monitor, view_of(model, curvatures.expand(4, -1)))
    assert found["sharpness"] == pytest.approx(1.9, rel=1e-3)
    assert next_products(monitor, found, step()) <= FEWEST + 2 < first


def test_an_eigenvalue_that_has_overtaken_is_found_by_a_new_beginning() -> None:
    curvatures = torch.tensor([[2.0, 1.0, 0.0]] * 4).double()
    model, monitor = Quadratic([1.0, 1.0, 1.0]), Sharpness()
    monitor._vectors = {}
    probed(monitor, view_of(model, curvatures))
    monitor._vectors = {"hessian": [torch.tensor([1.0, 0.0, 0.0]).double()]}
    curvatures[:, 1] = 3.0
    told = [probed(monitor, view_of(model, curvatures))["sharpness"] for _ in range(ANEW)]
    assert told[0] == pytest.approx(2.0), "or this test shows nothing"
    assert told[-1] == pytest.approx(3.0)


def test_a_probe_that_failed_does_not_spoil_the_next_one() -> None:
    model, monitor = Quadratic(), Sharpness()
    bad = torch.full((4, 2), math.nan).double()
    good = torch.tensor([[2.0, 1.0]] * 4).double()
    assert math.isnan(probed(monitor, view_of(model, bad))["sharpness"])
    assert probed(monitor, view_of(model, good))["sharpness"] == pytest.approx(2.0)


def test_products_are_doubled_where_they_did_not_suffice(step: Step) -> None:
    monitor = Sharpness(products=16)
    monitor._next = 3
    assert next_products(monitor, {"sharpness_products": 4.0}, step()) == 6
    assert next_products(monitor, {"sharpness_products": 7.0}, step()) == 12
    assert next_products(monitor, {"sharpness_products": 13.0}, step()) == 16
    assert next_products(monitor, {"sharpness_products": 5.0}, step()) == 6
    assert next_products(monitor, {"sharpness_products": 1.0}, step()) == FEWEST


@pytest.mark.parametrize("products", [1, 0, -3, 2.5, True, "20"])
def test_products_must_be_a_count(products: Any) -> None:
    with pytest.raises(ConfigError, match="products must be a whole number of at least 2, got"):
        Sharpness(products)


# --- As the optimizer sees it ------------------------------------------------------------------

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "adam": lambda p: Adam(p, lr=0.01),
    "adam, weight decay": lambda p: Adam(p, lr=0.01, weight_decay=0.3),
    "adamw": lambda p: AdamW(p, lr=0.01, weight_decay=0.3, betas=(0.5, 0.9)),
    "amsgrad": lambda p: AdamW(p, lr=0.01, amsgrad=True, weight_decay=0.0),
    "rmsprop": lambda p: RMSprop(p, lr=0.01, momentum=0.5, weight_decay=0.2),
    "centered": lambda p: RMSprop(p, lr=0.01, centered=True),
}


def divisors(name: str, optimizer: Optimizer, parameters: Sequence[Tensor]) -> Tensor:
    """What the last step divided by, from that step itself: the update against its momentum."""
    group = optimizer.param_groups[0]
    found = []
    for item in parameters:
        state = optimizer.state[item]
        moved = item.detach() - state["before"]
        if name == "adamw":
            moved = moved + group["lr"] * group["weight_decay"] * state["before"]
        top = state["exp_avg"] if "exp_avg" in state else state.get("momentum_buffer")
        found.append(-group["lr"] * (state["gradient"] if top is None else top) / moved)
    if name == "rmsprop":  # its momentum adds up divided gradients, so the state must tell
        return torch.cat(
            [(optimizer.state[p]["square_avg"].sqrt() + group["eps"]).flatten() for p in parameters]
        )
    return torch.cat([item.flatten() for item in found])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_preconditioner_is_the_one_of_the_step(name: str, probe: Probe) -> None:
    model, batch = net(), data()
    optimizer = OPTIMIZERS[name](model.parameters())
    for _ in range(4):
        optimizer.zero_grad()
        functional.cross_entropy(model(batch[0]), batch[1]).backward()
        before = [item.detach().clone() for item in model.parameters()]
        optimizer.step()
    optimizer_view = {"optimizer": optimizer}
    found = probe(Sharpness(), model, batch, **optimizer_view)
    parameters = list(model.parameters())
    for item, old in zip(parameters, before, strict=True):
        optimizer.state[item]["before"] = old
        assert item.grad is not None
        optimizer.state[item]["gradient"] = item.grad
    root = divisors(name, optimizer, parameters).rsqrt()
    curvature = exact_hessian(model, batch)
    expected = float(torch.linalg.eigvalsh(root[:, None] * curvature * root)[-1])
    assert float(found["preconditioned_sharpness"]) == pytest.approx(expected, rel=2e-3)
    plain = float(torch.linalg.eigvalsh(exact_hessian(model, batch))[-1])
    assert float(found["sharpness"]) == pytest.approx(plain, rel=1e-3)


def test_before_its_first_step_adam_divides_by_nothing_that_is_known(probe: Probe) -> None:
    model = net()
    found = probe(Sharpness(), model, data(), optimizer=Adam(model.parameters()))
    assert "sharpness" in found
    assert "preconditioned_sharpness" not in found


def test_a_parameter_that_has_never_moved_does_not_count() -> None:
    model = nn.Module()
    model.first = nn.Parameter(torch.ones(2).double())
    model.second = nn.Parameter(torch.ones(2).double())
    optimizer = Adam(model.parameters(), lr=0.1)
    model.first.grad = torch.ones(2).double()
    optimizer.step()
    batches = LastBatch()
    batches.tell(torch.zeros(4, 1))

    def loss_fn(module: Any, _: Any) -> Tensor:
        loss: Tensor = module.first.square().sum() + 1e6 * module.second.square().sum()
        return loss

    objective = LossFunction(model, loss_fn, batches)
    view = ProbeView(model=ModelInfo(), objective=objective, optimizer=optimizer)
    divisor = 0.1 * (1.0 + 1e-8)
    assert probed(Sharpness(), view)["preconditioned_sharpness"] == pytest.approx(2 / divisor)


class MyAdam(Adam):
    """Divides by what it likes."""


def test_a_subclass_may_divide_by_something_else(probe: Probe) -> None:
    model, batch = net(), data()
    optimizer = MyAdam(model.parameters())
    functional.cross_entropy(model(batch[0]), batch[1]).backward()
    optimizer.step()
    assert "preconditioned_sharpness" not in probe(Sharpness(), model, batch, optimizer=optimizer)


# --- The scatter over the examples -------------------------------------------------------------


@pytest.mark.parametrize("train_size", [None, 33])
def test_the_variance_over_examples(train_size: int | None) -> None:
    torch.manual_seed(0)
    bends = torch.stack([torch.rand(33) + 3.0, torch.zeros(33)], 1).double()
    model = Quadratic()
    view = view_of(model, bends, SGD(model.parameters(), lr=0.1), train_size=train_size)
    found = probed(Sharpness(), view)
    parts = bends[:32, 0].view(2, 16).mean(0)
    assert found["sharpness_variance"] == pytest.approx(2 * float(parts.var()), rel=1e-9)
    relative = found["sharpness_variance_error"] / found["sharpness_variance"]
    assert relative == pytest.approx((2 / 15) ** 0.5)


def test_a_sorted_batch_has_the_variance_of_its_examples() -> None:
    bends = torch.stack([torch.linspace(1.0, 3.0, 320), torch.zeros(320)], 1).double()
    found = probed(Sharpness(), view_of(Quadratic(), bends))
    assert found["sharpness_variance"] < 2 * float(bends[:, 0].var()), "20 times, of neighbours"


@pytest.mark.parametrize("count", [1, 3])
def test_few_examples_have_no_variance(count: int) -> None:
    bends = torch.ones(count, 2).double()
    assert "sharpness_variance" not in probed(Sharpness(), view_of(Quadratic(), bends))


def test_batch_normalisation_makes_parts_another_loss(probe: Probe) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).double()
    assert "sharpness_variance" not in probe(Sharpness(), model, data())
    model.eval()
    assert "sharpness_variance" in probe(Sharpness(), model, data())


# --- What cannot be measured -------------------------------------------------------------------


def test_half_precision_is_left_out_and_it_is_said() -> None:
    model = nn.Linear(4, 3).to(torch.bfloat16)
    view = view_of(model, torch.randn(4, 4, dtype=torch.bfloat16))
    assert probed(Sharpness(), view) == {}
    assert view.notes == ["sharpness: half precision is too coarse for second derivatives"]


def test_autocast_is_off_in_the_products(probe: Probe) -> None:
    model, batch = net().float(), (data()[0].float(), data()[1])
    plain = probe(Sharpness(), model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = probe(Sharpness(), model, batch)
    assert torch.equal(plain["sharpness"], rounded["sharpness"])


def test_nothing_makes_it_raise(survives: Check) -> None:
    survives(Sharpness, ("sharpness_products",))


def test_in_a_watch_its_values_have_errors_and_units() -> None:
    model, batch = net(), data()
    optimizer = SGD(model.parameters(), lr=0.1)
    watch = gradwatch.watch(
        model,
        optimizer,
        monitors=[Sharpness()],
        loss_fn=lambda module, given: functional.cross_entropy(module(given[0]), given[1]),
        probe_batch=batch,
        every_n_steps=1,
        log_every_n_steps=1,
        budget=None,
        on_error="raise",
    )
    for _ in range(3):
        functional.cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()
        optimizer.zero_grad()
    watch.close()
    told = {item.metric: item for item in watch.summary().measurements}
    assert told["sharpness"].unit == told["smallest_eigenvalue"].unit == "L/P²"
    assert told["sharpness_variance"].unit == "L²/P⁴"
    for metric in ("sharpness", "smallest_eigenvalue", "sharpness_variance"):
        assert told[metric].standard_error is not None


# --- Without second derivatives ----------------------------------------------------------------


class Once(torch.autograd.Function):
    """A square whose derivative cannot be differentiated."""

    @staticmethod
    def forward(context: Any, values: Tensor) -> Tensor:
        context.save_for_backward(values)
        return values.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context: Any, gradient: Tensor) -> Tensor:
        (values,) = context.saved_tensors
        return torch.as_tensor(2 * values * gradient)


class OnceQuadratic(Quadratic):
    @override
    def forward(self, curvatures: Tensor) -> Tensor:
        squares: Tensor = Once.apply(self.weight)  # type: ignore[no-untyped-call]
        return (curvatures * squares).sum(1).mean() / 2


def watched(model: nn.Module, monitor: Sharpness) -> gradwatch.Watch:
    batch = torch.tensor([[2.0, -1.0]] * 4).double()
    optimizer = SGD(model.parameters(), lr=0.1)
    watch = gradwatch.watch(
        model,
        optimizer,
        monitors=[monitor, EdgeOfStability()],
        every_n_steps=1,
        log_every_n_steps=1,
        budget=None,
        loss_fn=lambda module, given: module(given),
    )
    for _ in range(4):
        model(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    watch.close()
    return watch


def test_finite_differences_need_none_and_decide_nothing() -> None:
    without = watched(OnceQuadratic(), Sharpness())
    (failure,) = without.failures.values()
    assert "Sharpness(finite_differences=True)" in failure
    watch = watched(OnceQuadratic(), Sharpness(finite_differences=True))
    assert not watch.failures
    told = {item.metric: item for item in watch.summary().measurements}
    assert told["sharpness"].value == pytest.approx(2.0, rel=1e-6)
    assert told["smallest_eigenvalue"].value == pytest.approx(-1.0, rel=1e-6)
    assert told["sharpness"].source == "finite differences"
    assert told["sharpness"].standard_error is None
    assert "sharpness_variance" not in told
    assert {item.status for item in watch.summary().verdicts} == {"undecided"}


def test_finite_differences_draw_the_same_masks(probe: Probe) -> None:
    model = net()
    model.insert(1, nn.Dropout(0.5))
    exact, differences = (
        probe(Sharpness(finite_differences=given), model, data()) for given in (False, True)
    )
    # The exact one draws its masks once and so do the differences, perhaps others.
    assert 0.2 < float(differences["sharpness"] / exact["sharpness"]) < 5


@pytest.mark.parametrize("given", [1, None, "yes"])
def test_finite_differences_are_on_or_off(given: Any) -> None:
    with pytest.raises(ConfigError, match="finite_differences must be True or False, got"):
        Sharpness(finite_differences=given)


def test_a_large_network_keeps_no_vectors(probe: Probe, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = net(), data()
    small = probe(Sharpness(), model, batch)
    monkeypatch.setattr("gradwatch.monitors.sharpness.LARGEST_BASIS", 100)
    monitor = Sharpness()
    large = probe(monitor, model, batch)
    assert float(large["sharpness"]) == pytest.approx(float(small["sharpness"]), rel=1e-3)
    assert not monitor._vectors
    assert "sharpness_variance" in small
    assert "sharpness_variance" not in large


def test_a_batch_that_shows_no_examples_has_a_curvature() -> None:
    bends = torch.tensor([[2.0, 1.0]] * 4).double()
    model = Quadratic()
    batches = LastBatch()
    batches.tell({"graph": object()})
    objective = LossFunction(model, lambda module, _: module(bends), batches)
    monitor = Sharpness()
    found = probed(monitor, ProbeView(model=ModelInfo(), objective=objective))
    assert found["sharpness"] == pytest.approx(2.0)
    assert math.isnan(monitor._inputs["examples"])

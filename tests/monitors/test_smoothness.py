"""Smoothness: secants of known losses, and what others learn of them."""

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradwatch.capture.probe.batch import LastBatch
from gradwatch.capture.probe.objective import LossFunction
from gradwatch.capture.view import NamedValues, StepView
from gradwatch.interfaces import Monitor
from gradwatch.monitors import Smoothness
from gradwatch.monitors.smoothness import SECANTS, KnownSmoothness
from gradwatch.records import Measurement, ModelInfo, StepInfo

Probe = Callable[..., dict[str, Tensor]]
Step = Callable[..., StepInfo]
Measured = Callable[..., list[Measurement]]
Check = Callable[[Callable[[], Monitor], Sequence[str]], None]

BATCH = (torch.zeros(2, 1), torch.zeros(2))
CURVATURES = torch.tensor([1.0, 4.0, 9.0])


class Bowl(nn.Module):
    """Called with anything it gives its parameter, in the type that it is kept in."""

    def __init__(self, *values: float, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.point = nn.Parameter(torch.tensor(values, dtype=dtype))

    def forward(self, _: Tensor) -> Tensor:
        return self.point


def bowl(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    point: Tensor = model(batch[0])
    return (CURVATURES.to(point.dtype) * point.square()).sum() / 2


def objective(model: nn.Module, loss_fn: Callable[[nn.Module, Any], Tensor] = bowl) -> LossFunction:
    batches = LastBatch()
    batches.tell(BATCH)
    return LossFunction(model, loss_fn, batches)


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1), 1e-4])
def test_along_an_eigenvector_it_is_the_eigenvalue(probe: Probe, lr: float | Tensor) -> None:
    model = Bowl(0.0, 0.0, 2.0)
    found = probe(Smoothness(), model, BATCH, objective=objective(model), lr=lr)
    assert float(found["smoothness_secant"]) == pytest.approx(9.0, rel=1e-6)


def test_elsewhere_it_is_between_the_eigenvalues(probe: Probe) -> None:
    model = Bowl(1.0, 1.0, 1.0)
    found = probe(Smoothness(), model, BATCH, objective=objective(model))
    gradient = CURVATURES.double()
    expected = (CURVATURES * gradient).norm() / gradient.norm()
    assert float(found["smoothness_secant"]) == pytest.approx(float(expected), rel=1e-6)


def test_the_fixed_probe_batch_comes_first(probe: Probe) -> None:
    model = Bowl(0.0, 0.0, 2.0)
    fixed = objective(model, lambda module, batch: 3 * bowl(module, batch))
    found = probe(Smoothness(), model, BATCH, objective=objective(model), fixed_objective=fixed)
    assert float(found["smoothness_secant"]) == pytest.approx(27.0, rel=1e-6)


def test_the_gradient_is_compared_with_that_of_a_step_only_on_the_same_batch(
    probe: Probe,
) -> None:
    model = Bowl(1.0, 1.0, 1.0)
    found = probe(Smoothness(), model, BATCH, objective=objective(model))
    assert float(found["smoothness_gradient_square"]) == pytest.approx(1 + 16 + 81)
    assert float(found["smoothness_examples"]) == 2.0
    fixed = probe(
        Smoothness(), model, BATCH, objective=objective(model), fixed_objective=objective(model)
    )
    assert set(fixed) == {"smoothness_secant"}


def test_both_gradients_are_of_the_same_masks(probe: Probe) -> None:
    """A loss that is linear in the weights for fixed masks has no curvature."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(20, 1)).double()
    inputs = torch.randn(8, 20).double()
    straight = LossFunction(
        model, lambda module, batch: module(batch[0]).mean(), LastBatch(), (inputs, None)
    )
    found = probe(Smoothness(), model, BATCH, objective=straight)
    assert float(found["smoothness_secant"]) < 1e-12


def test_without_a_step_there_is_no_secant(probe: Probe) -> None:
    model = Bowl(0.0, 0.0, 2.0)
    for lr in (None, 0.0):
        assert probe(Smoothness(), model, BATCH, objective=objective(model), lr=lr) == {}
    still = probe(Smoothness(), model, BATCH, objective=objective(model), lr=torch.tensor(0.0))
    assert math.isnan(still["smoothness_secant"])


def test_half_precision_is_too_coarse(probe: Probe) -> None:
    model, notes = Bowl(0.0, 0.0, 2.0, dtype=torch.bfloat16), list[str]()
    assert probe(Smoothness(), model, BATCH, objective=objective(model), notes=notes) == {}
    assert any("half precision" in note for note in notes)


def test_what_was_probed_is_read() -> None:
    given = StepView(
        step=0,
        model=ModelInfo(),
        gradient_norms=NamedValues((), torch.zeros(0)),
        probed={"smoothness_secant": torch.tensor(2.0)},
    )
    (found,) = Smoothness().read(given)
    assert (found.metric, float(found.values), found.unit) == ("smoothness_secant", 2.0, "L/P²")
    given.probed = {}
    assert list(Smoothness().read(given)) == []


def test_smoothness_is_the_largest_of_the_newest_secants(step: Step, measured: Measured) -> None:
    monitor = Smoothness()
    found = [
        (item.value, item.source)
        for number, value in enumerate([2.0, 5.0, math.nan, 3.0])
        for item in monitor.derive(step(number), measured(smoothness_secant=value), ModelInfo())
    ]
    assert found == [(2.0, SECANTS), (5.0, SECANTS), (5.0, SECANTS)]
    later = [
        item.value
        for number in range(4, 25)
        for item in monitor.derive(step(number), measured(smoothness_secant=1.0), ModelInfo())
    ]
    assert later == [5.0] * 18 + [3.0] + [1.0] * 2  # 20 are kept
    assert list(monitor.derive(step(9), [], ModelInfo())) == []


def test_a_skipped_step_says_nothing(step: Step, measured: Measured) -> None:
    values = measured(smoothness_secant=9.0)
    assert list(Smoothness().derive(step(0, skipped=True), values, ModelInfo())) == []


def test_sharpness_is_preferred_to_secants(measured: Measured) -> None:
    known = KnownSmoothness()
    assert math.isnan(known.value)
    known.learn(measured(smoothness=5.0, smoothness_secant=3.0))
    known.learn(measured(smoothness_secant=7.0))
    assert (known.value, known.is_secant, known.source) == (5.0, True, SECANTS)
    known.learn(measured(sharpness=4.0))
    known.learn(measured(sharpness=3.0, smoothness_secant=6.0))
    assert (known.value, known.is_secant) == (3.0, False)
    copy = KnownSmoothness()
    copy.load_state_dict(json.loads(json.dumps(known.state_dict())))
    assert (copy.value, copy.source) == (known.value, known.source)


def test_no_values_make_it_raise(survives: Check) -> None:
    survives(Smoothness, ("smoothness_secant",))


def test_it_resumes(resumes: Check) -> None:
    resumes(Smoothness, ("smoothness_secant",))

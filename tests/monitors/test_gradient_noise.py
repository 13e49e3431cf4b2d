"""GradientNoise: its three sources, and the noise scale that it derives."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from gradwatch.capture.view import AdamMoments, IndependentGradients, NamedValues, StepView
from gradwatch.interfaces import Monitor
from gradwatch.monitors import GradientNoise
from gradwatch.numerics.reading import Reading
from gradwatch.records import Measurement, ModelInfo, StepInfo

METRICS = ("gradient_square", "gradient_variance")
PARTS, HALVES, ADAM = "4 micro-batches", "two halves of the batch", "the state of Adam"

Probe = Callable[..., dict[str, Tensor]]
Step = Callable[..., StepInfo]
Measured = Callable[..., list[Measurement]]
Check = Callable[[Callable[[], Monitor], Sequence[str]], None]


def view(**changes: Any) -> StepView:
    fields: dict[str, Any] = {
        "step": 0,
        "model": ModelInfo(),
        "gradient_norms": NamedValues((), torch.zeros(0)),
        "batch_size": 32,
    }
    return StepView(**{**fields, **changes})


MICROBATCHES = IndependentGradients(torch.tensor(2.0), torch.tensor(1.0), 0.25, PARTS)
MOMENTS = AdamMoments(torch.tensor(1.0), torch.tensor(3.0), 0.1 / 1.9)
PROBED = {
    "noise_halves_product": torch.tensor(0.5),
    "noise_halves_difference": torch.tensor(7.0),
}


def read(given: StepView, monitor: GradientNoise | None = None) -> dict[str, tuple[Any, str]]:
    readings: list[Reading] = list((monitor or GradientNoise()).read(given))
    return {item.metric: (float(item.values), item.source) for item in readings}


def test_the_parts_of_the_step_come_first() -> None:
    found = read(view(independent_gradients=MICROBATCHES, probed=PROBED, adam_moments=MOMENTS))
    assert found["gradient_square"] == (pytest.approx(4 / 3), PARTS)
    assert found["gradient_variance"] == (pytest.approx(32 * 2 / 3), PARTS)


def test_then_two_halves() -> None:
    found = read(view(probed=PROBED, adam_moments=MOMENTS))
    assert found == {"gradient_square": (0.5, HALVES), "gradient_variance": (7.0, HALVES)}


def test_then_the_state_of_adam() -> None:
    found = read(view(adam_moments=MOMENTS))
    assert found["gradient_variance"] == (pytest.approx(67.5555556), ADAM)
    assert found["gradient_square"] == (pytest.approx(0.8888889), ADAM)


def test_sizes_may_be_tensors() -> None:
    parts = IndependentGradients(torch.tensor(2.0), torch.tensor(1.0), torch.tensor(0.25), PARTS)
    found = read(view(independent_gradients=parts, batch_size=torch.tensor(32)))
    assert found["gradient_variance"] == (pytest.approx(32 * 2 / 3), PARTS)


def test_without_a_batch_size_there_is_no_variance_of_a_sample() -> None:
    blind = view(independent_gradients=MICROBATCHES, batch_size=None)
    assert set(read(blind)) == {"gradient_square"}
    assert any("watch.observe(batch_size=...)" in note for note in blind.notes)


def test_without_any_source_it_says_what_would_give_one() -> None:
    blind = view(independent_gradients_unavailable="the gradient before clipping is unknown")
    assert read(blind) == {}
    (note,) = blind.notes
    for wanted in ("before clipping", "micro-batches", "ranks", "loss_fn", "Adam"):
        assert wanted in note


def test_a_step_without_a_probe_is_no_reason_to_complain_where_one_is_to_come() -> None:
    between = view(loss_can_be_probed=True)
    assert read(between) == {}
    assert between.notes == []


def test_the_probe_takes_two_halves_of_equal_size(probe: Probe) -> None:
    torch.manual_seed(0)
    model, inputs, targets = nn.Linear(3, 2), torch.randn(7, 3), torch.tensor([0, 1, 0, 1, 1, 0, 1])
    found = probe(GradientNoise(), model, (inputs, targets))
    first, second = (
        torch.cat(
            [
                item.flatten()
                for item in torch.autograd.grad(
                    functional.cross_entropy(model(inputs[rows]), targets[rows]),
                    list(model.parameters()),
                )
            ]
        )
        for rows in (slice(3), slice(3, 6))
    )
    torch.testing.assert_close(found["noise_halves_product"], first @ second)
    torch.testing.assert_close(
        found["noise_halves_difference"], 1.5 * (first - second).square().sum()
    )


def test_the_probe_is_unbiased(probe: Probe) -> None:
    """Against the gradient over all data and the variance of single examples."""
    torch.manual_seed(1)
    model, inputs = nn.Linear(3, 2).double(), torch.randn(30, 3).double() + 0.5
    targets = (inputs[:, 0] > 1.0).long()
    each = torch.stack([gradient_of(model, inputs[[i]], targets[[i]]) for i in range(30)])
    truth = {
        "noise_halves_product": each.mean(0).square().sum(),
        "noise_halves_difference": (each - each.mean(0)).square().sum(1).mean(),
    }
    monitor, found = GradientNoise(), []
    for _ in range(300):
        rows = torch.randint(30, (8,))
        found.append(probe(monitor, model, (inputs[rows], targets[rows])))
    for name, expected in truth.items():
        values = torch.stack([item[name] for item in found])
        error = values.std() / 300**0.5
        assert abs(values.mean() - expected) < 3 * error
        assert error < 0.1 * expected


def gradient_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    loss = functional.cross_entropy(model(inputs), targets)
    return torch.cat([x.flatten() for x in torch.autograd.grad(loss, list(model.parameters()))])


def test_it_probes_only_where_there_is_need_and_use(probe: Probe) -> None:
    model, inputs, targets = nn.Linear(3, 2), torch.randn(4, 3), torch.zeros(4, dtype=torch.long)
    assert probe(GradientNoise(), model, (inputs, targets), independent_gradients=2) == {}
    notes: list[str] = []
    assert probe(GradientNoise(), model, (inputs[:1], targets[:1]), notes=notes) == {}
    assert any("one example" in note for note in notes)


def feed(
    monitor: GradientNoise,
    step: Step,
    values: Sequence[list[Measurement]],
    **settings: Any,
) -> list[Measurement]:
    """What is derived from the last of several steps."""
    found: list[Measurement] = []
    for number, measurements in enumerate(values):
        found = list(monitor.derive(step(number, **settings), measurements, ModelInfo()))
    return found


def noisy(
    measured: Measured, count: int, square: float, source: str = PARTS, seed: int = 0
) -> list[list[Measurement]]:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, 2, generator=generator).tolist()
    return [
        measured(source, gradient_square=square + one, gradient_variance=40.0 + 5 * two)
        for one, two in noise
    ]


def test_the_noise_scale_is_a_ratio_of_means(step: Step, measured: Measured) -> None:
    (found,) = feed(GradientNoise(), step, noisy(measured, 200, square=2.0))
    assert (found.metric, found.unit, found.source) == ("noise_scale", "sample", PARTS)
    inputs = found.inputs
    assert found.value == pytest.approx(inputs["gradient_variance"] / inputs["gradient_square"])
    assert found.standard_error is not None
    assert abs(found.value - 20.0) < 3 * found.standard_error
    assert found.standard_error == pytest.approx(20 / 2 / 200**0.5, rel=0.5)
    assert inputs["estimates"] == 200
    assert inputs["gradient_square_error"] == pytest.approx(200**-0.5, rel=0.5)
    assert inputs["variance_median"] == pytest.approx(40, rel=0.05)
    assert (inputs["batch_size"], inputs["step_of_adam"], inputs["clipped_share"]) == (32, 0, 0)


def test_it_waits_for_fifty_readings(step: Step, measured: Measured) -> None:
    values = noisy(measured, 50, square=5.0)
    assert feed(GradientNoise(), step, values[:49]) == []
    assert [item.metric for item in feed(GradientNoise(), step, values)] == ["noise_scale"]


def test_a_gradient_lost_in_the_noise_gives_a_lower_limit(step: Step, measured: Measured) -> None:
    (found,) = feed(GradientNoise(), step, noisy(measured, 60, square=-0.1))
    assert found.metric == "noise_scale_at_least"
    assert found.standard_error is None
    inputs = found.inputs
    largest = max(inputs["gradient_square"], 0.0) + 2 * inputs["gradient_square_error"]
    assert found.value == pytest.approx(inputs["gradient_variance"] / largest)
    assert found.value == pytest.approx(40 / (2 / 60**0.5), rel=0.5)


def test_the_lower_limit_is_below_the_truth(step: Step, measured: Measured) -> None:
    """In 95 % of the cases; 40/0.02 is the truth, and 50 readings do not show the square."""
    limits = []
    for seed in range(60):
        values = noisy(measured, 50, square=0.02, seed=seed)
        found = feed(GradientNoise(), step, values)
        limits += [item.value for item in found if item.metric == "noise_scale_at_least"]
    assert len(limits) > 45
    assert max(limits) < 40 / 0.02


def test_the_lower_limit_is_not_above_the_number_of_samples(step: Step, measured: Measured) -> None:
    monitor, found = GradientNoise(), list[Measurement]()
    for number, values in enumerate(noisy(measured, 60, square=-0.1)):
        found = list(monitor.derive(step(number), values, ModelInfo(train_size=100)))
    assert [item.value for item in found] == [100.0]


def test_a_negative_variance_limits_nothing(step: Step, measured: Measured) -> None:
    values = [measured(gradient_square=(-1.0) ** k, gradient_variance=-1.0) for k in range(60)]
    assert feed(GradientNoise(), step, values) == []


def test_the_two_halves_of_the_window_are_compared(step: Step, measured: Measured) -> None:
    values = [
        measured(gradient_square=0.5 if k < 30 else 0.25, gradient_variance=20.0) for k in range(60)
    ]
    (found,) = feed(GradientNoise(), step, values)
    assert found.inputs["halves_ratio"] == pytest.approx(2.0)
    values[0] = measured(gradient_square=-15.0, gradient_variance=20.0)
    (found,) = feed(GradientNoise(), step, values)
    assert math.isnan(found.inputs["halves_ratio"])


def test_neighbouring_readings_of_adam_are_one(step: Step, measured: Measured) -> None:
    """With beta2 0.99 the state remembers 100 steps, so that every fifth one counts."""
    betas, values = (0.9, 0.99), noisy(measured, 246, square=5.0, source=ADAM)
    assert feed(GradientNoise(), step, values[:-1], betas=betas) == []
    (found,) = feed(GradientNoise(), step, values, betas=betas)
    assert found.inputs["estimates"] == 50
    wide, last = GradientNoise(), list[Measurement]()
    for number, item in enumerate(values[:50]):  # sampled every fifth step already
        last = list(wide.derive(step(5 * number, betas=betas), item, ModelInfo()))
    assert last[0].inputs["estimates"] == 50


def test_adam_with_the_usual_decay_counts_every_fiftieth_step(
    step: Step, measured: Measured
) -> None:
    for betas in ((0.9, 0.999), None, (0.9, math.nan)):
        monitor = GradientNoise()
        feed(monitor, step, noisy(measured, 101, square=5.0, source=ADAM), betas=betas)
        assert len(monitor.state_dict()["sources"][ADAM]["window"]) == 3


def test_the_window_forgets_the_oldest(step: Step, measured: Measured) -> None:
    old, new = noisy(measured, 300, square=100.0), noisy(measured, 200, square=2.0)
    (found,) = feed(GradientNoise(), step, [*old, *new])
    assert found.inputs["gradient_square"] == pytest.approx(2.0, abs=0.3)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_does_not_enter(step: Step, measured: Measured, bad: float) -> None:
    values = noisy(measured, 60, square=5.0)
    values[30] = measured(PARTS, gradient_square=bad, gradient_variance=1.0)
    (found,) = feed(GradientNoise(), step, values)
    assert found.inputs["estimates"] == 59


def test_a_skipped_step_does_not_enter(step: Step, measured: Measured) -> None:
    assert feed(GradientNoise(), step, noisy(measured, 60, square=5.0), skipped=True) == []


def test_readings_of_two_sources_are_never_mixed(step: Step, measured: Measured) -> None:
    """Adam's state in every step, and a probe in every third one."""
    adam = noisy(measured, 180, square=5.0, source=ADAM)
    halves = noisy(measured, 60, square=50.0, source=HALVES)
    mixed = [halves[i // 3] if i % 3 == 0 else adam[i] for i in range(180)]
    (early,) = feed(GradientNoise(), step, mixed[:120], betas=(0.9, 0.9))
    assert (early.source, early.inputs["step_of_adam"]) == (ADAM, 1.0)
    assert early.inputs["gradient_square"] == pytest.approx(5.0, abs=1.0)
    (late,) = feed(GradientNoise(), step, mixed, betas=(0.9, 0.9))
    assert (late.source, late.inputs["step_of_adam"]) == (HALVES, 0.0)
    assert late.inputs["gradient_square"] == pytest.approx(50.0, abs=1.0)


def test_a_source_that_has_ended_is_forgotten(step: Step, measured: Measured) -> None:
    parts = noisy(measured, 60, square=50.0)
    adam = noisy(measured, 200, square=5.0, source=ADAM)
    short = {"betas": (0.9, 0.9)}
    assert feed(GradientNoise(), step, [*parts, *adam[:-1]], **short)[0].source == PARTS
    assert feed(GradientNoise(), step, [*parts, *adam], **short)[0].source == ADAM


def test_micro_batches_of_another_number_are_the_same_source(
    step: Step, measured: Measured
) -> None:
    values = noisy(measured, 60, square=5.0)
    values[-1] = measured("2 micro-batches", gradient_square=5.0, gradient_variance=40.0)
    (found,) = feed(GradientNoise(), step, values)
    assert (found.inputs["estimates"], found.source) == (60, "2 micro-batches")


@pytest.mark.parametrize(("clipped", "share"), [(True, 1.0), (False, 0.0), (None, math.nan)])
def test_the_share_of_clipped_steps(
    step: Step, measured: Measured, clipped: bool | None, share: float
) -> None:
    (found,) = feed(GradientNoise(), step, noisy(measured, 60, square=5.0), grads_clipped=clipped)
    assert found.inputs["clipped_share"] == pytest.approx(share, nan_ok=True)


def test_no_values_make_it_raise(survives: Check) -> None:
    survives(GradientNoise, METRICS)


def test_it_resumes(resumes: Check) -> None:
    resumes(GradientNoise, METRICS)


def test_a_long_run_needs_no_more_memory(step: Step, measured: Measured) -> None:
    monitor = GradientNoise()
    feed(monitor, step, noisy(measured, 250, square=5.0))
    size = len(str(monitor.state_dict()["sources"][HALVES]))
    windows = [len(item["window"]) for item in monitor.state_dict()["sources"].values()]
    assert sorted(windows) == [0, 0, 200]
    assert size < 100

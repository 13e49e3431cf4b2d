"""The noise monitors against exact values: softmax regression on digits with frozen weights.

Each test is one experiment; the numbers it compares are those of its table row. The learning rate
is 0, or the weights are put back after each step, so that every step is one more draw.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

import gradwatch
from gradwatch.monitors import GradientNoise, NoiseCurvature
from gradwatch.theory import lr_batch_ratio as theory

PAGE = "Learning-rate / batch-size ratio"

pytestmark = pytest.mark.usefixtures("one_thread")

Verify = Callable[..., None]
Batch = tuple[Tensor, Tensor]


def digits(rows: int) -> Batch:
    """Pixels in [0, 1] and labels of the first digits."""
    datasets = pytest.importorskip("sklearn.datasets")
    pixels, labels = (torch.as_tensor(part) for part in datasets.load_digits(return_X_y=True))
    return pixels[:rows].double() / 16, labels[:rows]


def regression() -> nn.Linear:
    """Softmax regression with W = 0.1 randn."""
    with torch.random.fork_rng(devices=[]):
        model = nn.Linear(64, 10, bias=False, dtype=torch.float64)
        torch.manual_seed(0)
        with torch.no_grad():
            model.weight.copy_(0.1 * torch.randn(10, 64, dtype=torch.float64))
    return model


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    return cross_entropy(model(batch[0]), batch[1])


@dataclass(frozen=True)
class Exact:
    """What the monitors estimate, from the gradient of every single sample.

    Attributes:
        square: `||G||²`.
        variance: `tr Sigma`.
        along_gradient: `G^T H G`.
        along_noise: `tr(H Sigma)`.
    """

    square: float
    variance: float
    along_gradient: float
    along_noise: float

    @classmethod
    def of(cls, model: nn.Linear, data: Batch) -> "Exact":
        inputs, labels = data
        weights = model.weight.detach().flatten()
        errors = torch.softmax(inputs @ model.weight.detach().T, 1) - one_hot(labels, 10)
        each = torch.einsum("no,ni->noi", errors, inputs).flatten(1)
        mean = each.mean(0)
        covariance = (each - mean).T @ (each - mean) / len(each)

        def loss(point: Tensor) -> Tensor:
            return cross_entropy(inputs @ point.view(10, 64).T, labels)

        hessian: Any = torch.autograd.functional.hessian(loss, weights)
        return cls(
            float(mean @ mean),
            float(covariance.trace()),
            float(mean @ hessian @ mean),
            float((hessian * covariance).sum()),
        )


def readings(told: gradwatch.MemorySink, metric: str) -> Tensor:
    found = [
        item.value
        for report in told.reports
        for item in report.measurements
        if item.metric == metric
    ]
    return torch.tensor(found, dtype=torch.float64)


def draw(
    data: Batch,
    sizes: Sequence[int],
    steps: int,
    monitors: Sequence[gradwatch.Monitor],
    lr: float = 0.0,
    after: Callable[[nn.Linear], object] = lambda _: None,
) -> tuple[gradwatch.Watch, gradwatch.MemorySink]:
    """Steps of independent draws with replacement, in micro-batches of these sizes."""
    model, told = regression(), gradwatch.MemorySink()
    optimizer = torch.optim.SGD(model.parameters(), lr)
    watch = gradwatch.watch(
        model,
        optimizer,
        monitors=monitors,
        sinks=[told],
        every_n_steps=1,
        log_every_n_steps=100,
        loss_fn=loss_fn,
        budget=None,
        on_error="raise",
    )
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        rows = torch.randint(len(data[0]), (sum(sizes),), generator=generator)
        watch.observe(batch=(data[0][rows], data[1][rows]))
        for part in rows.split(list(sizes)):
            loss = loss_fn(model, (data[0][part], data[1][part]))
            (loss * len(part) / len(rows)).backward()
        optimizer.step()
        optimizer.zero_grad()
        after(model)
    watch.close()
    return watch, told


def test_v3_v9_the_exact_values_are_those_of_the_page(verify: Verify) -> None:
    large, small = (Exact.of(regression(), digits(rows)) for rows in (1437, 400))
    for experiment, what, page, exact in (
        ("V3", "||G||²", 0.31949, large.square),
        ("V3", "tr Sigma", 13.1708, large.variance),
        ("V3", "B_simple", 41.225, theory.simple_noise_scale(large.variance, large.square)),
        ("V9", "G^T H G", 0.21723, small.along_gradient),
        ("V9", "tr(H Sigma)", 10.2025, small.along_noise),
        (
            "V9",
            "B_noise",
            46.97,
            theory.curvature_noise_scale(small.along_noise, small.along_gradient),
        ),
        ("V9", "B_simple", 35.87, theory.simple_noise_scale(small.variance, small.square)),
    ):
        verify(
            experiment,
            f"exact {what}",
            expected=page,
            measured=exact,
            tolerance=("relative", 1e-4),
        )


def within_errors(
    verify: Verify, experiment: str, what: str, expected: float, draws: Tensor
) -> None:
    """Three standard errors of the mean of independent draws."""
    verify(
        experiment,
        f"{what}, within 3 standard errors",
        expected=expected,
        measured=float(draws.mean()),
        tolerance=("absolute", 3 * float(draws.std()) / math.sqrt(len(draws))),
    )


def agrees(
    verify: Verify, experiment: str, what: str, expected: float, found: gradwatch.Measurement
) -> None:
    """Three of the standard errors that the monitor itself gives."""
    assert found.standard_error
    verify(
        experiment,
        f"{what}, within 3 of its standard errors",
        expected=expected,
        measured=found.value,
        tolerance=("absolute", 3 * found.standard_error),
    )


DRAWS = {"4 x 16": [16] * 4, "8 x 8": [8] * 8, "halves of 16": [32], "halves of 32": [64]}
STEPS = 3000


@pytest.mark.slow
@pytest.mark.parametrize("kind", DRAWS)
def test_v3_v4_noise_scale(verify: Verify, kind: str) -> None:
    data = digits(1437)
    exact = Exact.of(regression(), data)
    scale = theory.simple_noise_scale(exact.variance, exact.square)
    watch, told = draw(data, DRAWS[kind], STEPS, [GradientNoise()])
    squares, variances = (
        readings(told, metric) for metric in ("gradient_square", "gradient_variance")
    )
    assert len(squares) == len(variances) == STEPS
    within_errors(verify, "V3", f"||G||², {kind}", exact.square, squares)
    within_errors(verify, "V3", f"tr Sigma, {kind}", exact.variance, variances)
    verify(
        "V4",
        f"ratio of means, {kind}",
        expected=scale,
        measured=float(variances.mean() / squares.mean()),
        tolerance=("relative", 0.05),
    )
    agrees(verify, "V4", f"noise scale of the newest 200, {kind}", scale, newest(watch))
    if kind == "8 x 8":  # with fewer samples squares of both signs come near 0
        verify(
            "V4",
            f"1.2 x B_simple is below the mean of ratios, {kind}",
            expected=float((variances / squares).mean()),
            measured=1.2 * scale,
            tolerance="at_most",
        )


def newest(watch: gradwatch.Watch, metric: str = "noise_scale") -> gradwatch.Measurement:
    return next(item for item in watch.summary().measurements if item.metric == metric)


@pytest.mark.slow
def test_v9_curvature_of_the_noise(verify: Verify) -> None:
    data = digits(400)
    exact = Exact.of(regression(), data)
    watch, told = draw(data, [48], STEPS, [GradientNoise(), NoiseCurvature()])
    along_gradient, along_noise = (
        readings(told, metric) for metric in ("gradient_curvature", "noise_curvature")
    )
    scale = theory.curvature_noise_scale(exact.along_noise, exact.along_gradient)
    for what, expected, measured in (
        ("G^T H G", exact.along_gradient, along_gradient.mean()),
        ("tr(H Sigma)", exact.along_noise, along_noise.mean()),
        ("B_noise", scale, along_noise.mean() / along_gradient.mean()),
    ):
        verify(
            "V9",
            f"{what}, thirds of 16",
            expected=expected,
            measured=float(measured),
            tolerance=("relative", 0.1),
        )
    within_errors(verify, "V9", "G^T H G, thirds of 16", exact.along_gradient, along_gradient)
    within_errors(verify, "V9", "tr(H Sigma), thirds of 16", exact.along_noise, along_noise)
    found = newest(watch, "noise_scale_curvature")
    agrees(verify, "V9", "B_noise of the newest 200", scale, found)


@pytest.mark.slow
@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0, 3.0])
def test_v10_real_steps(verify: Verify, factor: float) -> None:
    """The change of the loss by one step, and what the stall ratio says of it."""
    data, start = digits(400), regression()
    exact = Exact.of(start, data)
    best = theory.optimal_step(
        theory.noiseless_step(exact.square, exact.along_gradient),
        theory.curvature_noise_scale(exact.along_noise, exact.along_gradient),
        16,
    )
    changes = [-float(loss_fn(start, data).detach())] * 1000
    place = iter(range(1000))

    def put_back(model: nn.Linear) -> None:
        with torch.no_grad():
            changes[next(place)] += float(cross_entropy(data[0] @ model.weight.T, data[1]))
            model.weight.copy_(start.weight)

    watch, _ = draw(data, [16], 1000, [GradientNoise(), NoiseCurvature()], factor * best, put_back)
    change = sum(changes) / len(changes)
    predicted = theory.expected_loss_change(
        factor * best, exact.square, exact.along_gradient, exact.along_noise, 16
    )
    if factor <= 1:
        verify(
            "V10",
            f"change of the loss by a step of {factor} eps_opt",
            expected=predicted,
            measured=change,
            tolerance=("relative", 0.1),
        )
    verify(
        "V10",
        f"sign of the change of the loss by a step of {factor} eps_opt",
        expected=-1.0 if factor < 2 else 1.0,
        measured=math.copysign(1.0, change),
        tolerance=("absolute", 0),
    )
    stall = newest(watch, "stall_ratio")
    agrees(verify, "V10", f"stall ratio of a step of {factor} eps_opt", factor / 2, stall)
    assert (stall.standard_error or math.inf) < 0.15 * stall.value

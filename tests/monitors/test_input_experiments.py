"""Centring the inputs, on digits, through the monitors and the rule.

Each test is one experiment; the numbers it compares are those of its table row.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import gradwatch
from gradwatch.monitors import InputStatistics, Smoothness
from gradwatch.rules import DataScale

PAGE = "Gradient convergence"

pytestmark = [pytest.mark.usefixtures("one_thread")]

Verify = Callable[..., None]
Batch = tuple[Tensor, Tensor]


def digits(*, centred: bool) -> Batch:
    datasets = pytest.importorskip("sklearn.datasets")
    pixels, labels = (torch.as_tensor(part) for part in datasets.load_digits(return_X_y=True))
    inputs = pixels.float() / 16
    return inputs - inputs.mean(0) if centred else inputs, labels


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    return cross_entropy(model(batch[0]), batch[1])


def train(
    data: Batch, batch: int, steps: int, *monitors: gradwatch.Monitor
) -> tuple[gradwatch.Watch, float, float]:
    """The watch, the largest smoothness of the run, and the loss at its end."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    optimizer, told = torch.optim.SGD(model.parameters(), 0.1), gradwatch.MemorySink()
    watch = gradwatch.watch(
        model,
        optimizer,
        monitors=monitors,
        rules=[DataScale()],
        sinks=[told],
        every_n_steps=1,
        log_every_n_steps=10,
        loss_fn=loss_fn,
        probe_batch=data,
        budget=None,
        on_error="raise",
    )
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        rows = torch.randint(len(data[0]), (batch,), generator=generator)
        some = data if batch == len(data[0]) else (data[0][rows], data[1][rows])
        watch.observe(batch=some)
        loss_fn(model, some).backward()
        optimizer.step()
        optimizer.zero_grad()
    watch.close()
    largest = max((report.value("smoothness") or 0.0 for report in told.reports), default=0.0)
    return watch, largest, float(loss_fn(model, data).detach())


@pytest.mark.parametrize(("centred", "page"), [(False, 10.455), (True, 0.699)])
def test_t7_second_moment_of_all_inputs(verify: Verify, centred: bool, page: float) -> None:
    data = digits(centred=centred)
    watch, _, _ = train(data, len(data[0]), 10, InputStatistics())
    what = "centred" if centred else "raw"
    verify(
        "T7",
        f"lambda_max(E x x^T), {what}",
        expected=page,
        measured=watch.summary().value("input_top_eigenvalue") or 0.0,
        tolerance=("relative", 1e-3),
    )
    verify(
        "T7",
        f"share of the mean in it, {what}",
        expected=0.0 if centred else 0.987,
        measured=watch.summary().value("input_mean_share") or 0.0,
        tolerance=("absolute", 0.005),
    )


@pytest.mark.parametrize("batch", [32, 128])
def test_t7_the_advice_is_for_raw_inputs(batch: int) -> None:
    raw, centred = (
        train(digits(centred=item), batch, 30, InputStatistics())[0] for item in (False, True)
    )
    assert [item.knob for item in raw.recommendations] == ["data_scale"]
    assert "centre the inputs" in raw.recommendations[0].reason
    assert centred.summary().value("input_mean_share") is not None
    assert centred.recommendations == ()


@pytest.mark.slow
def test_t7_centred_inputs_are_less_curved(verify: Verify) -> None:
    _, raw, raw_loss = train(digits(centred=False), 32, 600, Smoothness())
    _, centred, centred_loss = train(digits(centred=True), 32, 600, Smoothness())
    verify(
        "T7",
        "largest smoothness of a training, raw",
        expected=2.41,
        measured=raw,
        tolerance=("factor", 1.5),
    )
    # The page has 0.51 for the top eigenvalue, of which secants see the part along the gradient.
    verify(
        "T7",
        "largest smoothness of a training, centred, against a third of the raw one",
        expected=raw / 3,
        measured=centred,
        tolerance="at_most",
    )
    verify(
        "T7",
        "loss of centred inputs after the same steps, against raw ones",
        expected=raw_loss,
        measured=centred_loss,
        tolerance=("relative", 0.1),
    )

"""The noise of dropout masks, on digits, through the monitors.

Each test is one experiment; the numbers it compares are those of its table row.
"""

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import gradwatch
from gradwatch.monitors import DropoutNoise, GradientNoise, LossValue, Smoothness, Stationarity

PAGE = "Gradient convergence"

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]

Verify = Callable[..., None]
Batch = tuple[Tensor, Tensor]


def digits() -> Batch:
    datasets = pytest.importorskip("sklearn.datasets")
    pixels, labels = (torch.as_tensor(part) for part in datasets.load_digits(return_X_y=True))
    return pixels.double() / 16, labels


def net(keep: float) -> nn.Sequential:
    """64-64-10 tanh with a mask on the hidden units."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        into = nn.Linear(64, 64, dtype=torch.float64)
        out = nn.Linear(64, 10, dtype=torch.float64)
    return nn.Sequential(into, nn.Tanh(), nn.Dropout(1 - keep), out)


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    return cross_entropy(model(batch[0]), batch[1])


def train(
    keep: float,
    lr: float,
    parts: Sequence[int],
    steps: int,
    monitors: Sequence[gradwatch.Monitor],
) -> tuple[gradwatch.Watch, gradwatch.MemorySink]:
    """Watched steps of independent draws, in micro-batches of these sizes, and of the masks."""
    torch.manual_seed(1)
    (inputs, labels), model, told = digits(), net(keep), gradwatch.MemorySink()
    optimizer = torch.optim.SGD(model.parameters(), lr)
    watch = gradwatch.watch(
        model,
        optimizer,
        monitors=monitors,
        sinks=[told],
        every_n_steps=1,
        log_every_n_steps=100,
        loss_fn=loss_fn,
        probe_batch=(inputs[:500], labels[:500]),
        budget=None,
        track_loss=True,
        track_clipping=True,
        on_error="raise",
    )
    for _ in range(steps):
        rows = torch.randint(len(inputs), (sum(parts),))
        watch.observe(batch=(inputs[rows], labels[rows]))
        for part in rows.split(list(parts)):
            (loss_fn(model, (inputs[part], labels[part])) / len(parts)).backward()
        optimizer.step()
        optimizer.zero_grad()
    watch.close()
    return watch, told


def readings(told: gradwatch.MemorySink, metric: str) -> Tensor:
    found = [
        item.value
        for report in told.reports
        for item in report.measurements
        if item.metric == metric
    ]
    return torch.tensor(found, dtype=torch.float64)


MASKS = {0.95: 0.460, 0.9: 0.973, 0.8: 2.19, 0.65: 4.72, 0.5: 8.79, 0.3: 20.6}
DATA = 9.50
LAW = 8.75


@pytest.mark.parametrize("keep", MASKS)
def test_t4_masks_at_the_start(verify: Verify, keep: float) -> None:
    watch, told = train(keep, 0.0, [256], 400, [GradientNoise(), DropoutNoise()])
    masks, whole = readings(told, "dropout_variance"), readings(told, "gradient_variance")
    assert len(masks) == len(whole) == 400
    for what, expected, draws in (
        ("sigma²_mask", MASKS[keep], masks),
        # Measured in train mode, as it must be: in eval mode it would be sigma²_data.
        ("sigma²", DATA + MASKS[keep], whole),
        ("sigma²_data", DATA, whole - masks),
    ):
        error = float(draws.std()) / math.sqrt(len(draws))
        # The page rounds to three digits, and leaves out 300 of the digits.
        verify(
            "T4",
            f"{what}, zeta {keep}",
            expected=expected,
            measured=float(draws.mean()),
            tolerance=("absolute", max(3 * error, 0.01 * expected)),
        )
    found = {item.metric: item for item in watch.summary().measurements}
    verify(
        "T4",
        f"v, zeta {keep}",
        expected=LAW,
        measured=found["dropout_variance_law"].value,
        tolerance=("relative", 0.03),
    )
    verify(
        "T4",
        f"share of the masks in sigma², zeta {keep}",
        expected=MASKS[keep] / (DATA + MASKS[keep]),
        measured=found["dropout_variance_share"].value,
        tolerance=("relative", 0.1),
    )


TAILS = {0.8: (0.0063, 0.0140), 0.5: (0.0216, 0.0731), 0.3: (0.0644, 0.1426)}


@pytest.mark.parametrize("keep", TAILS)
def test_t4_floor_of_a_trained_net(verify: Verify, keep: float) -> None:
    """The newest 1000 of 2000 steps; nets of other draws differ by a factor up to 2.5."""
    monitors = [LossValue(), GradientNoise(), Smoothness(), Stationarity()]
    _, told = train(keep, 0.3, [8] * 4, 2000, monitors)
    tail = float(readings(told, "gradient_square")[-1000:].mean())
    floor = float(readings(told, "noise_floor")[-1000:].mean())
    page_tail, page_floor = TAILS[keep]
    for what, expected, measured in (
        ("tail of ||grad f||²", page_tail, tail),
        ("noise floor", page_floor, floor),
    ):
        verify(
            "T4",
            f"{what}, trained with zeta {keep}",
            expected=expected,
            measured=measured,
            tolerance=("factor", 2.5),
        )
    verify(
        "T4",
        f"tail of ||grad f||² against the noise floor, trained with zeta {keep}",
        expected=floor,
        measured=tail,
        tolerance="at_most",
    )
    verify(
        "T4",
        f"a tenth of the noise floor is below that tail, trained with zeta {keep}",
        expected=tail,
        measured=0.1 * floor,
        tolerance="at_most",
    )

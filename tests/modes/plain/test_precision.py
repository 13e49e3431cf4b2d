"""Loss scaling, autocast, and weights of other types than float32."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, Adam, AdamW

if TYPE_CHECKING:
    from tests.modes.plain.conftest import Agrees, Books, MakeBooks

FAMILY = "Plain PyTorch: precision"
BATCH = 5


def scaling(
    run: "Books",
    *,
    unscale: bool = False,
    fused: bool = False,
    overflow: bool = False,
    parts: int = 1,
) -> "Books":
    """Four batches under a GradScaler, of which the second may overflow."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for number in range(4):
        run.optimizer.zero_grad()
        scale = scaler.get_scale()
        losses = []
        for _ in range(parts):
            loss = run.loss() / parts
            scaler.scale(loss).backward()
            losses.append(loss.item())
        infinite = overflow and number == 1
        if infinite:
            next(run.model.parameters()).grad.fill_(torch.inf)  # type: ignore[union-attr]
        raw = None
        if unscale:
            scaler.unscale_(run.optimizer)
            raw = run.gradients()
            clip_grad_norm_(run.model.parameters(), 0.05)
        run.about_to_step(1.0 if unscale else scale)
        scaler.step(run.optimizer)
        scaler.update()
        if fused or not infinite:
            batch = parts * BATCH
            run.stepped(loss=sum(losses), raw=raw, skipped=infinite, batch_size=batch)
        else:
            run.forget()
    return run


def fused(kind: type[torch.optim.Optimizer]) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda model: kind(model.parameters(), lr=0.1, fused=True)  # type: ignore[call-arg]


def test_a_scaler(books: "MakeBooks", agrees: "Agrees") -> None:
    run = scaling(books())
    assert all(report.info.loss_scale is None for report in run.told.reports)
    agrees("GradScaler", run)


def test_a_scaler_and_accumulation(books: "MakeBooks", agrees: "Agrees") -> None:
    agrees("GradScaler, gradient accumulation", scaling(books(Adam), parts=3))


def test_a_scaler_unscale_and_clip(books: "MakeBooks", agrees: "Agrees") -> None:
    agrees("GradScaler, unscale_, clip_grad_norm_", scaling(books(), unscale=True))


@pytest.mark.parametrize("kind", [SGD, Adam])
def test_a_scaler_and_a_fused_optimizer(
    kind: type[torch.optim.Optimizer], books: "MakeBooks", agrees: "Agrees"
) -> None:
    run = scaling(books(fused(kind)), fused=True)
    assert all(report.info.loss_scale == 1024 for report in run.told.reports)
    agrees("GradScaler, fused optimizer", run)


def test_a_scaler_unscale_and_a_fused_optimizer(books: "MakeBooks", agrees: "Agrees") -> None:
    run = scaling(books(fused(Adam)), unscale=True, fused=True)
    agrees("GradScaler, unscale_, clip_grad_norm_, fused optimizer", run)


def test_a_scaler_that_skips_a_step(books: "MakeBooks", agrees: "Agrees") -> None:
    """An optimizer that is not fused is not called at all: that batch was in vain."""
    run = scaling(books(), overflow=True)
    assert len(run.entries) == 3
    agrees("GradScaler, skipped step", run)


def test_a_scaler_that_skips_a_clipped_step(books: "MakeBooks", agrees: "Agrees") -> None:
    """What clipping did to the gradients that were thrown away is forgotten with them."""
    run = scaling(books(), unscale=True, overflow=True)
    assert len(run.entries) == 3
    agrees("GradScaler, unscale_, clip_grad_norm_, skipped step", run)


def test_a_scaler_that_skips_an_accumulated_step(books: "MakeBooks", agrees: "Agrees") -> None:
    run = scaling(books(), overflow=True, parts=2)
    assert len(run.entries) == 3
    agrees("GradScaler, gradient accumulation, skipped step", run)


def test_a_scaler_that_skips_the_step_of_a_fused_optimizer(
    books: "MakeBooks", agrees: "Agrees"
) -> None:
    run = scaling(books(fused(AdamW)), fused=True, overflow=True)
    assert [report.info.loss_scale for report in run.told.reports] == [1024, 1024, 512, 512]
    assert [report.info.skipped for report in run.told.reports] == [False, True, False, False]
    assert all(report.recommendations == () for report in run.told.reports)
    agrees("GradScaler, fused optimizer, skipped step", run)


def test_several_losses_in_one_scale(books: "MakeBooks") -> None:
    """A list of losses: each is told as it was."""
    run = books()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    losses = [run.loss(), run.loss()]
    for scaled in scaler.scale(losses):
        scaled.backward()
    scaler.step(run.optimizer)
    run.watch.close()
    expected = sum(loss.item() for loss in losses)
    assert run.told.reports[0].info.loss == pytest.approx(expected, rel=1e-5)


def test_autocast(books: "MakeBooks", agrees: "Agrees") -> None:
    run = books(Adam)
    for _ in range(3):
        run.optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = run.loss()
        loss.backward()
        run.step(loss=loss.item())
    agrees("autocast to bfloat16", run)


WIDE = 100


def wide_net(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, WIDE), nn.Tanh(), nn.Linear(WIDE, 3)).to(dtype)


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (torch.float64, "float64"),
        (torch.bfloat16, "bfloat16"),
        (torch.float16, "float16"),
    ],
)
def test_weights_of_another_type(
    dtype: torch.dtype, name: str, books: "MakeBooks", agrees: "Agrees"
) -> None:
    run = books(lambda model: SGD(model.parameters(), lr=1e-2), wide_net(dtype))
    for _ in range(3):
        run.optimizer.zero_grad()
        loss = run.loss(values=torch.randn(BATCH, 6).to(dtype))
        loss.backward()
        run.step(loss=loss.item())
    for report, entry in zip(run.told.reports, run.entries, strict=True):
        for key, change in entry.moved.items():
            pushed = entry.used[key] != 0
            stuck = (pushed & (change == 0)).sum() / pushed.sum()
            assert report.value("unmoved_fraction", key) == pytest.approx(float(stuck), abs=1e-6)
    lost = run.told.reports[0].value("unmoved_fraction", "0.weight")
    assert lost is not None
    assert (lost > 0.1) == (dtype != torch.float64)
    agrees(f"weights in {name}", run)


def test_large_half_precision_gradients(books: "MakeBooks") -> None:
    """A norm beyond 65504 is infinite in float16, but not in the report."""
    run = books(model=wide_net(torch.float16))
    (run.loss(values=torch.randn(BATCH, 6).half()) * 0).backward()
    for parameter in run.model.parameters():
        parameter.grad = torch.full_like(parameter, 3e4)
    expected = 3e4 * sum(item.numel() for item in run.model.parameters()) ** 0.5
    run.optimizer.step()
    run.watch.close()
    norm = run.told.reports[0].value("gradient_norm_used")
    assert norm == pytest.approx(expected, rel=1e-3)


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 3, dtype=torch.complex64))

    def forward(self, values: Tensor) -> Tensor:
        return torch.view_as_real(values.to(torch.complex64) @ self.weight)


def test_complex_weights(books: "MakeBooks", agrees: "Agrees") -> None:
    torch.manual_seed(0)
    run = books(model=Complex())
    run.train()
    agrees("complex weights", run)


def test_gradients_that_are_not_finite_are_measured(books: "MakeBooks") -> None:
    run = books()
    run.backward()
    next(run.model.parameters()).grad.fill_(torch.nan)  # type: ignore[union-attr]
    run.optimizer.step()
    run.watch.close()
    report = run.told.reports[0]
    assert report.value("gradient_norm_used") == pytest.approx(torch.nan, nan_ok=True)
    assert report.value("nonfinite_gradient") == 1
    assert report.value("nonfinite_gradient", "0.weight") == 1
    assert [item.knob for item in report.recommendations] == ["numerics"]

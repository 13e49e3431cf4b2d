"""Gradients before and after clipping."""

from typing import TYPE_CHECKING

import pytest
import torch
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

import gradwatch

if TYPE_CHECKING:
    from tests.modes.plain.conftest import Agrees, Books, MakeBooks

FAMILY = "Plain PyTorch: clipping"
BATCH = 5


def clipped(run: "Books", *clippings: tuple[list[int], float, float]) -> "Books":
    """Each clipping is of some modules by their places, to a norm, of an order."""
    for number in range(4):
        loss = run.backward()
        raw = run.gradients()
        for places, largest, order in clippings:
            parameters = [item for place in places for item in run.model[place].parameters()]  # type: ignore[index]
            clip_grad_norm_(parameters, largest if number % 2 else 1e6, norm_type=order)
        run.step(loss=loss, raw=raw)
    return run


def test_by_norm(books: "MakeBooks", agrees: "Agrees") -> None:
    """The function was imported by its name before the watch was made."""
    agrees("clip_grad_norm_", clipped(books(), ([0, 2], 0.05, 2.0)))


def test_by_norm_without_looking(books: "MakeBooks", agrees: "Agrees") -> None:
    run = clipped(books(track_clipping=False), ([0, 2], 0.05, 2.0))
    agrees("clip_grad_norm_, without track_clipping", run, gradient_norm="cannot see whether")


def test_of_one_module(books: "MakeBooks", agrees: "Agrees") -> None:
    agrees("clip_grad_norm_ of one module only", clipped(books(), ([2], 0.01, 2.0)))


def test_of_each_group(books: "MakeBooks", agrees: "Agrees") -> None:
    run = clipped(books(), ([0], 0.03, 2.0), ([2], 0.01, 2.0))
    agrees("clip_grad_norm_ of each parameter group", run)


def test_twice(books: "MakeBooks", agrees: "Agrees") -> None:
    run = clipped(books(), ([0, 2], 0.05, 2.0), ([0, 2], 0.01, 2.0))
    agrees("clip_grad_norm_ twice", run)


def test_by_the_largest_entry(books: "MakeBooks", agrees: "Agrees") -> None:
    """The maximum norm has another norm, the factor is what counts."""
    agrees("clip_grad_norm_ with norm_type=inf", clipped(books(), ([0, 2], 0.01, torch.inf)))


def test_with_the_watch(books: "MakeBooks", agrees: "Agrees") -> None:
    run = books(track_clipping=False)
    for _ in range(3):
        loss = run.backward()
        raw = run.gradients()
        total = run.watch.clip_grad_norm_(0.05)
        entries = torch.cat([item.flatten() for item in raw.values()])
        assert float(total) == pytest.approx(float(entries.norm()), rel=1e-5)
        run.step(loss=loss, raw=raw)
    agrees("watch.clip_grad_norm_", run)


@pytest.mark.parametrize(
    ("mode", "in_sight", "reason"),
    [
        ("clip_grad_norm_ of each micro-batch", True, "clipped before the last backward"),
        (
            "clip_grad_norm_ of each micro-batch, without track_clipping",
            False,
            "cannot see whether",
        ),
    ],
)
def test_each_micro_batch(
    books: "MakeBooks", agrees: "Agrees", mode: str, in_sight: bool, reason: str
) -> None:
    """What is clipped before more is added to it has no norm before clipping any more."""
    run = books(track_clipping=in_sight)
    for _ in range(3):
        run.optimizer.zero_grad()
        losses = []
        for _ in range(2):
            loss = run.loss()
            loss.backward()
            clip_grad_norm_(run.model.parameters(), 0.05)
            losses.append(loss.item())
        run.step(loss=sum(losses), batch_size=2 * BATCH)
    agrees(mode, run, gradient_norm=reason)


def test_in_a_compiled_function(books: "MakeBooks", agrees: "Agrees") -> None:
    """Its graphs must stay what they are, so it says that it clips, but not how much."""
    torch._dynamo.reset()

    @torch.compile(backend="aot_eager")
    def clip(parameters: list[torch.Tensor]) -> None:
        clip_grad_norm_(parameters, 0.05)

    run = books()
    for _ in range(3):
        loss = run.backward()
        clip(list(run.model.parameters()))
        run.step(loss=loss)
    agrees(
        "clip_grad_norm_ in a compiled function",
        run,
        gradient_norm="a compiled function clips",
    )
    torch._dynamo.reset()


def test_by_value_after_observe(books: "MakeBooks", agrees: "Agrees") -> None:
    """Clipping by value cannot be undone, so the gradients must be seen before."""
    run = books(track_clipping=False)
    for _ in range(3):
        loss = run.backward()
        raw = run.gradients()
        run.watch.observe()
        clip_grad_value_(run.model.parameters(), 0.01)
        run.step(loss=loss, raw=raw)
    agrees("clip_grad_value_ after watch.observe", run)


def test_by_value(books: "MakeBooks", agrees: "Agrees") -> None:
    run = books()
    for number in range(4):
        loss = run.backward()
        raw = run.gradients()
        clip_grad_value_(run.model.parameters(), 0.01 if number % 2 else 10.0)
        run.step(loss=loss, raw=raw)
    agrees("clip_grad_value_", run)


def test_by_norm_and_by_value(books: "MakeBooks", agrees: "Agrees") -> None:
    run = books()
    for _ in range(3):
        loss = run.backward()
        raw = run.gradients()
        clip_grad_norm_(run.model.parameters(), 0.05)
        clip_grad_value_(run.model.parameters(), 0.01)
        run.step(loss=loss, raw=raw)
    agrees("clip_grad_norm_, then clip_grad_value_", run)


def test_gradients_that_are_all_zero_are_not_clipped(books: "MakeBooks") -> None:
    run = books()
    run.optimizer.zero_grad()
    (run.loss() * 0).backward()
    clip_grad_norm_(run.model.parameters(), 1.0)
    run.optimizer.step()
    run.watch.close()
    report: gradwatch.Report = run.told.reports[0]
    assert report.value("gradient_norm_used") == report.value("gradient_norm") == 0
    assert report.value("clip_coefficient") == 1
    assert report.value("update_ratio") == 0

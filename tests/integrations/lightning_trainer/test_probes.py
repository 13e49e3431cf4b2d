"""What the probes find in a Lightning training, and where they say that they cannot look."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradwatch
from gradwatch_lightning import GradwatchCallback

pytest.importorskip("lightning")

BATCHES, SIZE = 6, 4  # of the fixture `data`
EVERY: dict[str, Any] = {
    "every_n_steps": 1,
    "log_every_n_steps": 1,
    "on_error": "raise",
    "budget": None,
}


def sgd(self: Any) -> Any:
    return torch.optim.SGD(self.parameters(), lr=self.lr)


def sources(told: gradwatch.MemorySink, metric: str) -> list[str]:
    return [
        item.source
        for report in told.reports
        for item in report.measurements
        if item.metric == metric
    ]


def test_the_loggers_get_what_the_probes_find(
    pl: Any, tmp_path: Any, data: Any, module: Any, trainer: Any, csv_values: Any
) -> None:
    logs = pl.loggers.CSVLogger(tmp_path)
    model = module(pl, configure_optimizers=sgd)
    trainer(pl, GradwatchCallback(**EVERY), logger=logs).fit(model, data())
    for metric in ("gradient_square", "gradient_variance", "smoothness_secant", "smoothness"):
        found = csv_values(logs, f"gradwatch/{metric}")
        assert sorted(found) == list(range(BATCHES)), metric
        assert all(map(math.isfinite, found.values()))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_halves_are_those_of_the_training_step(
    pl: Any, precision: str, told: gradwatch.MemorySink, data: Any, module: Any, trainer: Any
) -> None:
    """Computed once more by hand, at the first step; the loss is logged by the step itself."""
    model = module(pl, configure_optimizers=sgd)
    expected = halves(module(pl).net, *next(iter(data())))
    callback = GradwatchCallback(sinks=[told], **EVERY)
    trainer(pl, callback, precision=precision).fit(model, data())
    exact = 1e-4 if precision == "32-true" else 0.05
    first = told.reports[0]
    assert first.value("gradient_square") == pytest.approx(expected[0], rel=exact)
    assert first.value("gradient_variance") == pytest.approx(expected[1], rel=exact)
    assert set(sources(told, "gradient_square")) == {"two halves of the batch"}
    assert len(sources(told, "smoothness_secant")) == BATCHES


def halves(net: nn.Module, values: Tensor, wanted: Tensor) -> tuple[float, float]:
    net, half = net.double(), SIZE // 2
    gradients = []
    for rows in (slice(half), slice(half, SIZE)):
        loss = (net(values[rows].double()) - wanted[rows].double()).square().mean()
        found = torch.autograd.grad(loss, list(net.parameters()))
        gradients.append(torch.cat([item.flatten() for item in found]))
    first, second = gradients
    return float(first @ second), half * float((first - second).square().sum()) / 2


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_sharpness_is_that_of_the_training_step(
    pl: Any, precision: str, told: gradwatch.MemorySink, data: Any, module: Any, trainer: Any
) -> None:
    """Against all eigenvalues of the Hessian of the first batch, by hand; always in float32."""
    expected = eigenvalues(module(pl).net, *next(iter(data())))
    callback = GradwatchCallback(sinks=[told], **EVERY)
    model = module(pl, configure_optimizers=sgd)
    trainer(pl, callback, precision=precision).fit(model, data())
    first = told.reports[0]
    assert first.value("sharpness") == pytest.approx(float(expected[-1]), rel=1e-3)
    assert first.value("stability_threshold") == pytest.approx(2 / module(pl).lr)
    assert len(sources(told, "sharpness")) == len(sources(told, "stability_ratio")) == BATCHES


def eigenvalues(net: nn.Module, values: Tensor, wanted: Tensor) -> Tensor:
    """Of the Hessian, rising."""
    net = net.double()
    shapes = {name: item.shape for name, item in net.named_parameters()}
    sizes = [shape.numel() for shape in shapes.values()]

    def loss(flat: Tensor) -> Tensor:
        parts = zip(shapes.items(), flat.split(sizes), strict=True)
        weights = {name: part.view(shape) for (name, shape), part in parts}
        found: Tensor = torch.func.functional_call(net, weights, (values.double(),))
        return (found - wanted.double()).square().mean()

    start = torch.cat([item.detach().flatten() for item in net.parameters()])
    found: Tensor = torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, start))
    return found


@pytest.mark.parametrize("clipped", [None, 0.01])
def test_accumulated_batches_need_no_probe(
    pl: Any, clipped: float | None, told: gradwatch.MemorySink, data: Any, module: Any, trainer: Any
) -> None:
    options = {"accumulate_grad_batches": 3, "gradient_clip_val": clipped}
    callback = GradwatchCallback(sinks=[told], **EVERY)
    trainer(pl, callback, **options).fit(module(pl, configure_optimizers=sgd), data())
    assert sources(told, "gradient_square") == ["3 micro-batches"] * 2
    assert len(sources(told, "smoothness_secant")) == 2


def test_manual_optimization_says_why_nothing_is_probed(
    pl: Any, told: gradwatch.MemorySink, data: Any, module: Any, trainer: Any
) -> None:
    model = module(pl, manual=True, configure_optimizers=sgd)
    trainer(pl, GradwatchCallback(sinks=[told], **EVERY)).fit(model, data())
    assert not sources(told, "gradient_square")
    for report in told.reports:
        for metric in ("gradient_square", "smoothness_secant"):
            assert any(
                note.startswith(f"{metric}:") and "manual optimization" in note
                for note in report.notes
            ), report.notes


def test_manual_optimization_with_a_loss_function_is_probed(
    pl: Any, told: gradwatch.MemorySink, data: Any, module: Any, trainer: Any
) -> None:
    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        values, wanted = batch
        loss: Tensor = (model.net(values) - wanted).square().mean()  # type: ignore[operator]
        return loss

    model = module(pl, manual=True, configure_optimizers=sgd)
    expected = halves(module(pl).net, *next(iter(data())))
    callback = GradwatchCallback(sinks=[told], loss_fn=loss_fn, **EVERY)
    trainer(pl, callback).fit(model, data())
    assert told.reports[0].value("gradient_square") == pytest.approx(expected[0], rel=1e-4)
    assert sources(told, "gradient_square") == ["two halves of the batch"] * BATCHES
    assert len(sources(told, "smoothness_secant")) == BATCHES


def test_what_the_training_step_logs_is_logged_once(
    pl: Any, tmp_path: Any, data: Any, module: Any, trainer: Any, csv_rows: Any
) -> None:
    found = []
    for callbacks in ([], [GradwatchCallback(**EVERY)]):
        logs = pl.loggers.CSVLogger(tmp_path, version=len(callbacks))
        trainer(pl, *callbacks, logger=logs).fit(module(pl), data())
        found.append([row["train_loss"] for row in csv_rows(logs) if row.get("train_loss")])
    assert found[0] == found[1]
    assert len(found[0]) == BATCHES

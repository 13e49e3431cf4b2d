"""A training is bit-identical with and without the callback."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradwatch
from gradwatch_lightning import GradwatchCallback

pytest.importorskip("lightning")

SIZE = 4  # of the fixture `data`
EVERY: dict[str, Any] = {
    "every_n_steps": 1,
    "log_every_n_steps": 1,
    "on_error": "raise",
    "budget": None,  # every probe in every step
}


def transformer_step(self: Any, batch: Any, index: int) -> Tensor:
    encoded = self.encoder(batch[0].reshape(-1, 1, 6))
    loss: Tensor = (self.net(encoded[:, 0]) - batch[1]).square().mean()
    return loss


def skipping(self: Any, batch: Any, index: int) -> int | None:
    return -1 if index == 3 else None


MODES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "automatic": ({}, {"max_epochs": 2}),
    "manual": ({"manual": True}, {"max_epochs": 2}),
    "accumulated": ({}, {"max_epochs": 2, "accumulate_grad_batches": 4, "gradient_clip_val": 0.1}),
    "by value": ({}, {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
    "bf16": ({}, {"precision": "bf16-mixed"}),
    "interrupted epochs": ({"on_train_batch_start": skipping}, {"max_epochs": 3}),
    "validation in between": ({}, {"val_check_interval": 2, "max_epochs": 2}),
}


@pytest.mark.parametrize("mode", MODES)
def test_training_is_bit_identical(
    pl: Any,
    mode: str,
    training_state: Any,
    assert_identical: Any,
    traces_on: Any,
    data: Any,
    module: Any,
    trainer: Any,
) -> None:
    of_module, of_trainer = MODES[mode]

    def run(*callbacks: Any) -> Any:
        model = module(pl, noisy=True, **of_module)
        torch.manual_seed(7)
        before = traces_on(model)["hooks"]
        boss = trainer(pl, *callbacks, **of_trainer)
        boss.fit(model, data(), data(3))
        logged = {name: value.clone() for name, value in boss.callback_metrics.items()}
        after = traces_on(model, *boss.optimizers)["hooks"]
        return training_state(model, *boss.optimizers), logged, before, after

    alone = run()
    callback = GradwatchCallback(monitors=gradwatch.presets.full(), **EVERY)
    assert_identical(run(callback), alone)
    if mode == "manual":
        notes = callback.summary().notes
        assert any("smoothness_secant" in note and "manual" in note for note in notes)
    else:
        assert callback.summary().value("smoothness_secant") is not None
        assert callback.summary().value("sharpness") is not None
        assert callback.summary().value("dropout_variance") is not None


def test_evaluation_keeps_its_fused_kernels(
    pl: Any, assert_identical: Any, data: Any, module: Any, trainer: Any
) -> None:
    """A hook on an encoder layer makes PyTorch choose another kernel for evaluation."""

    def hooks_on_layers(self: Any) -> int:
        return sum(len(item._forward_hooks) for item in self.encoder.modules())

    def validation_step(self: Any, batch: Any, index: int) -> None:
        self.log("val_loss", transformer_step(self, batch, index))
        hooks.append(hooks_on_layers(self))

    def on_train_epoch_end(self: Any) -> None:
        hooks.append(hooks_on_layers(self))

    def run(*callbacks: Any) -> Any:
        model = module(
            pl,
            training_step=transformer_step,
            validation_step=validation_step,
            on_train_batch_start=skipping,  # also after a batch that has begun and was skipped
            on_train_epoch_end=on_train_epoch_end,
        )
        model.encoder = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)
        boss = trainer(pl, *callbacks, max_epochs=2, val_check_interval=2)
        boss.fit(model, data(), data(3))
        return dict(boss.callback_metrics)

    hooks: list[int] = []
    alone = run()
    assert "val_loss" in alone
    assert_identical(run(GradwatchCallback(**EVERY)), alone)
    assert len(hooks) > 8
    assert not any(hooks)


def test_a_compiled_module_stays_compiled(
    pl: Any, told: gradwatch.MemorySink, data: Any, module: Any, trainer: Any, values: Any
) -> None:
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def run(*callbacks: Any) -> int:
        torch._dynamo.reset()
        graphs.clear()

        def training_step(self: Any, batch: Any, index: int) -> Tensor:
            loss: Tensor = (self.net(batch[0]) - batch[1]).square().mean()
            return loss

        model = torch.compile(module(pl, training_step=training_step), backend=backend)
        trainer(pl, *callbacks, limit_train_batches=3).fit(model, data())
        return len(graphs)

    alone = run()
    assert run(GradwatchCallback(sinks=[told], **EVERY)) == alone > 0
    assert sorted(values(told)) == [0, 1, 2]
    assert told.reports[0].info.batch_size == SIZE
    assert any("compiled" in note for note in told.reports[0].notes)

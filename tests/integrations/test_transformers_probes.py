"""What the probes find in a training by the Hugging Face Trainer."""

import copy
import math
import os
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import gradwatch

pytest.importorskip("transformers")

from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments
from transformers.data.data_collator import default_data_collator

from gradwatch_transformers import attach
from gradwatch_transformers.values import NewestValues

TOKENS, LENGTH, BATCH, STEPS, LR = 31, 10, 4, 3, 1e-2
EVERY: dict[str, Any] = {
    "every_n_steps": 1,
    "log_every_n_steps": 1,
    "on_error": "raise",
    "budget": None,
}

pytestmark = pytest.mark.usefixtures("one_thread")


def gpt2() -> Any:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=TOKENS,
        n_positions=16,
        n_embd=8,
        n_layer=1,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return GPT2LMHeadModel(config)


def sentences() -> list[dict[str, Tensor]]:
    """Each with another number of tokens that count."""
    random = torch.Generator().manual_seed(3)
    found = []
    for place in range(24):
        row = torch.randint(TOKENS, (LENGTH,), generator=random)
        labels = row.clone()
        labels[(place * 7) % LENGTH + 1 :] = -100
        found.append({"input_ids": row, "labels": labels})
    return found


class Trained:
    """A watched training, its batches and its reports."""

    def __init__(
        self,
        folder: Path,
        callbacks: Any = (),
        checkpoint: str | None = None,
        watching: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self.batches: list[Any] = []
        self.start = gpt2()
        told = gradwatch.MemorySink()
        settings: dict[str, Any] = {
            "max_steps": STEPS,
            "per_device_train_batch_size": BATCH,
            "learning_rate": LR,
            "lr_scheduler_type": "constant",
            "optim": "sgd",
            "logging_steps": 1,
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            "save_strategy": "no",
            "dataloader_pin_memory": False,
        }
        trainer = Trainer(
            copy.deepcopy(self.start),
            TrainingArguments(str(folder), **settings | options),
            train_dataset=sentences(),
            data_collator=self.collate,
            callbacks=list(callbacks),
        )
        with attach(trainer, sinks=[told], **EVERY, **(watching or {})):
            trainer.train(resume_from_checkpoint=checkpoint)
        self.history = [entry for entry in trainer.state.log_history if "loss" in entry]
        self.reports = list(told.reports)

    def collate(self, rows: Any) -> Any:
        self.batches.append(default_data_collator(rows))
        return self.batches[-1]

    def points(self, metric: str) -> list[gradwatch.Measurement]:
        found = [item for report in self.reports for item in report.measurements]
        return [item for item in found if item.metric == metric]


def gradient(model: nn.Module, batch: dict[str, Tensor], rows: slice) -> Tensor:
    """Of the mean loss over the tokens of some of the rows, in float64."""
    logits = model(input_ids=batch["input_ids"][rows]).logits[:, :-1]
    labels = batch["labels"][rows, 1:]
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    found = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([item.flatten() for item in found])


def expected_at_the_start(run: Trained) -> dict[str, float]:
    model, batch, half = run.start.double(), run.batches[0], BATCH // 2
    first = gradient(model, batch, slice(half))
    second = gradient(model, batch, slice(half, BATCH))
    whole = gradient(model, batch, slice(None))
    moved, place = copy.deepcopy(model), 0
    for item in moved.parameters():
        item.data -= LR * whole[place : place + item.numel()].view_as(item)
        place += item.numel()
    change = gradient(moved, batch, slice(None)) - whole
    return {
        "gradient_square": float(first @ second),
        "gradient_variance": half * float((first - second).square().sum()) / 2,
        "smoothness_secant": float(change.norm() / (LR * whole).norm()),
    }


@pytest.mark.parametrize("bf16", [False, True])
def test_halves_are_of_the_scale_of_the_mean_loss(tmp_path: Path, bf16: bool) -> None:
    """The Trainer's own loss is divided by the tokens of the whole step."""
    run = Trained(tmp_path, bf16=bf16)
    counts = [
        int(rows[:, 1:].ne(-100).sum()) for rows in run.batches[0]["labels"].split(BATCH // 2)
    ]
    assert counts[0] != counts[1]
    for metric, value in expected_at_the_start(run).items():
        found = run.points(metric)
        assert len(found) == STEPS
        assert found[0].value == pytest.approx(value, rel=0.1 if bf16 else 1e-4), metric
    assert {item.source for item in run.points("gradient_square")} == {"two halves of the batch"}


def largest_eigenvalue(model: nn.Module, batch: dict[str, Tensor]) -> float:
    """Of the Hessian of the mean loss over the tokens, in float64."""
    solver = pytest.importorskip("scipy.sparse.linalg")
    weights = list(model.parameters())
    with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
        logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
    found = torch.autograd.grad(loss, weights, create_graph=True)
    flat = torch.cat([item.flatten() for item in found])

    def product(vector: Any) -> Any:
        direction = torch.as_tensor(vector).flatten()
        image = torch.autograd.grad(flat, weights, direction, retain_graph=True)
        return torch.cat([item.flatten() for item in image]).numpy()

    size = flat.numel()
    operator = solver.LinearOperator((size, size), matvec=product, dtype="float64")
    return float(solver.eigsh(operator, k=1, which="LA", v0=np.ones(size))[0][0])


@pytest.mark.parametrize("bf16", [False, True])
def test_the_sharpness_is_that_of_the_mean_loss(tmp_path: Path, bf16: bool) -> None:
    """In float32, with the attention that transformers takes by default.

    That one is differentiated once only.
    """
    run = Trained(tmp_path, bf16=bf16)
    assert run.start.config._attn_implementation == "sdpa"
    found = run.points("sharpness")
    expected = largest_eigenvalue(run.start.double(), run.batches[0])
    assert found[0].value == pytest.approx(expected, rel=5e-5)
    assert [item.value for item in run.points("stability_threshold")] == [2 / LR] * STEPS
    logged = [entry["gradwatch/sharpness"] for entry in run.history]
    assert logged == [item.value for item in found]
    assert len(logged) == len(run.points("stability_ratio")) == STEPS


def test_adam_has_a_preconditioned_sharpness(tmp_path: Path) -> None:
    found = Trained(tmp_path, optim="adamw_torch").points("preconditioned_sharpness")
    assert [item.step for item in found] == [1, 2], "before its first step it has no state"
    assert all(item.value > 0 for item in found)


def test_the_history_has_what_the_probes_find(tmp_path: Path) -> None:
    run = Trained(tmp_path)
    for metric in ("gradient_square", "gradient_variance", "smoothness_secant", "smoothness"):
        logged = [entry[f"gradwatch/{metric}"] for entry in run.history]
        assert logged == [item.value for item in run.points(metric)]
        assert len(logged) == STEPS
        assert all(map(math.isfinite, logged))


def test_accumulated_batches_need_no_probe(tmp_path: Path) -> None:
    run = Trained(tmp_path, gradient_accumulation_steps=2, max_grad_norm=0.01)
    found = run.points("gradient_square")
    assert [item.source for item in found] == ["2 micro-batches"] * STEPS
    assert len(run.points("smoothness_secant")) == STEPS


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*is deprecated:FutureWarning")
def test_activation_checkpoints_change_nothing(tmp_path: Path) -> None:
    plain = Trained(tmp_path)
    again = Trained(
        tmp_path,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    for metric in ("gradient_square", "gradient_variance", "smoothness_secant"):
        expected = [item.value for item in plain.points(metric)]
        assert [item.value for item in again.points(metric)] == pytest.approx(expected, rel=1e-4)


def test_a_loss_outside_of_the_model_cannot_be_probed_and_it_is_said(tmp_path: Path) -> None:
    run = Trained(tmp_path, label_smoothing_factor=0.1)
    assert not run.points("smoothness_secant")
    assert any("loss" in note and "smoothness" in note for note in run.reports[0].notes)


def test_a_probe_batch_gives_the_smoothness_of_a_loss_outside_of_the_model(tmp_path: Path) -> None:
    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        loss: Tensor = model(**batch).loss
        return loss

    probe_batch = default_data_collator(sentences())
    run = Trained(
        tmp_path,
        label_smoothing_factor=0.1,
        watching={"loss_fn": loss_fn, "probe_batch": probe_batch},
    )
    assert len(run.points("smoothness_secant")) == STEPS
    wrong = "gradient_square: the loss must be a scalar tensor, got a NoneType"
    assert any(wrong in note for note in run.reports[0].notes)


def test_the_break_even_point_is_told_with_the_next_log() -> None:
    reached = gradwatch.Measurement(metric="break_even_step", scope="model", step=5, value=5.0)
    values = NewestValues("gradwatch", per_layer=False)
    for report in (
        gradwatch.Report(step=5, measurements=(reached,)),
        gradwatch.Report(step=6),
    ):
        values.write(report)
    assert "step 5" in values.take_texts()["gradwatch/break_even"]
    assert values.take_texts() == {}


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        control.should_training_stop = state.global_step >= self.step
        return control


def test_a_resumed_run_continues_the_stationarity(tmp_path: Path) -> None:
    """It is a mean over the run, and there after twenty readings only.

    The sharpness that it rests on is found anew, from other vectors.
    """
    options: dict[str, Any] = {"max_steps": 24, "save_strategy": "steps", "save_steps": 12}
    whole = Trained(tmp_path / "whole", **options)
    Trained(tmp_path / "parts", [StopAt(12)], **options)
    again = Trained(tmp_path / "parts", (), str(tmp_path / "parts" / "checkpoint-12"), **options)
    for metric in ("stationarity", "stationarity_recent", "noise_floor", "smoothness", "sharpness"):
        expected = {item.step: item.value for item in whole.points(metric) if item.step >= 12}
        assert expected.keys() >= {19, 20, 21, 22, 23}
        found = {item.step: item.value for item in again.points(metric)}
        # No checkpoint holds eigenvectors: the sharpness is found anew, within its error.
        assert found == pytest.approx(expected, rel=1e-3), metric

"""The Trainer weighs its micro-batches by their tokens, and the watch hears of it."""

import copy
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from torch import Tensor, nn

import gradwatch

pytest.importorskip("transformers")

from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments
from transformers.data.data_collator import default_data_collator

from gradwatch_transformers import attach

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS, LENGTH, ACCUMULATED = 31, 10, 3


class Recorder(gradwatch.Monitor):
    metrics = ("gradient_square",)
    needs = frozenset({"independent_gradients"})

    def __init__(self) -> None:
        self.found: list[tuple[float, float, float]] = []
        self.reasons: list[str | None] = []

    def read(self, view: gradwatch.StepView) -> Iterable[gradwatch.Reading]:
        parts = view.independent_gradients
        self.reasons.append(view.independent_gradients_unavailable)
        if parts is not None:
            numbers = (parts.total_square, parts.part_squares, parts.share_squares)
            self.found.append(tuple(map(float, numbers)))  # type: ignore[arg-type]
        return ()


def gpt2() -> Any:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
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
    )


def sentences(count: int = 12) -> list[dict[str, Tensor]]:
    """Each with another number of tokens that count, some from the first one on."""
    random = torch.Generator().manual_seed(3)
    found = []
    for place in range(count):
        row = torch.randint(TOKENS, (LENGTH,), generator=random)
        labels = row.clone()
        labels[(place * 7) % LENGTH + 1 :] = -100
        found.append({"input_ids": row, "labels": labels})
    return found


def trained(
    folder: Path, model: nn.Module, trainer_type: type[Trainer] = Trainer, **options: Any
) -> tuple[Recorder, list[Any], float]:
    """One step, its batches and what the Trainer divided their losses by."""
    batches: list[Any] = []

    def collate(rows: Any) -> Any:
        batches.append(default_data_collator(rows))
        return batches[-1]

    settings = TrainingArguments(
        str(folder),
        max_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=ACCUMULATED,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        dataloader_pin_memory=False,
        max_grad_norm=0.01,
        **options,
    )
    trainer = trainer_type(
        model,
        settings,
        train_dataset=sentences(),
        data_collator=collate,
    )
    recorder = Recorder()
    with attach(trainer, monitors=[recorder], on_error="raise"):
        trainer.train()
    used = batches[:ACCUMULATED]
    return recorder, used, float(trainer._get_num_items_in_batch(used, torch.device("cpu")) or 0)


def test_each_weighs_by_its_predicted_tokens(tmp_path: Path) -> None:
    model = gpt2()
    twin = copy.deepcopy(model)
    recorder, batches, items = trained(tmp_path, model)
    counts = [int(batch["labels"][:, 1:].ne(-100).sum()) for batch in batches]
    assert len(set(counts)) == ACCUMULATED, "the counts must differ to be a test"
    contributions = []
    for batch, count in zip(batches, counts, strict=True):
        loss = twin(**batch).loss * count / items
        gradients = torch.autograd.grad(loss, list(twin.parameters()))
        contributions.append(torch.cat([item.flatten() for item in gradients]).double())
    expected = (
        float(torch.stack(contributions).sum(dim=0).square().sum()),
        float(torch.stack(contributions).square().sum()),
        sum((count / sum(counts)) ** 2 for count in counts),
    )
    assert recorder.found == [pytest.approx(expected, rel=1e-4)]


def test_tokens_that_are_not_seen_are_not_guessed(tmp_path: Path) -> None:
    recorder, _, _ = trained(tmp_path, gpt2(), label_smoothing_factor=0.1)
    assert recorder.found == []
    assert "weights" in str(recorder.reasons[0])


class WithoutTokens(Trainer):
    """Divides by the number of micro-batches."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.model_accepts_loss_kwargs = False


def test_without_token_counts_all_weigh_the_same(tmp_path: Path) -> None:
    recorder, _, _ = trained(tmp_path, gpt2(), WithoutTokens)
    (found,) = recorder.found
    assert found[2] == pytest.approx(1 / ACCUMULATED)

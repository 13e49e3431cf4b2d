"""The Hugging Face Trainer: reported numbers against an independent replay in double precision.

A `Recorder` keeps the micro-batches and the parameters of each optimizer step. The replay runs
them once more through a copy of the model and computes the loss of the step itself, as the cross
entropy over all tokens of the step.
"""

import copy
import math
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from packaging.version import Version
from torch import Tensor, nn

import gradwatch

transformers = pytest.importorskip("transformers")

from transformers import (  # noqa: E402
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from gradwatch_transformers import GradwatchCallback, attach  # noqa: E402

FAMILY = "transformers"
TOKENS = 31
MAX_NORM = 0.5

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning"),
    # Dynamo looks at `.grad` of everything, and imports parts of torch that are deprecated.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:DeprecationWarning"),
]


@dataclass
class Step:
    """What one optimizer step was made of."""

    before: dict[str, Tensor]
    lr: float
    batches: list[dict[str, Tensor]] = field(default_factory=list)
    raw: dict[str, Tensor] = field(default_factory=dict)
    used: dict[str, Tensor] = field(default_factory=dict)
    after: dict[str, Tensor] = field(default_factory=dict)
    logged: float | None = None


class Recorder(Trainer):
    """A Trainer that keeps books."""

    model: Any

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.steps: list[Step] = []
        self.add_callback(Moments(self))
        clip = self.accelerator.clip_grad_norm_

        def recorded(parameters: Any, *rest: Any, **more: Any) -> Any:
            if not self.steps[-1].raw:
                self.steps[-1].raw = gradients(self.model)
            return clip(parameters, *rest, **more)

        self.accelerator.clip_grad_norm_ = recorded

    def training_step(self, model: nn.Module, inputs: dict[str, Tensor], *rest: Any) -> Tensor:
        self.steps[-1].batches.append({name: item.clone() for name, item in inputs.items()})
        loss: Tensor = super().training_step(model, inputs, *rest)
        return loss


class Moments(TrainerCallback):
    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def on_step_begin(self, *_: Any, **given: Any) -> None:
        lr = given["optimizer"].param_groups[0]["lr"]
        self.recorder.steps.append(Step(parameters(self.recorder.model), lr))

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.recorder.steps[-1].used = gradients(self.recorder.model)

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.recorder.steps[-1].after = parameters(self.recorder.model)

    def on_log(self, *_: Any, **given: Any) -> None:
        if "loss" in given["logs"]:
            self.recorder.steps[-1].logged = given["logs"]["grad_norm"]


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: item.detach().clone() for name, item in model.named_parameters()}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    named = model.named_parameters()
    return {name: item.grad.double() for name, item in named if item.grad is not None}


# --- The replay --------------------------------------------------------------------------------


@dataclass
class Replay:
    loss: float
    gradients: dict[str, Tensor]
    activations: dict[str, float]
    batch_size: int


def replay(recorder: Recorder, step: Step, autocast: bool) -> Replay:
    """The step once more, in double precision unless the training had mixed precision."""
    model = copy.deepcopy(recorder.model).float() if autocast else double(recorder.model)
    model.zero_grad()
    model.load_state_dict(step.before, strict=False)
    model.train()
    norms: dict[str, float] = {}
    handles = [
        module.register_forward_hook(rms(norms, name))
        for name, module in model.named_modules()
        if next(module.parameters(recurse=False), None) is not None
    ]
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for batch in step.batches:
        inputs = {name: item for name, item in batch.items() if name != "labels"}
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            logits = model(**inputs).logits[:, :-1].double()
        labels = batch["labels"][:, 1:]
        total = total + nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), reduction="sum"
        )
        tokens += int((labels != -100).sum())
    loss = total / tokens
    loss.backward()
    for handle in handles:
        handle.remove()
    size = sum(batch["input_ids"].shape[0] for batch in step.batches)
    return Replay(loss.item(), gradients(model), norms, size)


def double(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).double()


def rms(norms: dict[str, float], name: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        if torch._C._current_graph_task_id() != -1:
            return  # checkpointing runs it again
        values = output if isinstance(output, Tensor) else output[0]
        examples = values.detach().double().flatten(1)
        norms[name] = examples.square().sum(1).mean().sqrt().item()

    return hook


def sizes(values: dict[str, Tensor]) -> dict[str, float]:
    whole = torch.stack([item.norm() for item in values.values()]).norm().item()
    return {"model": whole, **{name: item.norm().item() for name, item in values.items()}}


# --- What is trained ---------------------------------------------------------------------------


def gpt2(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=TOKENS,
        n_positions=16,
        n_embd=16,
        n_layer=2,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        **options,
    )
    model: nn.Module = GPT2LMHeadModel(config)
    return model


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=TOKENS,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
    )
    model: nn.Module = LlamaForCausalLM(config)
    return model


def lora() -> nn.Module:
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    model: nn.Module = peft.get_peft_model(llama(), config)
    return model


def sentences(count: int = 32) -> list[dict[str, Tensor]]:
    """Of one length, with very different numbers of tokens to predict."""
    random = torch.Generator().manual_seed(3)
    found = []
    for number in range(count):
        ids = torch.randint(TOKENS, (12,), generator=random)
        labels = ids.clone()
        labels[0] = -100  # nothing predicts it, but some models make the Trainer count it
        labels[2 + (5 * number) % 9 :] = -100
        found.append({"input_ids": ids, "labels": labels})
    return found


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "max_steps": 3,
        "per_device_train_batch_size": 3,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "max_grad_norm": MAX_NORM,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(str(folder), **(settings | options))


@dataclass
class Run:
    recorder: Recorder
    callback: GradwatchCallback
    reports: list[gradwatch.Report]


def watched(
    model: nn.Module,
    folder: Path,
    *,
    plainly: bool = False,
    kind: type[Recorder] = Recorder,
    **options: Any,
) -> Run:
    """Trains with the callback attached, or given to the Trainer plainly."""
    told = gradwatch.MemorySink()
    watching: dict[str, Any] = {
        "sinks": [told],
        "every_n_steps": 1,
        "log_every_n_steps": 1,
        "on_error": "raise",
    }
    callbacks = [GradwatchCallback(**watching)] if plainly else []
    recorder = kind(
        model, arguments(folder, **options), train_dataset=sentences(), callbacks=callbacks
    )
    callback = callbacks[0] if plainly else attach(recorder, **watching)
    recorder.train()
    assert callback.watch is not None
    assert callback.watch.failures == {}
    return Run(recorder, callback, told.reports)


def measured(report: gradwatch.Report, metric: str) -> dict[str, float]:
    return {item.scope: item.value for item in report.measurements if item.metric == metric}


def unwrapped(values: dict[str, Any]) -> dict[str, Any]:
    return {name.removeprefix("_orig_mod."): value for name, value in values.items()}


# --- The matrix --------------------------------------------------------------------------------


MODES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "plain": (gpt2, {"max_grad_norm": 1e6}),
    "Llama": (llama, {}),
    "clipping": (gpt2, {}),
    "max_grad_norm=0": (gpt2, {"max_grad_norm": 0.0}),
    "accumulation of unequal token counts": (
        gpt2,
        {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2},
    ),
    "last accumulation is shorter": (
        gpt2,
        {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 5, "max_steps": 4},
    ),
    "bf16": (gpt2, {"bf16": True}),
    "gradient checkpointing": (
        gpt2,
        {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": False},
        },
    ),
    "gradient checkpointing, reentrant": (
        gpt2,
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    ),
    "LoRA": (lora, {}),
    "torch_compile": (gpt2, {"torch_compile": True, "torch_compile_backend": "aot_eager"}),
}


@pytest.mark.parametrize("mode", MODES)
def test_the_numbers_are_those_of_the_replay(mode: str, tmp_path: Path, cell: Any) -> None:
    build, options = MODES[mode]
    torch._dynamo.reset()
    run = watched(build(), tmp_path, **options)
    assert len(run.reports) == len(run.recorder.steps)
    for number, (report, step) in enumerate(zip(run.reports, run.recorder.steps, strict=True)):
        assert report.step == number
        expected = replay(run.recorder, step, autocast=bool(options.get("bf16")))
        moved = {name: step.after[name].double() - step.before[name].double() for name in step.used}
        cell.equal(
            mode, "gradient_norm_used", measured(report, "gradient_norm_used"), sizes(step.used)
        )
        raw = step.raw if options.get("bf16") else expected.gradients
        # The weights of a double precision copy are those of single precision, its sums are not.
        cell.equal(mode, "gradient_norm", measured(report, "gradient_norm"), sizes(raw))
        cell.equal(
            mode, "gradient_norm", report.value("gradient_norm"), sizes(raw)["model"], rel=1e-5
        )
        cell.equal(mode, "update_norm", report.value("update_norm"), sizes(moved)["model"])
        cell.equal(mode, "loss", report.value("loss"), expected.loss)
        cell.equal(mode, "batch_size", report.value("batch_size"), expected.batch_size)
        cell.equal(mode, "lr", report.info.lr, step.lr)
        if mode == "torch_compile":
            cell.unavailable(mode, "activation_norm", report, "the model is compiled as a whole")
        else:
            cell.equal(
                mode, "activation_norm", measured(report, "activation_norm"), expected.activations
            )
        assert report.value("gradient_norm") == pytest.approx(step.logged, rel=1e-5)
        whole = sizes(step.used)["model"]
        assert report.value("clip_coefficient") == pytest.approx(
            whole / sizes(step.raw)["model"], rel=1e-5
        )


def test_the_trainings_of_the_matrix_are_what_their_names_say(tmp_path: Path) -> None:
    run = watched(gpt2(), tmp_path / "a", **MODES["accumulation of unequal token counts"][1])
    tokens = [int((batch["labels"] != -100).sum()) for batch in run.recorder.steps[0].batches]
    assert len(set(tokens)) == len(tokens) == 3
    assert sizes(run.recorder.steps[0].raw)["model"] > 2 * MAX_NORM
    run = watched(gpt2(), tmp_path / "b", **MODES["last accumulation is shorter"][1])
    assert [len(step.batches) for step in run.recorder.steps] == [4, 3, 4, 3]


@pytest.mark.parametrize("plainly", [False, True])
def test_a_compiled_model_out_of_reach_is_said_to_be_so(
    plainly: bool, tmp_path: Path, cell: Any
) -> None:
    torch._dynamo.reset()
    run = watched(gpt2(), tmp_path, plainly=plainly, **MODES["torch_compile"][1])
    if not plainly:
        assert run.reports[-1].value("batch_size") == 3
        return
    mode = "torch_compile, callback not attached"
    report, step = run.reports[-1], run.recorder.steps[-1]
    expected = replay(run.recorder, step, autocast=False)
    moved = {name: step.after[name].double() - step.before[name].double() for name in step.used}
    cell.unavailable(mode, "activation_norm", report, "the model is compiled as a whole")
    cell.unavailable(mode, "batch_size", report, "the model's inputs do not show it")
    cell.equal(mode, "gradient_norm_used", report.value("gradient_norm_used"), MAX_NORM)
    cell.equal(
        mode, "gradient_norm", report.value("gradient_norm"), sizes(expected.gradients)["model"]
    )
    cell.equal(mode, "update_norm", report.value("update_norm"), sizes(moved)["model"])
    cell.equal(mode, "loss", report.value("loss"), expected.loss)
    cell.equal(mode, "lr", report.info.lr, step.lr)


# --- The loss, whoever computes it -------------------------------------------------------------


def smoothed(logits: Tensor, labels: Tensor) -> Tensor:
    """The sum of the cross entropies with smoothed targets."""
    return nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), reduction="sum", label_smoothing=0.1
    )


def doubled(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    logits, labels = outputs.logits[:, :-1], labels[:, 1:]
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    result: Tensor = 2 * loss / num_items_in_batch
    return result


class PerBatchMean(Recorder):
    """The loss is a mean over each micro-batch, which the Trainer divides by their number."""

    loss_is_scaled_for_ga = False

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *_: Any, **__: Any) -> Any:
        logits = model(input_ids=inputs["input_ids"]).logits[:, :-1]
        labels = inputs["labels"][:, 1:]
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def logits_of(run: Run, step: Step) -> list[tuple[Tensor, Tensor]]:
    model = double(run.recorder.model)
    model.load_state_dict(step.before, strict=False)
    with torch.no_grad():
        return [
            (model(input_ids=batch["input_ids"]).logits[:, :-1], batch["labels"][:, 1:])
            for batch in step.batches
        ]


@pytest.mark.parametrize("source", ["smoothing", "function", "override"])
def test_the_loss_is_the_one_trained_on(source: str, tmp_path: Path) -> None:
    if source != "function" and Version(version("transformers")) < Version("5.20"):
        pytest.skip("older releases train on the sum of the micro-batches' means")
    told = gradwatch.MemorySink()
    options: dict[str, Any] = {"gradient_accumulation_steps": 3}
    kind: type[Recorder] = Recorder
    more: dict[str, Any] = {}
    if source == "smoothing":
        options["label_smoothing_factor"] = 0.1
    elif source == "function":
        more["compute_loss_func"] = doubled
    else:
        kind = PerBatchMean
    trainer = kind(gpt2(), arguments(tmp_path, **options), train_dataset=sentences(), **more)
    callback = attach(trainer, sinks=[told], every_n_steps=1, log_every_n_steps=1, on_error="raise")
    trainer.train()
    run = Run(trainer, callback, told.reports)
    for report, step in zip(run.reports, trainer.steps, strict=True):
        pairs = logits_of(run, step)
        tokens = sum(int((labels != -100).sum()) for _, labels in pairs)
        if source == "smoothing":
            expected = sum(smoothed(*pair).item() for pair in pairs) / tokens
        elif source == "function":
            expected = 2 * sum(entropy(*pair).item() for pair in pairs) / tokens
        else:
            means = [entropy(*pair).item() / int((pair[1] != -100).sum()) for pair in pairs]
            expected = sum(means) / len(means)
        assert report.value("loss") == pytest.approx(expected, rel=1e-5)
        assert report.info.loss == report.value("loss")


def entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")


def test_a_loss_that_is_not_finite_is_told(tmp_path: Path) -> None:
    model: Any = gpt2()
    with torch.no_grad():
        model.transformer.wte.weight[3] = torch.nan
    run = watched(model, tmp_path, max_steps=1)
    assert run.recorder.state.log_history[0]["loss"] == 0  # the Trainer hides it
    assert run.reports[0].value("loss") != run.reports[0].value("loss")
    assert run.reports[0].value("nonfinite_gradient")


# --- Loss scaling ------------------------------------------------------------------------------


class ScalingTrainer(Recorder):
    """As accelerate does with `fp16=True` on an accelerator: a loss scaler, here on the CPU."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def _prepare_for_training(self, *rest: Any) -> Any:
        prepared = super()._prepare_for_training(*rest)  # type: ignore[no-untyped-call]
        self.accelerator.native_amp = True  # so that it unscales before it clips
        self.accelerator.state._mixed_precision = "fp16"
        return prepared


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_torch_fused"])
def test_with_a_loss_scaler_the_numbers_are_those_without(
    optimizer: str, tmp_path: Path, cell: Any
) -> None:
    options: dict[str, Any] = {"gradient_accumulation_steps": 3, "optim": optimizer}
    run = watched(gpt2(), tmp_path, kind=ScalingTrainer, **options)
    mode = "loss scaler"
    for report, step in zip(run.reports, run.recorder.steps, strict=True):
        expected = replay(run.recorder, step, autocast=False)
        moved = {name: step.after[name].double() - step.before[name].double() for name in step.used}
        raw = sizes(expected.gradients)["model"]
        assert sizes(step.raw)["model"] == pytest.approx(1024 * raw, rel=1e-5)
        activations = measured(report, "activation_norm")
        cell.equal(mode, "activation_norm", activations, expected.activations)
        cell.equal(mode, "gradient_norm", report.value("gradient_norm"), raw)
        cell.equal(mode, "gradient_norm_used", report.value("gradient_norm_used"), MAX_NORM)
        cell.equal(mode, "update_norm", report.value("update_norm"), sizes(moved)["model"])
        cell.equal(mode, "loss", report.value("loss"), expected.loss)
        cell.equal(mode, "batch_size", report.value("batch_size"), expected.batch_size)
        cell.equal(mode, "lr", report.info.lr, step.lr)


# --- Several processes -------------------------------------------------------------------------


def train_on_this_rank(folder: str) -> dict[str, Any]:
    """Averaged over the tokens of both, with the callback given plainly, and under an engine."""
    return {
        "averaged": train_in_parallel(folder, averaged=True),
        "separate": train_in_parallel(folder, averaged=False, plainly=True),
        "engine": train_in_parallel(folder, averaged=True, kind=DeepSpeedTrainer),
    }


def train_in_parallel(
    folder: str, *, averaged: bool, plainly: bool = False, kind: type[Recorder] | None = None
) -> dict[str, Any]:
    options = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "ddp_backend": "gloo",
        "average_tokens_across_devices": averaged,
        "save_strategy": "no" if kind else "steps",  # asks one process only for its state
        "save_steps": 2,
    }
    run = watched(gpt2(), Path(folder), plainly=plainly, kind=kind or Recorder, **options)
    return {
        "reports": [report.to_dict() for report in run.reports],
        "steps": [vars(step) for step in run.recorder.steps],
        "history": run.recorder.state.log_history,
    }


def test_two_processes_report_what_one_would(
    tmp_path: Path, on_ranks: Callable[..., list[Any]], cell: Any
) -> None:
    ranks = on_ranks(train_on_this_rank, str(tmp_path), joined=False)
    for how in ("averaged", "separate", "engine"):
        first, second = (rank[how] for rank in ranks)
        assert second["reports"] == []
        steps = [[Step(**step) for step in rank["steps"]] for rank in (first, second)]
        reports = [gradwatch.Report.from_dict(item) for item in first["reports"]]
        assert len(reports) == 3
        for report, *pair in zip(reports, *steps, strict=True):
            compare(report, pair, how, tmp_path, cell)
        assert all("gradwatch/loss" in item for item in first["history"] if "loss" in item)


def compare(report: gradwatch.Report, pair: list[Step], how: str, folder: Path, cell: Any) -> None:
    own, other = pair
    trainer = Recorder(gpt2(), arguments(folder), train_dataset=sentences())
    whole = replay(trainer, Step(own.before, own.lr, own.batches + other.batches), autocast=False)
    loss, raw = whole.loss, whole.gradients
    mode = {
        "averaged": "DDP, accumulation",
        "separate": "DDP, tokens counted on each process",
        "engine": "DeepSpeed, two processes",
    }[how]
    parts = [replay(trainer, step, autocast=False) for step in pair]
    activations = {
        name: math.hypot(value, parts[1].activations[name]) / math.sqrt(2)
        for name, value in parts[0].activations.items()
    }
    cell.equal(mode, "activation_norm", measured(report, "activation_norm"), activations)
    if how == "separate":
        loss = sum(part.loss for part in parts) / 2
        raw = {name: sum(part.gradients[name] for part in parts) / 2 for name in raw}  # type: ignore[misc]
    cell.equal(mode, "loss", report.value("loss"), loss)
    cell.equal(mode, "batch_size", report.value("batch_size"), whole.batch_size)
    cell.equal(mode, "lr", report.info.lr, own.lr)
    if how == "engine":
        for quantity in ("gradient_norm", "gradient_norm_used", "update_norm"):
            cell.unavailable(mode, quantity, report, "not measured under DeepSpeed")
        return
    moved = {name: own.after[name].double() - own.before[name].double() for name in own.used}
    cell.equal(mode, "gradient_norm", report.value("gradient_norm"), sizes(raw)["model"])
    cell.equal(mode, "gradient_norm_used", measured(report, "gradient_norm_used"), sizes(own.used))
    cell.equal(mode, "update_norm", report.value("update_norm"), sizes(moved)["model"])


# --- DeepSpeed ---------------------------------------------------------------------------------


class Engine:
    """Does in `backward` what DeepSpeed's engine does: all that belongs to an optimizer step."""

    def __init__(self, optimizer: Any, model: nn.Module) -> None:
        self.optimizer, self.model = optimizer, model

    def backward(self, loss: Tensor, boundary: bool) -> None:
        loss.backward()
        if boundary:
            with torch.no_grad():
                for parameter in self.model.parameters():
                    parameter.mul_(0.99)
            self.model.zero_grad()
            for group in self.optimizer.param_groups:
                group["lr"] *= 0.5  # the engine has a scheduler of its own


class DeepSpeedTrainer(Recorder):
    """As if accelerate had prepared the model for DeepSpeed, which is not installed."""

    optimizer: Any

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.accelerator.clip_grad_norm_ = lambda *_: torch.ones(())

    def _prepare_for_training(self, *rest: Any) -> Any:
        from accelerate.utils.deepspeed import (
            DeepSpeedOptimizerWrapper,
            DeepSpeedSchedulerWrapper,
        )

        prepared = super()._prepare_for_training(*rest)  # type: ignore[no-untyped-call]
        plain = self.optimizer.optimizer
        self.optimizer = DeepSpeedOptimizerWrapper(plain)
        self.callback_handler.optimizer = self.optimizer
        self.lr_scheduler = DeepSpeedSchedulerWrapper(self.lr_scheduler, plain)
        engine = Engine(plain, self.model)
        accelerator = self.accelerator
        accelerator.backward = lambda loss: engine.backward(loss, accelerator.sync_gradients)
        return prepared


@pytest.mark.parametrize("accumulate", [1, 3])
def test_under_deepspeed_the_rest_stays_right(accumulate: int, tmp_path: Path, cell: Any) -> None:
    run = watched(gpt2(), tmp_path, kind=DeepSpeedTrainer, gradient_accumulation_steps=accumulate)
    trainer = run.recorder
    mode = "DeepSpeed" if accumulate == 1 else "DeepSpeed, accumulation"
    assert [report.step for report in run.reports] == [0, 1, 2]
    for report, step in zip(run.reports, trainer.steps, strict=True):
        expected = replay(trainer, step, autocast=False)
        cell.equal(mode, "loss", report.value("loss"), expected.loss)
        cell.equal(mode, "batch_size", report.value("batch_size"), expected.batch_size)
        cell.equal(mode, "lr", report.info.lr, step.lr)
        activations = measured(report, "activation_norm")
        cell.equal(mode, "activation_norm", activations, expected.activations)
        for quantity in ("gradient_norm", "gradient_norm_used", "update_norm"):
            cell.unavailable(mode, quantity, report, "not measured under DeepSpeed")
        assert sum("DeepSpeed" in note for note in report.notes) == 1
    assert [step.lr for step in trainer.steps] == [1e-2, 5e-3, 2.5e-3]


def test_under_deepspeed_a_loss_outside_the_model_is_not_seen(tmp_path: Path, cell: Any) -> None:
    run = watched(gpt2(), tmp_path, kind=DeepSpeedTrainer, label_smoothing_factor=0.1)
    mode = "DeepSpeed, label smoothing"
    cell.unavailable(mode, "loss", run.reports[0], "it is computed outside the model")
    cell.equal(mode, "batch_size", run.reports[0].value("batch_size"), 3)

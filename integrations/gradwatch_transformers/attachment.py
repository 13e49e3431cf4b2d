"""What a callback keeps from one training to the next."""

import logging
from collections.abc import Callable, Sized
from typing import Any, Final, ParamSpec
from weakref import finalize, ref

import torch
from torch import nn
from transformers.trainer_callback import TrainerCallback, TrainerState
from transformers.training_args import TrainingArguments

from gradwatch import Report, Watch
from gradwatch.errors import AttachError
from gradwatch.isolation import Isolation, logger
from gradwatch.options import Options
from gradwatch_transformers.engine import is_deepspeed
from gradwatch_transformers.training import Training

PART: Final = "the callback of gradwatch"
P = ParamSpec("P")


class Attachment:
    """The options, the Trainer they are for, and its training under way.

    Lives outside the callback because the Trainer may replace that by a new object.

    Args:
        options: checked ones.

    Attributes:
        options: the same.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self._training: Training | None = None
        self._isolation = Isolation(options.on_error)
        self._trainer: Callable[[], Any] = lambda: None
        self._arguments: Callable[[], Any] = lambda: None
        self._clean_up: finalize[..., Any] | None = None

    @property
    def watch(self) -> Watch | None:
        """The newest watch."""
        return None if self._training is None else self._training.watch

    @property
    def is_known(self) -> bool:
        """Whether the Trainer of this callback has shown itself."""
        return self._arguments() is not None

    def is_of(self, arguments: TrainingArguments) -> bool:
        """Whether this belongs to the Trainer with these arguments."""
        return self._arguments() is arguments

    def has_arguments(self, arguments: TrainingArguments) -> None:
        """The Trainer has shown its arguments."""
        self._arguments = ref(arguments)

    def belongs_to(self, trainer: Any) -> None:
        """The Trainer itself is known; it is held weakly."""
        self._trainer = ref(trainer)
        self.has_arguments(trainer.args)

    def summary(self) -> Report:
        """The newest of everything.

        Returns:
            A report.

        Raises:
            AttachError: if there is no watch.
        """
        if self.watch is None:
            why = "; ".join(self._isolation.notes) or "call trainer.train() first"
            raise AttachError(f"no training has been watched yet: {why}")
        return self.watch.summary()

    def state(self) -> dict[str, Any] | None:
        """What a checkpoint must hold of the training under way, or None."""
        if self._training is None:
            return None
        return self._isolation.run(f"{PART}, its checkpoint", self._training.state_dict)

    def begin(
        self,
        callback: TrainerCallback,
        arguments: TrainingArguments,
        state: TrainerState,
        *,
        model: nn.Module,
        optimizer: Any,
        dataloader: Any,
        saved: dict[str, Any] | None,
    ) -> None:
        """A training begins, whatever became of the one before.

        Args:
            callback: that the Trainer calls.
            arguments: of the Trainer.
            state: of the Trainer.
            model: without its wrappers.
            optimizer: accelerate's.
            dataloader: of the training samples.
            saved: what `state` returned in the run that is resumed.
        """
        self.close()
        self._training = None
        self._isolation = Isolation(self.options.on_error)
        self._isolation.run(PART, self._put_in_front, callback)
        training = self._isolation.run(
            PART, self._open, arguments, model, optimizer, _facts(state, dataloader)
        )
        if training is None:
            return
        self._training = training
        # For a training that is interrupted, which the Trainer tells nobody.
        self._clean_up = finalize(self, training.close)
        if state.global_step:
            self._isolation.run(
                f"{PART}, its state in the checkpoint", training.resume, saved, state.global_step
            )

    def step_begins(self, epoch: float | None) -> None:
        """The first micro-batch of an optimizer step is next."""
        if self._training is not None:
            self._isolation.run(PART, self._training.step_begins, epoch)

    def about_to_step(self) -> None:
        """All micro-batches have gone backward."""
        if self._training is not None:
            self._isolation.run(PART, self._training.about_to_step)

    def stepped(self) -> None:
        """The optimizer has stepped."""
        if self._training is not None:
            self._isolation.run(PART, self._training.stepped)

    def add_to(self, logs: dict[str, Any], state: TrainerState) -> None:
        """Adds the newest values to what the Trainer logs.

        Args:
            logs: as the loggers will see it.
            state: of the Trainer, whose history has a copy of it already.
        """
        if self._training is not None:
            self._isolation.run(f"{PART}, its values for the loggers", self._add_to, logs, state)

    def end(self, state: TrainerState) -> None:
        """The training is over, maybe before the Trainer has logged once.

        Args:
            state: of the Trainer.
        """
        self.close()
        if self._training is not None:
            self._isolation.run(f"{PART}, its values for the loggers", self._write_texts, state)

    def close(self) -> None:
        """Ends the watch; its summary stays."""
        if self._clean_up is not None:
            self._isolation.run(f"{PART}, its end", self._clean_up)

    def _open(
        self,
        arguments: TrainingArguments,
        model: nn.Module,
        optimizer: Any,
        facts: dict[str, int | None],
    ) -> Training:
        trainer = self._trainer()
        called = model
        if trainer is not None and not is_deepspeed(optimizer):
            called = trainer.model_wrapped
        elif arguments.torch_compile:
            # The training calls a wrapper that is out of reach. Hooks on the model inside it
            # would be compiled; another wrapper tells the watch not to place them.
            called = torch.compile(model, backend="eager")  # type: ignore[assignment]
        return Training(self.options, arguments, called, optimizer, facts)

    def _put_in_front(self, callback: TrainerCallback) -> None:
        trainer = self._trainer()
        if trainer is None:
            return
        callbacks = trainer.callback_handler.callbacks
        if callbacks[0] is not callback and callback in callbacks:
            callbacks.remove(callback)
            callbacks.insert(0, callback)

    def _add_to(self, logs: dict[str, Any], state: TrainerState) -> None:
        training = self._training
        assert training is not None
        values = training.values.take()
        logs.update(values)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(values)
        self._write_texts(state)

    def _write_texts(self, state: TrainerState) -> None:
        training = self._training
        assert training is not None
        self._write(training.values.take_texts(), state.global_step)

    def _write(self, texts: dict[str, str], step: int) -> None:
        """Texts go to TensorBoard alone: other loggers take numbers only."""
        trainer = self._trainer()
        callbacks = [] if trainer is None else trainer.callback_handler.callbacks
        writers = [item.tb_writer for item in callbacks if getattr(item, "tb_writer", None)]
        for name, text in texts.items():
            for writer in writers:
                writer.add_text(f"train/{name}", text, step)
            if not writers and self.options.logdir is None:
                logger.log(self._level(name), "%s at step %d:\n%s", name, step, text)

    def _level(self, name: str) -> int:
        """Of a text in the log of Python: advice must be seen without configuring it."""
        watch = self.watch
        if watch is None or not name.endswith("recommendations"):
            return logging.INFO
        urgent = any(item.severity != "info" for item in watch.recommendations)
        return logging.WARNING if urgent else logging.INFO


def _facts(state: TrainerState, dataloader: Any) -> dict[str, int | None]:
    dataset = getattr(dataloader, "dataset", None)
    try:
        size = len(dataset) if isinstance(dataset, Sized) else None
    except TypeError:  # an iterable dataset without a length
        size = None
    return {"train_size": size or None, "planned_steps": state.max_steps or None}

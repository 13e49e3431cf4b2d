"""One `trainer.fit` under watch: what Lightning's hooks mean for the watch."""

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import gradwatch
from gradwatch.capture.forward.gate import batch_size
from gradwatch.capture.hooks import HookHandles, OwnHook
from gradwatch.errors import AttachError
from gradwatch.isolation import Isolation
from gradwatch.options import Options
from gradwatch.sinks import JsonlSink
from gradwatch_lightning.axis import Axis
from gradwatch_lightning.logger_sinks import draws_page, logger_sinks
from gradwatch_lightning.objective import TrainingStep
from gradwatch_lightning.trainer_facts import (
    hides_raw_gradients,
    is_compiled,
    planned_steps,
    train_size,
    unscaled,
)

PART: Final = "the Lightning callback of gradwatch"
"""Name of this adapter, should it fail."""


class Fit:
    """Attaches a watch and tells it what Lightning's hooks show, until it is closed.

    In Lightning the loop calls `training_step`, not the module, so the forward is said to be
    between the start of the batch and `backward`. With manual optimization there may be more of
    them, and more than one step, in a batch.

    Args:
        options: of the callback.
        trainer: in `on_train_start`.
        module: that is trained.
        is_current: says whether the Trainer runs its callbacks, or has put them aside to try
            learning rates or batch sizes.
        isolation: what to do when a hook fails.

    Attributes:
        watch: the watch.
        trainer: of this fit.
        module: of this fit.
    """

    def __init__(
        self,
        options: Options,
        trainer: Any,
        module: Any,
        is_current: Callable[[], bool],
        isolation: Isolation,
    ) -> None:
        self.trainer = trainer
        self.module = module
        self._is_current = is_current
        self._isolation = isolation
        self._discarded = False
        self._automatic = bool(module.automatic_optimization)
        self._batch_idx = 0
        self._axis = Axis(trainer, options.log_every_n_steps // options.every_n_steps + 1)
        self._tracks_clipping = hides_raw_gradients(trainer)
        self.watch = _attached(
            _Compiled(module) if is_compiled(module) else module,
            trainer.optimizers,
            track_clipping=self._tracks_clipping,
            objective=lambda batches: TrainingStep(module, batches, lambda: self._batch_idx),
            **_arguments(options, trainer, self._sinks(options)),
        )
        self._handles = HookHandles()
        for optimizer in trainer.optimizers:
            # After the watch's own hook, so that the watch has finished its step.
            self._handles.add(optimizer.register_step_post_hook(OwnHook(self._after_step)))
        self._batch_size = 0
        self._entered: int | None = None
        self._went_backward = False
        self._stepping: Optimizer | None = None
        self._turn_page()

    def close(self) -> None:
        """Takes all hooks off; reports what is pending."""
        self._handles.remove()
        self.watch.close()

    def discard(self) -> None:
        """Takes all hooks off; tells the loggers nothing more."""
        self._discarded = True
        self.close()

    def resumed(self) -> None:
        """The watch has been told at which step the training is."""
        self._turn_page()

    def batch_begins(self, batch: Any, batch_idx: int) -> None:
        """A training batch begins.

        Args:
            batch: as the data loader gave it.
            batch_idx: its number.
        """
        self.interrupted()
        self._went_backward = False
        self._batch_idx = batch_idx
        if self.watch.sampling:
            self.watch.observe(batch=batch, gradients=False)
        if self.watch.sampling or not self._automatic:
            self._batch_size = batch_size(batch)
            self._enter(self._batch_size)

    def backward_begins(self, loss: Tensor) -> None:
        """The forward is over.

        Args:
            loss: what `backward` is called on [L].
        """
        if self._stepping is not None or not self.watch.sampling:
            return  # one evaluation of the closure counts, the first
        self._went_backward = True
        self._leave(completed=True)
        parts = self.trainer.accumulate_grad_batches if self._automatic else 1
        self._losses.append(unscaled(self.trainer, loss) * parts)
        losses = torch.stack([item.reshape(()) for item in self._losses])
        self.watch.observe(
            gradients=False,  # they are not there yet
            loss=losses.mean() if self._automatic else losses.sum(),
            batch_size=(self._samples or self._batch_size) or None,
            epoch=self.trainer.current_epoch,
        )

    def backward_ended(self) -> None:
        """With manual optimization, the user may clip next, and another forward may follow."""
        if self._automatic or self._stepping is not None:
            return
        if not self._tracks_clipping:
            self.watch.observe()
        self._enter(0)

    def about_to_step(self, optimizer: Optimizer) -> None:
        """The gradients are there; in automatic optimization they are not clipped yet.

        Args:
            optimizer: that is about to step, or evaluates its closure once more.
        """
        if not self.watch.sampling or self._stepping is optimizer:
            return
        self._stepping = optimizer
        self._leave(completed=self._went_backward or not self._automatic)
        if self._automatic and not self._tracks_clipping:
            self.watch.observe()

    def batch_ends(self) -> None:
        """A training batch is over."""
        self.interrupted()
        if self._stepping is not None:  # the loss scaler skipped the step
            self._stepping = None
            self._turn_page()

    def interrupted(self) -> None:
        """Whatever runs now is no forward of the training."""
        self._leave(completed=self._went_backward)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._isolation.run(PART, self._stepped)

    def _stepped(self) -> None:
        self._stepping = None
        if self.watch.step != self._step:
            self._leave(completed=True)
            self._turn_page()
        if not self._automatic:
            self._enter(0)

    def _turn_page(self) -> None:
        """A new optimizer step begins, or one is tried again."""
        self._step = self.watch.step
        self._losses: list[Tensor] = []
        self._samples = 0

    def _sinks(self, options: Options) -> list[gradwatch.Sink]:
        def may_speak() -> bool:
            return not self._discarded and self._is_current()

        return logger_sinks(self.trainer.loggers, self._axis, may_speak, options)

    def _enter(self, samples: int) -> None:
        if not self.watch.sampling or self._entered is not None:
            return
        self._axis.note(self.watch.step)
        self._entered = samples
        self._samples += samples
        self.watch.forward_begins(samples or None)

    def _leave(self, *, completed: bool) -> None:
        if self._entered is None:
            return
        if not completed:
            self._samples -= self._entered
        self._entered = None
        self.watch.forward_ends(completed=completed)


class _Compiled(nn.Module):
    """Says what Lightning hides: that the methods of a module are compiled; it is never called."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._orig_mod = module


def _attached(
    module: nn.Module, optimizers: Sequence[Optimizer], *, track_clipping: bool, **arguments: Any
) -> gradwatch.Watch:
    try:
        return gradwatch.watch(module, optimizers, track_clipping=track_clipping, **arguments)
    except AttachError:
        if not track_clipping:
            raise
        # This torch may hide its clipping: then the report says what is missing.
        return gradwatch.watch(module, optimizers, **arguments)


def _arguments(
    options: Options, trainer: Any, of_loggers: Sequence[gradwatch.Sink]
) -> dict[str, Any]:
    """The arguments of `gradwatch.watch`."""
    given = options.for_watch()
    if trainer.fast_dev_run:  # Lightning drops its own loggers and checkpoints, too
        given["logdir"] = None
    files: list[gradwatch.Sink] = []
    if given["logdir"] is not None and any(map(draws_page, trainer.loggers)):
        # The record only: a second page in the same folder would draw every curve twice.
        files, given["logdir"] = [JsonlSink(given["logdir"])], None
    given["sinks"] = [*files, *of_loggers, *options.sinks]
    given["train_size"] = options.train_size or train_size(trainer)
    given["planned_steps"] = options.planned_steps or planned_steps(trainer)
    if trainer.world_size > 1:
        given["distributed"] = True
    return given

"""The callback: what the Trainer says at each moment, passed on to the watch."""

import os
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any, ClassVar, Final
from weakref import WeakSet

from transformers.trainer_callback import (
    ExportableState,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)
from transformers.training_args import TrainingArguments
from typing_extensions import override

from gradwatch import Bound, Monitor, Recommendation, Report, Rule, Sink, Watch
from gradwatch.announce import OnRecommendation
from gradwatch.capture.probe.probes import LossFn
from gradwatch.isolation import OnError, logger
from gradwatch.options import Options
from gradwatch_transformers.attachment import Attachment
from gradwatch_transformers.plain_options import plain_options


class GradwatchCallback(TrainerCallback, ExportableState):
    """Watches every training of a Trainer.

    Prefer `gradwatch_transformers.attach(trainer)`, which makes one and puts it in its place; given
    as `Trainer(callbacks=[GradwatchCallback()])` its values reach `state.log_history` and its own
    files, not the loggers of `report_to`, which the Trainer calls before it.

    All arguments are checked at once. Whatever fails later is reported once through the logger
    `gradwatch`, and the training goes on.

    Args:
        logdir: folder for the record of the run and TensorBoard files with bounds and layers.
        monitors: what to measure; `gradwatch.presets.standard()` by default.
        bounds: what it should be; `gradwatch.presets.bounds()` by default.
        rules: what to do about it; `gradwatch.presets.rules()` by default.
        sinks: who is told besides the loggers and the files in `logdir`.
        every_n_steps: measure every so many optimizer steps, from step 0 on.
        log_every_n_steps: report every so many steps; a multiple of `every_n_steps`.
        include: patterns "metric" or "metric/scope" of what to report; None for all.
        exclude: patterns of what to leave out of that.
        train_size: number of training samples; by default the length of the train dataset.
        planned_steps: planned number of optimizer steps; by default the Trainer's own.
        tag_prefix: first part of all names.
        per_layer: also give the loggers what is about single parameters, layers and blocks.
        loss_fn: gives the training loss of the model and a batch, for probes that evaluate it
            again; by default the loss that the model returns.
        probe_batch: a batch for the probes that need no fresh one, always the same.
        budget: share of the training time that probes may take; None runs every probe in every
            sampled step.
        on_recommendation: `collect`, `warn`, `raise`, or a callable that gets each new one.
        on_error: `disable` switches a failing part off; `raise` lets the error through.

    Raises:
        ConfigError: if an argument cannot work.
        RecordError: if `logdir` cannot be written.
    """

    _living: ClassVar[WeakSet["GradwatchCallback"]] = WeakSet()

    def __init__(
        self,
        *,
        logdir: str | os.PathLike[str] | None = None,
        monitors: Iterable[Monitor] | None = None,
        bounds: Iterable[Bound] | None = None,
        rules: Iterable[Rule] | None = None,
        sinks: Iterable[Sink] = (),
        every_n_steps: int = 50,
        log_every_n_steps: int = 50,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        train_size: int | None = None,
        planned_steps: int | None = None,
        tag_prefix: str = "gradwatch",
        per_layer: bool = False,
        loss_fn: LossFn | None = None,
        probe_batch: Any = None,
        budget: float | None = 0.02,
        on_recommendation: OnRecommendation = "collect",
        on_error: OnError = "disable",
    ) -> None:
        given = {name: value for name, value in locals().items() if name in _NAMES}
        self._attachment = Attachment(Options(**given).checked())
        self.saved: dict[str, Any] | None = None  # set by a Trainer that restores its callbacks
        self._living.add(self)

    @property
    def watch(self) -> Watch | None:
        """The watch of the training under way or of the last one; None before the first."""
        return self._attachment.watch

    @property
    def recommendations(self) -> tuple[Recommendation, ...]:
        """The recommendations that stand since the newest report, the most severe first."""
        return () if self.watch is None else self.watch.recommendations

    def summary(self) -> Report:
        """The newest of every measurement, verdict and recommendation.

        Returns:
            A report; `print` shows it as a table.

        Raises:
            AttachError: if no training has been watched yet.
        """
        return self._attachment.summary()

    def close(self) -> None:
        """Takes every hook off; for a training that was interrupted. May be called again."""
        self._attachment.close()

    def __enter__(self) -> "GradwatchCallback":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def belongs_to(self, trainer: Any) -> None:
        """Lets the callback know its Trainer; `attach` does it.

        Args:
            trainer: whose callback this is; held weakly.
        """
        self._attachment.belongs_to(trainer)

    # What the Trainer asks for in a checkpoint.

    @override
    def state(self) -> dict[str, Any]:
        """What the Trainer saves in its checkpoint, as plain values."""
        return {
            "args": plain_options(self._attachment.options),
            "attributes": {"saved": self._attachment.state()},
        }

    # What the Trainer tells.

    @override
    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """The Trainer is made."""
        self._attachment.has_arguments(args)

    @override
    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **given: Any,
    ) -> None:
        """The model is prepared: the watch begins."""
        self._take_the_place_of_the_first(args)
        name = type(self).__name__  # under which the Trainer keeps the state
        saved = self.saved if self.saved is not None else _saved_in(state, name)
        self.saved = None
        self._attachment.begin(
            self,
            args,
            state,
            model=given["model"],
            optimizer=given["optimizer"],
            dataloader=given.get("train_dataloader"),
            saved=saved,
        )
        # After a checkpoint without it the Trainer fails at the next one if it is missing.
        _states_in(state).setdefault(name, self.state())

    @override
    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """The first micro-batch of an optimizer step is next."""
        self._attachment.step_begins(state.epoch)

    @override
    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: Any,
    ) -> None:
        """The gradients of the step are there, clipped."""
        self._attachment.about_to_step()

    @override
    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """The optimizer has stepped."""
        self._attachment.stepped()

    @override
    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **given: Any,
    ) -> None:
        """The loggers that come later see what is added to `logs`."""
        logs = given.get("logs")
        if logs is not None and "loss" in logs:
            self._attachment.add_to(logs, state)

    @override
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """The training is over."""
        self._attachment.end(state)

    def _take_the_place_of_the_first(self, args: TrainingArguments) -> None:
        """A Trainer that restores its callbacks has put a new object in the place of the first.

        The new one shares all with the first, so that the user's own reference and the monitors
        and sinks, which no checkpoint can hold, live on.
        """
        if self._attachment.is_known:
            return
        for other in self._living:
            if other._attachment.is_of(args):
                self._attachment = other._attachment
                return
        self._attachment.has_arguments(args)
        if self.saved is not None:
            logger.warning(
                "the Trainer restored the callback of gradwatch from a checkpoint, which cannot "
                "hold monitors, bounds, rules, sinks and functions: the default ones are used. "
                "gradwatch_transformers.attach(trainer, ...) keeps them."
            )


_NAMES: Final = frozenset(Options.__dataclass_fields__)


def _states_in(state: TrainerState) -> dict[str, Any]:
    """Of all callbacks, by the names of their classes."""
    states: Any = state.stateful_callbacks  # a dictionary, in spite of its annotation
    found: dict[str, Any] = states
    return found


def _saved_in(state: TrainerState, name: str) -> dict[str, Any] | None:
    if not state.global_step:
        return None
    found = _states_in(state).get(name)
    newest = found[-1] if isinstance(found, list) and found else found
    attributes = newest.get("attributes", {}) if isinstance(newest, dict) else {}
    saved: dict[str, Any] | None = attributes.get("saved")
    return saved

"""The callback for `Trainer(callbacks=[...])`."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from typing import Any, ClassVar, Final, Self

import gradwatch
from gradwatch.announce import OnRecommendation
from gradwatch.capture.probe.probes import LossFn
from gradwatch.errors import GradwatchError
from gradwatch.isolation import Isolation, OnError
from gradwatch.isolation import logger as log
from gradwatch.options import Options
from gradwatch_lightning.base import with_lightning_base
from gradwatch_lightning.fit import PART, Fit
from gradwatch_lightning.resume import resume, state_of
from gradwatch_lightning.trainer_facts import optimizes

_OF_LIGHTNING: Final = ("log", "log_dict")
"""Methods of the module that the Trainer puts onto its callbacks; they would drag it along."""


def _isolated(hook: Callable[..., None]) -> Callable[..., None]:
    """A hook that cannot stop the training; if it fails, the watch is closed."""

    @wraps(hook)
    def isolated(self: "GradwatchCallback", *args: Any, **kwargs: Any) -> None:
        if self._fit is None:
            return
        self._isolation.run(PART, hook, self, *args, **kwargs)
        if PART in self._isolation.failures:
            self._end()

    return isolated


# For type checkers the Callback of either package; in truth it is chosen in `__new__`.
_EitherCallback: Any = object


class GradwatchCallback(_EitherCallback):  # type: ignore[misc]
    """Watches every `trainer.fit`: `Trainer(callbacks=[GradwatchCallback()])`.

    Works with `lightning` and with `pytorch_lightning`, with automatic and with manual
    optimization. Values go to all loggers of the Trainer, recommendations to those that show
    text, else to the log. The state is saved in checkpoints, so that a resumed run goes on where
    it was.

    Args:
        logdir: folder for the record of the run, and for its TensorBoard files unless the
            Trainer's own TensorBoardLogger draws them; None writes nothing.
        monitors: what to measure; `presets.standard()` by default.
        bounds: what it should be; `presets.bounds()` by default.
        rules: what to do about it; `presets.rules()` by default.
        sinks: who is told besides the loggers and `logdir`.
        every_n_steps: measure every so many optimizer steps, from step 0 on.
        log_every_n_steps: report every so many steps; a multiple of `every_n_steps`.
        include: patterns "metric" or "metric/scope" of what to report; None for all.
        exclude: patterns of what to leave out of that.
        train_size: number of training samples; by default the length of the training set.
        planned_steps: planned number of optimizer steps; by default what the Trainer plans.
        tag_prefix: first part of the names that loggers see.
        per_layer: loggers also get the values of single parameters, layers and blocks; None
            gives them to TensorBoard only.
        loss_fn: gives the training loss of the model and a batch, for probes that evaluate it
            again; by default the module's own training step.
        probe_batch: a batch for the probes that need no fresh one, always the same.
        budget: share of the training time that probes may take; None runs every probe in every
            sampled step.
        on_recommendation: `collect`, `warn`, `raise`, or a callable that gets each new one.
        on_error: `disable` switches a failing part off; `raise` lets the error through.

    Raises:
        MissingExtraError: if no Lightning package is installed.
        ConfigError: if an argument cannot work.
        RecordError: if `logdir` cannot be written.
    """

    _public_class: ClassVar[type["GradwatchCallback"]]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Makes it an instance of the Callback class that the user's Trainer knows."""
        made: Self = object.__new__(with_lightning_base(cls))
        return made

    def __init__(
        self,
        logdir: str | os.PathLike[str] | None = None,
        *,
        monitors: Iterable[gradwatch.Monitor] | None = None,
        bounds: Iterable[gradwatch.Bound] | None = None,
        rules: Iterable[gradwatch.Rule] | None = None,
        sinks: Iterable[gradwatch.Sink] = (),
        every_n_steps: int = 50,
        log_every_n_steps: int = 50,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        train_size: int | None = None,
        planned_steps: int | None = None,
        tag_prefix: str = "gradwatch",
        per_layer: bool | None = None,
        loss_fn: LossFn | None = None,
        probe_batch: Any = None,
        budget: float | None = 0.02,
        on_recommendation: OnRecommendation = "collect",
        on_error: OnError = "disable",
    ) -> None:
        self._options = Options(
            logdir=logdir,
            monitors=monitors,
            bounds=bounds,
            rules=rules,
            sinks=sinks,
            every_n_steps=every_n_steps,
            log_every_n_steps=log_every_n_steps,
            include=include,
            exclude=exclude,
            train_size=train_size,
            planned_steps=planned_steps,
            tag_prefix=tag_prefix,
            per_layer=per_layer,
            loss_fn=loss_fn,
            probe_batch=probe_batch,
            budget=budget,
            on_recommendation=on_recommendation,
            on_error=on_error,
        ).checked()
        self._isolation = Isolation(on_error)
        self._saved: dict[str, Any] = {}
        self._fit: Fit | None = None
        self._watch: gradwatch.Watch | None = None

    @property
    def watch(self) -> gradwatch.Watch | None:
        """The watch of the fit under way or, after it, of the last one; None before."""
        return self._watch

    @property
    def recommendations(self) -> tuple[gradwatch.Recommendation, ...]:
        """The recommendations that stand since the newest report, the most severe first."""
        return () if self._watch is None else self._watch.recommendations

    def summary(self) -> gradwatch.Report:
        """The newest of every measurement, verdict and recommendation; `print` shows a table."""
        if self._watch is None:
            return gradwatch.Report(step=0, notes=("nothing has been measured yet",))
        return self._watch.summary()

    # The moments of a fit, in the order in which Lightning calls them.

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Attaches the watch: batch-size and learning-rate finders have run, all is restored.

        Raises:
            GradwatchError: if model or optimizers cannot be watched.
        """
        self._end()
        self._isolation.failures.clear()
        if not optimizes(trainer):
            log.info("no optimizer of the Trainer holds a parameter, so nothing is watched")
            return
        refused = self._isolation.run(PART, self._begin, trainer, pl_module)
        if refused is not None:
            raise refused

    @_isolated
    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """A forward begins."""
        self._live.batch_begins(batch, batch_idx)

    @_isolated
    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        """The forward is over, and here is its loss."""
        self._live.backward_begins(loss)

    @_isolated
    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        """With manual optimization, another forward may begin."""
        self._live.backward_ended()

    @_isolated
    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """The gradients are there."""
        self._live.about_to_step(optimizer)

    @_isolated
    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The batch is over."""
        self._live.batch_ends()

    @_isolated
    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """What runs now is no training, also after a batch that was skipped."""
        self._live.interrupted()

    @_isolated
    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """What runs now is no training, also after a batch that was skipped."""
        self._live.interrupted()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Closes the watch, while the loggers are still open."""
        self._end()

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Closes the watch if that has not been done."""
        self._end()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Closes the watch if that has not been done."""
        self._end()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Closes the watch: after an error or Ctrl-C, Lightning calls nothing else."""
        self._end()

    # What a checkpoint holds.

    @property
    def state_key(self) -> str:
        """Under which checkpoints hold the state."""
        return "gradwatch"

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold so that a resumed run goes on where it was.

        Returns:
            Plain values only; empty before the first training step.
        """
        if self._fit is not None:
            self._isolation.run("state", self._save, self._fit)
        return dict(self._saved)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` returned, before a fit or in the midst of one.

        Args:
            state_dict: from a checkpoint.
        """
        self._saved = dict(state_dict) if isinstance(state_dict, Mapping) else {}
        if self._fit is not None:  # a learning-rate finder has trained, and puts all back
            self._isolation.run(PART, self._begin_anew, self._fit)

    def __getstate__(self) -> dict[str, Any]:
        """All but the training under way: a copy watches its own."""
        saved = self.state_dict()
        kept = {name: value for name, value in vars(self).items() if name not in _OF_LIGHTNING}
        fresh = Isolation(self._options.on_error)
        return kept | {"_saved": saved, "_fit": None, "_watch": None, "_isolation": fresh}

    def __reduce__(self) -> tuple[Any, ...]:
        return _made_again, (self._public_class, self.__getstate__())

    @property
    def _live(self) -> Fit:
        if self._fit is None:
            raise RuntimeError("no fit is under way")
        return self._fit

    def _begin(self, trainer: Any, module: Any) -> GradwatchError | None:
        try:
            fit = Fit(
                self._options, trainer, module, lambda: self in trainer.callbacks, self._isolation
            )
        except GradwatchError as refused:  # something that the user must know before step 0
            return refused
        self._fit, self._watch = fit, fit.watch
        resume(fit, self._saved)
        return None

    def _begin_anew(self, fit: Fit) -> None:
        self._fit = None
        fit.discard()
        refused = self._begin(fit.trainer, fit.module)
        if refused is not None:
            raise refused

    def _save(self, fit: Fit) -> None:
        self._saved = state_of(fit)

    def _end(self) -> None:
        fit, self._fit = self._fit, None
        if fit is not None:
            self._isolation.run("closing", fit.close)
            self._isolation.run("state", self._save, fit)


def _made_again(cls: type[GradwatchCallback], state: Mapping[str, Any]) -> GradwatchCallback:
    made = cls.__new__(cls)
    made.__dict__.update(state)
    return made

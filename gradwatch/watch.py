"""The watch: where monitors, bounds, rules and sinks are joined to a live training."""

import atexit
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any
from weakref import WeakSet

from torch import Tensor, nn
from torch.optim import Optimizer

from gradwatch import presets
from gradwatch.announce import Announcer, OnRecommendation
from gradwatch.arguments import (
    STATE_VERSION,
    check_cadence,
    check_count,
    check_loss_fn,
    check_share,
    checked_state,
    distinct_metrics,
    installed_versions,
    plain_optimizers,
    typed,
)
from gradwatch.capture.forward.structure import add_weight_facts
from gradwatch.capture.part import REPORT
from gradwatch.capture.probe.probes import LossFn, MakeObjective, Probes
from gradwatch.capture.ranks.ranks import Ranks
from gradwatch.capture.sample import Sample
from gradwatch.capture.selection import Selection
from gradwatch.capture.session import Session
from gradwatch.errors import AttachError, ClosedError, ConfigError
from gradwatch.interfaces import Bound, Monitor, Need, Rule, Sink
from gradwatch.isolation import Isolation, OnError
from gradwatch.pipeline import Parts, Pipeline, UseOfProbes
from gradwatch.records import ModelInfo, ProbeUse, Recommendation, Report, RunInfo
from gradwatch.serialise import from_json, to_json
from gradwatch.standing import Standing


class Watch:
    """Watches one training until it is closed; made by `gradwatch.watch`.

    Args:
        model: the module that the training loop calls.
        optimizer: the torch optimizer of its parameters, or several.
        logdir: folder for the record of the run and its TensorBoard files; None writes nothing.
        monitors: what to measure; `presets.standard()` by default.
        bounds: what it should be; `presets.bounds()` by default.
        rules: what to do about it; `presets.rules()` by default.
        sinks: who is told besides the files in `logdir`.
        every_n_steps: measure every so many optimizer steps, from step 0 on.
        log_every_n_steps: report every so many steps; a multiple of `every_n_steps`.
        include: patterns "metric" or "metric/scope" of what to report; None for all.
        exclude: patterns of what to leave out of that.
        train_size: number of training samples, for statements that need it.
        planned_steps: planned number of optimizer steps, likewise.
        tag_prefix: first part of the TensorBoard tags.
        on_recommendation: `collect`, `warn`, `raise`, or a callable that gets each new one.
        on_error: `disable` switches a failing part off; `raise` lets the error through.
        track_loss: see the scalar that `backward()` is called on; needed for a loss that is
            computed outside the model and not given to `observe`.
        loss_fn: gives the loss that is trained on, `loss_fn(model, batch)`, for probes that
            evaluate it again; it must call the model that it is given. None for a model that
            returns its loss.
        probe_batch: a batch for the probes that need no fresh one, always the same.
        budget: share of the training time that probes may take; None runs every probe in every
            sampled step.
        objective: instead of `loss_fn`, makes the loss from the last batch; for adapters.
        track_clipping: see torch's `clip_grad_norm_` and `clip_grad_value_`, for gradient norms
            before clipping.
        distributed: all ranks of the process group train this model together, so that values are
            combined over them and rank 0 tells the sinks; every rank must be watched. None finds
            out: it is so if the model is wrapped in DDP or its parameters are sharded.

    Raises:
        ConfigError: if an argument cannot work.
        AttachError: if the model or the optimizer cannot be watched.
        RecordError: if `logdir` cannot be written.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
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
        on_recommendation: OnRecommendation = "collect",
        on_error: OnError = "disable",
        loss_fn: LossFn | None = None,
        probe_batch: Any = None,
        budget: float | None = 0.02,
        objective: MakeObjective | None = None,
        track_loss: bool = False,
        track_clipping: bool = False,
        distributed: bool | None = None,
    ) -> None:
        check_cadence(every_n_steps, log_every_n_steps)
        check_count("train_size", train_size)
        check_count("planned_steps", planned_steps)
        check_share("budget", budget)
        check_loss_fn(loss_fn, probe_batch)
        optimizers = plain_optimizers(model, optimizer)
        self._refuse_second(optimizers)
        wanted = typed("monitors", Monitor, presets.standard() if monitors is None else monitors)
        metrics = distinct_metrics(wanted)
        selection = Selection(include, exclude, metrics)
        kept = tuple(
            item for item in wanted if any(selection.keeps_some_of(name) for name in item.metrics)
        )
        self._process = os.getpid()
        self._log_every = log_every_n_steps
        self._closed = False
        self._reports = 0
        self._standing = Standing()
        self._isolation = Isolation(on_error)
        ranks = Ranks(model, distributed)
        self._announcer = Announcer(on_recommendation, self._isolation, speaks=ranks.speaks)
        parts = Parts(
            monitors=kept,
            bounds=typed("bounds", Bound, presets.bounds() if bounds is None else bounds),
            rules=typed("rules", Rule, presets.rules() if rules is None else rules),
            sinks=_sinks(logdir, tag_prefix, sinks) if ranks.speaks else (),
        )
        names = parts.names()
        needs: frozenset[Need] = frozenset(need for item in kept for need in item.needs)
        self._session = Session(
            model,
            optimizers,
            ranks=ranks,
            parts=parts.on_all_ranks,
            on_sample=self._take,
            isolation=self._isolation,
            every_n_steps=every_n_steps,
            needs=needs,
            make_probes=partial(
                Probes,
                {names[id(item)]: item for item in kept if item.probed},
                model,
                self._isolation,
                budget=budget,
                every_n_steps=every_n_steps,
                loss_fn=loss_fn,
                probe_batch=probe_batch,
                objective=objective,
            ),
            track_loss=track_loss,
            track_clipping=track_clipping,
            facts={"train_size": train_size, "planned_steps": planned_steps},
        )
        self._pipeline = Pipeline(
            parts, selection, self._isolation, self._session.info, self._session.parts
        )
        self._run = RunInfo(
            model=self._session.info,
            metrics=metrics,
            bounded=tuple(dict.fromkeys(bound.metric for bound in parts.bounds)),
            configuration={
                "every_n_steps": every_n_steps,
                "log_every_n_steps": log_every_n_steps,
                "include": None if include is None else list(include),
                "exclude": None if exclude is None else list(exclude),
                "track_loss": track_loss,
                "track_clipping": track_clipping,
                "budget": budget,
                "ranks": ranks.size,
            },
            versions=installed_versions(),
        )
        _open_watches.add(self)

    def __enter__(self) -> "Watch":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def step(self) -> int:
        """Optimizer steps finished."""
        return self._session.step

    @property
    def sampling(self) -> bool:
        """Whether the step under way is measured; on others nothing that is told is kept."""
        return self._session.sampling

    @property
    def model_info(self) -> ModelInfo:
        """What is known about the model."""
        return self._session.info

    @property
    def recommendations(self) -> tuple[Recommendation, ...]:
        """The recommendations that stand since the newest report, the most severe first."""
        return self._standing.summary().recommendations

    @property
    def failures(self) -> Mapping[str, str]:
        """The parts that failed and are switched off, with what happened."""
        return dict(self._isolation.failures)

    def summary(self) -> Report:
        """The newest of every measurement, verdict and recommendation.

        Steps that were sampled since the last report are reported first.

        Returns:
            A report; `print` shows it as a table.
        """
        self._report_pending()
        report = self._standing.summary()
        notes = dict.fromkeys([*report.notes, *self._isolation.notes])
        return replace(report, notes=tuple(notes))

    def observe(
        self,
        *,
        loss: float | Tensor | None = None,
        batch_size: int | None = None,
        epoch: float | None = None,
        batch: Any = None,
        gradients: bool = True,
    ) -> None:
        """Tells the watch what it cannot see; optional, after `backward()`, before clipping.

        The gradients are measured as they are at this moment, unscaled ones under loss scaling,
        which gives the norms before clipping; not any more once the watch has seen them clipped.
        Costs nothing on steps that are not sampled.

        Args:
            loss: of this step [L]; a tensor is not read on the host.
            batch_size: samples of this step over all micro-batches; those of this rank.
            epoch: epochs finished.
            batch: of this step, as `loss_fn` takes it, for probes that evaluate the loss again; not
                needed where the model's only argument is the batch. It is let go at the end of
                the step.
            gradients: also measure the gradients; False for a loop that may have clipped them
                out of the watch's sight.

        Raises:
            ClosedError: if the watch is closed.
            ConfigError: if an argument is no number.
        """
        self._check_open("observe")
        self._session.observe(loss, batch_size, epoch, gradients=gradients)
        if batch is not None:
            self._session.tell_batch(batch)

    def weigh_microbatch(self, weight: float | Tensor | None) -> None:
        """Says what a micro-batch weighs in the average that the step's gradient is.

        For loops that do not weigh all micro-batches alike, such as by their number of tokens;
        call it for each micro-batch of a sampled step, after its forward and before the next one.
        Without it, all weigh the same. Costs nothing on steps that are not sampled.

        Args:
            weight: in any unit, the same for all micro-batches and ranks; a tensor is not read on
                the host. None if it is not known, and is not the same for all.

        Raises:
            ClosedError: if the watch is closed.
            ConfigError: if `weight` is neither one number from 0 up nor a tensor of one.
        """
        self._check_open("weigh_microbatch")
        self._session.microbatches.weigh(weight)

    def forward_begins(self, batch_size: int | None = None) -> None:
        """Says that a training forward begins, where the loop does not call the model itself.

        Only for loops that train by calling a method of the model or its parts, as frameworks
        do; from then on, calls of the model itself do not count as forwards.

        Args:
            batch_size: samples that enter; None if that is told otherwise.

        Raises:
            ClosedError: if the watch is closed.
            ConfigError: if `batch_size` is no positive integer.
        """
        self._check_open("forward_begins")
        check_count("batch_size", batch_size)
        self._session.forward_begins(batch_size or 0)

    def forward_ends(self, *, completed: bool = True) -> None:
        """Says that the forward is over; `backward()` comes next.

        Args:
            completed: its loss will be trained on; False takes its samples back.

        Raises:
            ClosedError: if the watch is closed.
        """
        self._check_open("forward_ends")
        self._session.forward_ends(completed)

    def clip_grad_norm_(
        self,
        max_norm: float,
        norm_type: float = 2.0,
        *,
        error_if_nonfinite: bool = False,
        foreach: bool | None = None,
    ) -> Tensor:
        """Clips the gradients as `torch.nn.utils.clip_grad_norm_` does, and records it.

        Args:
            max_norm: the largest norm to let through [L/P].
            norm_type: order of the norm.
            error_if_nonfinite: as in torch.
            foreach: as in torch.

        Returns:
            The norm before clipping [L/P].

        Raises:
            ClosedError: if the watch is closed.
        """
        self._check_open("clip_grad_norm_")
        return self._session.clip(
            max_norm, norm_type=norm_type, error_if_nonfinite=error_if_nonfinite, foreach=foreach
        )

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold so that a resumed run continues the record.

        Steps that were sampled since the last report are reported first.

        Returns:
            Plain values only.
        """
        self._report_pending()
        return {
            "version": STATE_VERSION,
            "step": self.step,
            "model": to_json(self._session.info) if self._reports else None,
            "pipeline": self._pipeline.state_dict(),
            "announced": self._announcer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues an earlier run; call it before the first step.

        Args:
            state: what `state_dict` returned.

        Raises:
            ClosedError: if the watch is closed.
            ConfigError: if steps have been watched already, or the state is of another version
                or damaged.
        """
        self._check_open("load_state_dict")
        if self.step or self._reports:
            raise ConfigError(
                f"load_state_dict must be called before the first step, got a watch at step "
                f"{self.step}; make a new watch and load the state at once"
            )
        step, model = checked_state(state)
        info = self._session.info if model is None else from_json(ModelInfo, model)
        try:
            self._pipeline.load_state_dict(state["pipeline"], info)
            self._announcer.load_state_dict(state["announced"])
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"the state must be what Watch.state_dict returned, got one whose pipeline is "
                f"damaged ({error!r}); start without it"
            ) from error
        if model is None:
            self._session.start_at(step)
        else:
            self._session.resume(info, step)
        self._run = replace(self._run, first_step=step, advised=self._pipeline.advised)

    def close(self) -> None:
        """Reports what is pending, takes every hook off and closes the sinks.

        May be called again; also called at interpreter exit.
        """
        if self._closed:
            return
        self._closed = True
        _open_watches.discard(self)
        with ExitStack() as at_the_end:  # whatever the last report raises
            at_the_end.callback(self._pipeline.close)
            at_the_end.callback(self._isolation.run, "closing", self._session.close)
            if self._pipeline.has_pending:
                self._isolation.run("last report", self._report)

    def watches(self, optimizer: Optimizer) -> bool:
        """Whether this watch is attached to an optimizer."""
        return any(item is optimizer for item in self._session.optimizers)

    @staticmethod
    def _refuse_second(optimizers: Sequence[Optimizer]) -> None:
        for optimizer in optimizers:
            if any(other.watches(optimizer) for other in _open_watches):
                raise AttachError(
                    f"this {type(optimizer).__name__} is watched already; close() the first "
                    "watch, or add monitors to it instead of making a second one"
                )

    def _take(self, sample: Sample | None, failures: Tensor | None) -> None:
        self._pipeline.read(sample, failures)
        if self.step % self._log_every == 0:
            self._report(self._time_probes)
            self._isolation.agree()

    def _report_pending(self) -> None:
        # Ranks that train together report at the same steps only: advice is a function of the
        # reports, and what acts on it must act everywhere at once.
        if self._pipeline.has_pending and not self._session.exchange.joint:
            self._isolation.run(REPORT, self._report)

    def _report(self, use_of_probes: UseOfProbes | None = None) -> None:
        use = use_of_probes or self._session.use_of_probes
        report = self._pipeline.report(self._run, self._learn, use)
        if report is not None:
            self._reports += 1
            self._standing.add(report)
            self._announcer.announce(report.recommendations)

    def _time_probes(self, step: int) -> ProbeUse | None:
        # At these steps only: all ranks must count with the same clock.
        self._session.read_clock(self._pipeline.clock)
        return self._session.use_of_probes(step)

    def _learn(self, facts: Mapping[str, Sequence[float]]) -> ModelInfo:
        self._session.info = add_weight_facts(self._session.info, facts)
        return self._session.info

    def _check_open(self, method: str) -> None:
        if self._closed:
            raise ClosedError(
                f"Watch.{method} was called after close(); make a new watch with gradwatch.watch"
            )


def _sinks(
    logdir: str | os.PathLike[str] | None, tag_prefix: str, sinks: Iterable[Sink]
) -> tuple[Sink, ...]:
    return (*presets.files(logdir, tag_prefix), *typed("sinks", Sink, sinks))


watch = Watch
"""Attaches a watch to a training in one line: `watch = gradwatch.watch(model, optimizer)`."""

_open_watches: WeakSet[Watch] = WeakSet()


@atexit.register
def _close_open_watches() -> None:
    """A loop that ends without `close` must not lose its last values."""
    for item in list(_open_watches):
        if item._process == os.getpid():  # a forked child has neither the files nor the threads
            item.close()

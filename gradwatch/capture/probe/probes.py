"""The probes of a watch: when they run, on what, and what they found."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, Final

import torch
from torch import Tensor, nn

from gradwatch.capture.joint_sums import JointSums
from gradwatch.capture.model.names import unwrap_model
from gradwatch.capture.probe.batch import LastBatch, ObjectiveError
from gradwatch.capture.probe.limits import hopeless, limit_of
from gradwatch.capture.probe.objective import LossFunction, Objective, OwnLoss
from gradwatch.capture.probe.schedule import Clock, Schedule
from gradwatch.capture.probe.stopwatch import Stopwatch
from gradwatch.capture.probe.undisturbed import undisturbed
from gradwatch.capture.probe.view import ProbeView
from gradwatch.capture.probe.whole import sharded_parameters
from gradwatch.interfaces import Monitor
from gradwatch.isolation import Isolation, KnownLimitError
from gradwatch.numerics.second_derivative import NoSecondDerivativeError
from gradwatch.records import ProbeUse

MakeObjective = Callable[[LastBatch], Objective]
LossFn = Callable[[nn.Module, Any], Tensor]

PREFIX: Final = "probe of "
"""How a probe is called in messages, before the name of its monitor."""

PATIENCE: Final = 3
"""Evaluations in vain, one after the other, after which a probe is not tried again."""


class Probes:
    """Lets monitors run the model again in sampled steps, as far as the budget allows.

    Args:
        monitors: those that probe, by the name they have in messages.
        model: as the user passed it.
        isolation: what to do when a probe fails.
        pause: gives a context in which the hooks of the watch do nothing.
        budget: share of the training time; None probes in every sampled step.
        every_n_steps: from one sampled step to the next.
        loss_fn: gives the loss that is trained on; None if the model returns it.
        probe_batch: a fixed batch for the probes that need no fresh one.
        objective: makes the objective instead, from the last batch; for adapters.

    Attributes:
        batches: the last batch of the step under way.
        schedule: which probes run when.
        names: of all probes.
        numbers: of all that they measure.
        notes: what the probes of the step could not measure, and why.
    """

    def __init__(
        self,
        monitors: Mapping[str, Monitor],
        model: nn.Module,
        isolation: Isolation,
        pause: Callable[[], AbstractContextManager[Any]],
        *,
        budget: float | None,
        every_n_steps: int = 1,
        loss_fn: LossFn | None = None,
        probe_batch: Any = None,
        objective: MakeObjective | None = None,
    ) -> None:
        self._monitors = {PREFIX + name: item for name, item in monitors.items()}
        self.names = tuple(self._monitors)
        self.numbers = tuple(name for item in monitors.values() for name in item.probed)
        self.batches = LastBatch()
        self.autocast: torch.dtype | None = None
        self._budget = budget
        self.schedule = Schedule(
            {name: item.probe_cost for name, item in self._monitors.items()}, budget, every_n_steps
        )
        self._model = unwrap_model(model)
        self._isolation = isolation
        self._pause = pause
        device = next((item.device for item in model.parameters()), torch.device("cpu"))
        self._stopwatch = Stopwatch(device)
        self._last = _last_objective(self._model, self.batches, loss_fn, objective)
        self._fixed = (
            LossFunction(self._model, loss_fn, self.batches, probe_batch)
            if loss_fn is not None and probe_batch is not None
            else None
        )
        self._joint = False
        self._sums: JointSums | None = None
        self._meet: Callable[[Sequence[int]], bool] = lambda lengths: False
        self._step = -1
        self._met_at = -1
        self._can_run = True
        self._in_vain: dict[str, int] = {}
        self._given_up: dict[str, str] = {}
        self._due: list[str] = []
        self._found: dict[str, Tensor] = {}
        self.notes: list[str] = []

    def join(self, sums: JointSums, meet: Callable[[Sequence[int]], bool]) -> None:
        """Lets probes add up over the ranks that train together.

        Args:
            sums: over the ranks.
            meet: says whether the others come to sums of these lengths now.
        """
        self._sums, self._meet = sums, meet

    def begin_step(self, step: int, *, sampled: bool, joint: bool = False) -> None:
        """A step begins, or begins anew because it raised.

        Args:
            step: its number.
            sampled: it is measured.
            joint: other ranks probe in the same steps, whatever happens on this one.
        """
        self.release()
        self._found, self.notes = {}, []
        self._joint, self._step = joint, step
        if sampled and self.names:
            elapsed = None if joint else self._stopwatch.elapsed
            self._due = self.schedule.due(step, without=self._off, elapsed=elapsed)

    @property
    def _off(self) -> frozenset[str]:
        """The probes that are off, as far as all ranks know."""
        isolation = self._isolation
        off = isolation.agreed if self._joint else frozenset(isolation.failures)
        # What nobody reads needs no measuring.
        return off | {name for name in self.names if name.removeprefix(PREFIX) in off}

    def called(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A training forward of a sampled step begins.

        Args:
            args: the positional arguments of the model.
            kwargs: its keyword arguments.
        """
        if self._due:
            self.batches.called(args, kwargs)
            self.autocast = autocast_type(self._model)

    def tell(self, batch: Any) -> None:
        """Says what the batch of the step is.

        Args:
            batch: as the loss function takes it.
        """
        if self._due:
            self.batches.tell(batch)

    def run(self, view: ProbeView, *, returned_loss: bool, able: bool = True) -> None:
        """Runs what is due, before the parameters move.

        Args:
            view: the step, without objectives.
            returned_loss: the model itself returned a loss in this step.
            able: this rank can probe; if not, it still takes part in the sums of the others.
        """
        due, self._due = self._due, []
        try:
            self._run_all(due, view, returned_loss, able)
        finally:
            self.release()

    def _run_all(
        self, due: Sequence[str], view: ProbeView, returned_loss: bool, able: bool
    ) -> None:
        view.objective = self._last if self.can_evaluate(returned_loss) else None
        view.fixed_objective = self._fixed
        self._can_run = view.objective is not None or view.fixed_objective is not None
        lengths = self._joint_sums(due, view)
        agreed = self._agreed(lengths)
        with self._keeping_word(lengths if agreed else {}) as left:
            for name in due:
                mine, found = left.pop(name, []), None
                # What is meant for all ranks is not told by one of them.
                if able and (agreed or not lengths.get(name)):
                    with self._stopwatch.time(name), self._taking_part(mine, view):
                        found = self._isolation.run(name, self._run_one, name, view)
                elif mine:
                    self._take_part(mine)
                self.schedule.ran(name, used=self._joint or bool(found))
                self._found |= found or {}
        self.notes += view.notes

    def _joint_sums(self, due: Sequence[str], view: ProbeView) -> dict[str, list[int]]:
        """How long the sums over the ranks are that each probe takes; none for a single process."""
        if self._sums is None or not self._joint:
            return {}
        return {name: self._sums_of(name, view) for name in due}

    def _agreed(self, lengths: Mapping[str, Sequence[int]]) -> bool:
        """Whether all ranks come to these sums now."""
        series = [length for each in lengths.values() for length in each]
        if not series or self._met_at == self._step:
            return False  # a step that raised and is taken again has had its meeting
        self._met_at = self._step
        return self._meet(series)

    def _sums_of(self, name: str, view: ProbeView) -> list[int]:
        count = self._count(name, view)
        if not count:
            return []
        sharded = sharded_parameters(self._model).values()
        whole = [sum(item.numel() for item in sharded)] if sharded else []
        wanted = view.of_optimizers(dict(self._model.named_parameters())).values()
        return [*whole, *([sum(item.numel() for item in wanted)] * count)]

    def _count(self, name: str, view: ProbeView) -> int:
        joint_sums = self._monitors[name].joint_sums
        if name not in self._isolation.failures:
            return self._isolation.run(name, joint_sums, view) or 0
        with suppress(Exception):  # it is off here, and the others do not know yet
            return joint_sums(view)
        return 0

    @contextmanager
    def _keeping_word(
        self, lengths: Mapping[str, Sequence[int]]
    ) -> Iterator[dict[str, Sequence[int]]]:
        """Takes part in all sums that were agreed, whatever leaves the block.

        Yields:
            The sums that are left of each probe, to be taken out.
        """
        left = dict(lengths)
        try:
            yield left
        finally:
            for each in left.values():
                self._take_part(each)

    def _take_part(self, lengths: Sequence[int]) -> None:
        if self._sums is not None:
            self._sums.begin(lengths)
            self._sums.finish()

    @contextmanager
    def _taking_part(self, lengths: Sequence[int], view: ProbeView) -> Iterator[None]:
        if self._sums is None or not lengths:
            yield
            return
        self._sums.begin(lengths)
        view.sums = self._sums
        try:
            yield
        finally:
            view.sums = None
            self._sums.finish()

    def can_evaluate(self, returned_loss: bool) -> bool:
        """Whether the loss on the last batch can be evaluated again, as far as is known.

        Args:
            returned_loss: the model itself returned a loss in this step.
        """
        return returned_loss or not isinstance(self._last, OwnLoss)

    def take(self) -> dict[str, Tensor]:
        """What the probes of the step found, by name."""
        return self._found

    def release(self) -> None:
        """Lets go of the batch."""
        self.batches.release()
        self._due = []

    def clock(self) -> list[float]:
        """Seconds since the watch was attached, then those spent in each probe; does not wait."""
        spent = self._stopwatch.seconds()
        return [self._stopwatch.elapsed, *(spent.get(name, 0.0) for name in self.names)]

    def read(self, step: int, clock: Sequence[float]) -> None:
        """Lets the schedule know what was spent.

        Args:
            step: optimizer steps finished.
            clock: as `clock` gives it, of all ranks added up.
        """
        elapsed, *spent = clock
        since = step - self.schedule.origin
        self.schedule.read(Clock(since, elapsed, dict(zip(self.names, spent, strict=True))))

    def use(self, step: int) -> ProbeUse | None:
        """What was spent, and what will be.

        Args:
            step: that is over.

        Returns:
            The same on all ranks that probe together; None if there is nothing to say.
        """
        # What this rank gave up others need not have.
        off = self._off if self._joint else self._off | frozenset(self._given_up)
        due = self.schedule.next_due(step, without=off) if self._can_run else {}
        if not due and not self.schedule.used:
            return None
        return ProbeUse(
            share=self.schedule.spent_share,
            budget=self._budget,
            next_steps={
                _short(name): due[name] for name in sorted(due, key=lambda name: due[name])
            },
        )

    def _run_one(self, name: str, view: ProbeView) -> dict[str, Tensor]:
        if name in self._given_up:
            view.note(self._given_up[name])
            return {}
        monitor = self._monitors[name]
        try:
            with undisturbed(self._model, pause=self._pause, autocast=self.autocast):
                found = monitor.probe(view)
        except ObjectiveError as error:
            self._give_up_after_a_while(name, f"{monitor.metrics[0]}: {error}", view)
            return {}
        except (RuntimeError, ValueError, MemoryError, NoSecondDerivativeError) as error:
            why = hopeless(error, type(monitor).__name__)
            if why is not None:
                raise KnownLimitError(why) from error
            reason = limit_of(error)
            if reason is None:
                raise
            self._give_up_after_a_while(name, f"{monitor.metrics[0]}: {reason}", view)
            return {}
        self._in_vain.pop(name, None)
        return _checked(monitor, found)

    def _give_up_after_a_while(self, name: str, reason: str, view: ProbeView) -> None:
        """An evaluation that leads to nothing costs as much as another."""
        view.note(reason)
        if view.objective is None and view.fixed_objective is None:
            return  # nothing was evaluated
        self._in_vain[name] = self._in_vain.get(name, 0) + 1
        if self._in_vain[name] >= PATIENCE:
            self._given_up[name] = f"{reason}; it is not tried again"


def autocast_type(model: nn.Module) -> torch.dtype | None:
    """The type that autocast computes in where the model is, if it is on.

    Args:
        model: with its parameters on one device.

    Returns:
        bfloat16, or None: without the loss scaling of a training, gradients of a float16 loss
        would vanish, and the probe computes in the type of the parameters instead.
    """
    kind = next((item.device.type for item in model.parameters()), "cpu")
    if not torch.is_autocast_enabled(kind):
        return None
    dtype = torch.get_autocast_dtype(kind)
    return dtype if dtype == torch.bfloat16 else None


def _last_objective(
    model: nn.Module, batches: LastBatch, loss_fn: LossFn | None, make: MakeObjective | None
) -> Objective:
    if loss_fn is not None:
        return LossFunction(model, loss_fn, batches)
    return OwnLoss(model, batches) if make is None else make(batches)


def _short(name: str) -> str:
    """The class alone: Sharpness of "probe of monitor Sharpness"."""
    return name.removeprefix(PREFIX).removeprefix("monitor ")


def _checked(monitor: Monitor, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    unknown = sorted(set(found) - set(monitor.probed))
    if unknown:
        raise ValueError(
            f"{type(monitor).__name__}.probe returned {', '.join(unknown)}, not among its probed "
            f"numbers {monitor.probed}"
        )
    return {name: item.detach().float().reshape(()).clone() for name, item in found.items()}

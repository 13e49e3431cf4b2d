"""The probes of a watch: when they run, on what, and what they found."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Final

import torch
from torch import Tensor, nn

from gradwatch.capture.model.names import unwrap_model
from gradwatch.capture.probe.batch import LastBatch, ObjectiveError
from gradwatch.capture.probe.objective import LossFunction, Objective, OwnLoss
from gradwatch.capture.probe.schedule import Clock, Schedule
from gradwatch.capture.probe.stopwatch import Stopwatch
from gradwatch.capture.probe.undisturbed import undisturbed
from gradwatch.capture.probe.view import ProbeView
from gradwatch.interfaces import Monitor
from gradwatch.isolation import Isolation

MakeObjective = Callable[[LastBatch], Objective]
LossFn = Callable[[nn.Module, Any], Tensor]

PREFIX: Final = "probe of "
"""How a probe is called in messages, before the name of its monitor."""

PATIENCE: Final = 3
"""Evaluations in vain, one after the other, after which a probe is not tried again."""

LIMITS: Final[Mapping[str, str]] = {
    "use_reentrant=True": "the loss of a reentrant activation checkpoint cannot be differentiated "
    "by torch.autograd.grad; pass use_reentrant=False to it",
    "Expected more than 1 value per channel": "a part of the batch is a single example, which "
    "batch normalisation cannot take",
}
"""Why torch evaluates a loss in a training step but not in a probe, by its message."""


class Probes:
    """Lets monitors run the model again in sampled steps, as far as the budget allows.

    Args:
        monitors: those that probe, by the name they have in messages.
        model: as the user passed it.
        isolation: what to do when a probe fails.
        pause: gives a context in which the hooks of the watch do nothing.
        budget: share of the training time; None probes in every sampled step.
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
        loss_fn: LossFn | None = None,
        probe_batch: Any = None,
        objective: MakeObjective | None = None,
    ) -> None:
        self._monitors = {PREFIX + name: item for name, item in monitors.items()}
        self.names = tuple(self._monitors)
        self.numbers = tuple(name for item in monitors.values() for name in item.probed)
        self.batches = LastBatch()
        self.autocast: torch.dtype | None = None
        self.schedule = Schedule(
            {name: item.probe_cost for name, item in self._monitors.items()}, budget
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
        self._in_vain: dict[str, int] = {}
        self._given_up: dict[str, str] = {}
        self._due: list[str] = []
        self._found: dict[str, Tensor] = {}
        self.notes: list[str] = []

    def begin_step(self, step: int, *, sampled: bool, joint: bool = False) -> None:
        """A step begins, or begins anew because it raised.

        Args:
            step: its number.
            sampled: it is measured.
            joint: other ranks probe in the same steps, whatever happens on this one.
        """
        self.release()
        self._found, self.notes = {}, []
        self._joint = joint
        off = self._isolation.agreed if joint else frozenset(self._isolation.failures)
        # What nobody reads needs no measuring.
        off |= {name for name in self.names if name.removeprefix(PREFIX) in off}
        self._due = self.schedule.due(step, without=off) if sampled and self.names else []

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

    def run(self, view: ProbeView, *, returned_loss: bool) -> None:
        """Runs what is due, before the parameters move.

        Args:
            view: the step, without objectives.
            returned_loss: the model itself returned a loss in this step.
        """
        due, self._due = self._due, []
        try:
            self._run_all(due, view, returned_loss)
        finally:
            self.release()

    def _run_all(self, due: Sequence[str], view: ProbeView, returned_loss: bool) -> None:
        view.objective = self._last if self.can_evaluate(returned_loss) else None
        view.fixed_objective = self._fixed
        for name in due:
            with self._stopwatch.time(name):
                found = self._isolation.run(name, self._run_one, name, view)
            self.schedule.ran(name, used=self._joint or bool(found))
            self._found |= found or {}
        self.notes += view.notes

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
        except (RuntimeError, ValueError) as error:
            reason = next((LIMITS[text] for text in LIMITS if text in str(error)), None)
            if reason is None:
                raise
            view.note(f"{monitor.metrics[0]}: {reason}")
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


def _checked(monitor: Monitor, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    unknown = sorted(set(found) - set(monitor.probed))
    if unknown:
        raise ValueError(
            f"{type(monitor).__name__}.probe returned {', '.join(unknown)}, not among its probed "
            f"numbers {monitor.probed}"
        )
    return {name: item.detach().float().reshape(()).clone() for name, item in found.items()}

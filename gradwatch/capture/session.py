"""From hooks to one `Sample` per sampled step: the only owner of hooks and patches."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradwatch.capture.backward import BackwardObserver
from gradwatch.capture.clipping import ClippingObserver, ClippingRecord, clip_gradients
from gradwatch.capture.facts import describe_model
from gradwatch.capture.forward import ForwardGate
from gradwatch.capture.gradient import GradientCapture
from gradwatch.capture.layers import LAYERS, LayerCapture
from gradwatch.capture.names import (
    is_compiled,
    is_compiled_in_place,
    unwrap_model,
    wrappers_of,
)
from gradwatch.capture.optimizer import OptimizerTap
from gradwatch.capture.parameters import ParameterTable, has_stepped
from gradwatch.capture.ranks import Ranks
from gradwatch.capture.reduction import Reduction
from gradwatch.capture.sample import Sample, collect, make_sample
from gradwatch.capture.step_tensors import StepTensors
from gradwatch.capture.told import Told
from gradwatch.errors import AttachError
from gradwatch.interfaces import Need
from gradwatch.isolation import Isolation
from gradwatch.records import ModelInfo

CAPTURE: Final = "capture"
"""Name of the whole of this, should it fail."""

RANKS: Final = "exchange between ranks"
"""Name of what combines the values of several processes, should it fail."""

REPORT: Final = "report"
"""Name of what is done with a sample, should it fail."""

OF_ALL_RANKS: Final = (CAPTURE, REPORT, LAYERS, "structure hooks", "input hook", "output hook")
"""Parts of this that are switched off on all ranks if one of them fails on one."""


class Session:
    """Watches one model and its optimizers until it is closed.

    With several optimizers a step is a round: it ends when all of them have stepped, or when one
    of them steps again.

    Args:
        model: the module that the user calls.
        optimizers: torch optimizers, already unwrapped.
        ranks: the processes that train the model together.
        parts: the parts outside of this whose failures concern all ranks.
        on_sample: called after each sampled step, with the sample, or None if it could not be
            taken, and with how many ranks each part of `parts` has failed on, or None if there
            are no other ranks.
        isolation: what to do when something fails.
        every_n_steps: sample the steps that are multiples of it.
        needs: what the monitors need to be captured.
        track_loss: see the scalar of every `backward()`.
        track_clipping: see torch's own clipping function.
        facts: fields of `ModelInfo` that the user gave.

    Attributes:
        step: optimizer steps finished.
        info: facts about the model.
        told: what the user's loop said about the step under way.
        parts: the parts whose failures concern all ranks.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        *,
        ranks: Ranks,
        parts: Sequence[str],
        on_sample: Callable[[Sample | None, Tensor | None], None],
        isolation: Isolation,
        every_n_steps: int,
        needs: frozenset[Need] = frozenset(),
        track_loss: bool = False,
        track_clipping: bool = False,
        facts: dict[str, Any] | None = None,
    ) -> None:
        inner = unwrap_model(model)
        self.optimizers = tuple(optimizers)
        self.table = ParameterTable(inner, self.optimizers)
        self.step = 0
        self.told = Told()
        self._on_sample = on_sample
        self._isolation = isolation
        self._every = every_n_steps
        self._stepped: set[int] = set()
        self._states = {id(optimizer): len(optimizer.state) for optimizer in self.optimizers}
        self.info = describe_model(
            inner,
            self.table.everything().values(),
            parameters=tuple(self.table.everything()),
            untouched_optimizer=not any(map(has_stepped, self.optimizers)),
            **(facts or {}),
        )
        self.clipping = ClippingRecord(visible=track_clipping)
        self.gradients = GradientCapture(self.clipping, updates="updates" in needs)
        self._observers: list[BackwardObserver | ClippingObserver] = [
            *([BackwardObserver(self._note_loss)] if track_loss else []),
            *([ClippingObserver(self._note_clipping)] if track_clipping else []),
        ]
        # Inside a compiled region a hook would break the graph, and even decide whether there is
        # one; outside of it, on a wrapper, hooks run as ever.
        compiled = any(map(is_compiled, wrappers_of(model)))
        root = inner if not compiled else None if is_compiled_in_place(model) else model
        self.gate = ForwardGate(root, self._begin_forward, self._end_forward, isolation)
        wanted = "activations" in needs and not compiled and not ranks.tensor_parallel
        self.layers = LayerCapture(inner, self.gate, isolation) if wanted else None
        self._taps = [OptimizerTap(optimizer, self) for optimizer in self.optimizers]
        self.wants_parameters = "parameters" in needs
        self.parts = (*OF_ALL_RANKS, *parts)
        self._ranks = ranks
        self._reduction: Reduction | None = None
        self._ranks.attach(self.table.everything())
        self._plan()

    @property
    def sampling(self) -> bool:
        """Whether the step that is under way is sampled."""
        return self.gate.sampling

    def start_at(self, step: int) -> None:
        """Continues the count of an earlier run.

        Args:
            step: optimizer steps finished there.
        """
        self.step = step
        self._plan()

    def resume(self, info: ModelInfo, step: int) -> None:
        """Continues an earlier run, with the facts that were learnt in it.

        Args:
            info: the facts about the model at its initialisation.
            step: optimizer steps finished.
        """
        self.info = info
        if self.layers is not None:
            self.layers.linked = True
        self.start_at(step)

    def limits(self) -> list[str]:
        """What this training hides from the watch, one sentence each."""
        found = []
        if self._ranks.because:
            rank, because = self._ranks.rank, self._ranks.because
            found.append(f"values are those of rank {rank} alone: {because}")
        if self._ranks.tensor_parallel:
            found.append(
                "activation_norm: under tensor parallelism the output of a layer on one rank is "
                "a part of it, in a layout that the watch does not know"
            )
        return found

    def observe(
        self, *, loss: float | Tensor | None, batch_size: int | None, epoch: float | None
    ) -> None:
        """Takes what the user says of the step under way, and its gradients as they are now.

        Args:
            loss: of the step [L].
            batch_size: its samples.
            epoch: epochs finished.
        """
        self.told.tell(loss, batch_size, epoch, sampled=self.sampling)
        if self.sampling:
            self._isolation.run(CAPTURE, self._observe_gradients)

    def forward_begins(self, samples: int) -> None:
        """A training forward begins that the root module is not called for.

        Args:
            samples: that enter.
        """
        self._isolation.run(CAPTURE, self.gate.hold, samples)

    def forward_ends(self, completed: bool) -> None:
        """It is over.

        Args:
            completed: its loss will be trained on.
        """
        self._isolation.run(CAPTURE, self.gate.release, completed)

    def clip(self, max_norm: float, **options: Any) -> Tensor:
        """Does torch's clipping on all optimized parameters and records it.

        Args:
            max_norm: the largest norm to let through [L/P].
            **options: as for `torch.nn.utils.clip_grad_norm_`.

        Returns:
            The norm before clipping [L/P].
        """
        parameters = list(self.table.everything().values())
        observed = any(isinstance(item, ClippingObserver) for item in self._observers)
        if not observed and self._ranks.sharded:
            self._before_clipping()
        total = clip_gradients(parameters, max_norm, **options)
        if not observed and not self._ranks.sharded:
            self._note_clipping(parameters, total, max_norm)
        return total

    def close(self) -> None:
        """Takes every hook and patch off, and lets go of the model and its optimizers."""
        layers = [] if self.layers is None else [self.layers]
        with ExitStack() as all_of_them:  # even if one of them fails
            all_of_them.callback(self._ranks.leave)
            for part in (*self._observers, *layers, self.gate, *self._taps):
                all_of_them.callback(part.remove)
        self._taps = []
        self.optimizers = ()
        self.table.release()
        self.gradients = GradientCapture(self.clipping, updates=False)

    # The moments of a step, as the optimizer taps tell them.

    def begins(self, optimizer: Optimizer) -> None:
        """An optimizer is about to step."""
        loaded_since = len(optimizer.state) > self._states[id(optimizer)]
        if self.step == 0 and not self._stepped and loaded_since:
            self.info = replace(self.info, untouched_optimizer=False)
        if id(optimizer) in self._stepped:
            self._end_round()

    def abandoned(self) -> None:
        """A step raised: the forward passes that led to it were in vain."""
        if self.sampling and not self._stepped:
            self._forget_inputs()

    def gradients_ready(self, optimizer: Optimizer, loss: Tensor | None) -> None:
        """The gradients of this step are there; the parameters have not moved yet."""
        if self.sampling:
            self._isolation.run(CAPTURE, self._read_gradients, optimizer, loss)

    def stepped(self, optimizer: Optimizer) -> None:
        """The step of one optimizer is over."""
        if self.sampling:
            self._isolation.run(CAPTURE, self._read_update, optimizer)
        self._stepped.add(id(optimizer))
        if len(self._stepped) == len(self.optimizers):
            self._end_round()

    def _end_round(self) -> None:
        try:
            if self._scheduled:
                self._hand_over()
        finally:  # a step that was taken counts, even if the user wants to hear of an error
            self.step += 1
            self._stepped = set()
            self._plan()

    def _plan(self) -> None:
        """Decides whether the step that begins now is sampled."""
        # The other ranks wait for this one at the end of a step until all know that it is off.
        off = self._isolation.agreed if self._ranks.joint else self._isolation.failures
        self._scheduled = self.step % self._every == 0 and CAPTURE not in off
        if CAPTURE in self._isolation.agreed:
            self._ranks.leave()
        wanted = self._scheduled and CAPTURE not in self._isolation.failures
        if wanted or self.gate.sampling:
            self._forget_inputs()
            self.gradients.reset()
        self.gate.sampling = wanted

    def _hand_over(self) -> None:
        tensors = self._isolation.run(CAPTURE, self._collect) if self.sampling else None
        failures = None
        if self._ranks.joint:
            combined = self._isolation.run(RANKS, self._combine, tensors)
            if combined is None:
                self._ranks.part("the exchange failed")
            else:
                tensors, failures = combined
        if self._ranks.sharded and not self._ranks.joint:
            tensors = self._isolation.run(CAPTURE, self._refuse_parts)
        self._isolation.run(REPORT, self._deliver, tensors, failures)

    @torch.no_grad()
    def _collect(self) -> StepTensors:
        return collect(self)

    @torch.no_grad()
    def _combine(self, tensors: StepTensors | None) -> tuple[StepTensors | None, Tensor | None]:
        if not self._ranks.meet():
            return tensors, None
        if self._reduction is None:
            layers = [layer.name for layer in self.info.layers]
            self._reduction = Reduction(self._ranks, self.table.everything(), layers, self.parts)
        return self._reduction.combine(tensors, self._isolation.failures)

    def _refuse_parts(self) -> None:
        raise AttachError(
            f"the parameters lie on several ranks in parts, but {self._ranks.because}; watch the "
            "model on every rank until the end"
        )

    @torch.no_grad()
    def _deliver(self, tensors: StepTensors | None, failures: Tensor | None) -> None:
        self._on_sample(None if tensors is None else make_sample(self, tensors), failures)

    def _forget_inputs(self) -> None:
        self.gate.reset()
        self.clipping.reset()
        self.told.reset()

    @torch.no_grad()
    def _read_gradients(self, optimizer: Optimizer, loss: Tensor | None) -> None:
        self.gradients.ready(optimizer, self.table.of(optimizer))
        if loss is not None:
            self.told.closure_loss = loss.detach().clone()

    @torch.no_grad()
    def _read_update(self, optimizer: Optimizer) -> None:
        self.gradients.stepped(optimizer)

    @torch.no_grad()
    def _observe_gradients(self) -> None:
        self.gradients.observe(self.table.everything())

    def _begin_forward(self) -> None:
        for tap in self._taps:
            tap.forward_began()
        if self.gate.passes == 0:
            self.told.backward_loss = None  # of another model: it went backward before this one ran
        if self.sampling and self.layers is not None:
            self.layers.begin_forward()

    def _end_forward(self, completed: bool) -> None:
        if self.layers is not None:
            self.layers.end_forward(completed)

    def _note_loss(self, loss: Tensor) -> None:
        if self.sampling:
            self._isolation.run(CAPTURE, self.told.add_backward_loss, loss.detach())

    def _note_clipping(self, parameters: Sequence[Tensor], total: Tensor, max_norm: float) -> None:
        """The gradients are about to be multiplied, or have just been."""
        if self._ranks.sharded:  # to read the norm would be an exchange that others may not join
            self._before_clipping()
            return
        self.clipping.visible = True
        if self.sampling:
            self._isolation.run(CAPTURE, self._record_clipping, parameters, total, max_norm)

    def _before_clipping(self) -> None:
        """The gradients are about to be changed in a way that cannot be undone."""
        self.clipping.visible = True
        if self.sampling and not self.gradients.observed:
            self._isolation.run(CAPTURE, self._observe_gradients)

    @torch.no_grad()
    def _record_clipping(
        self, parameters: Sequence[Tensor], total: Tensor, max_norm: float
    ) -> None:
        self.clipping.record(parameters, total, max_norm)

"""From hooks to one `Sample` per sampled step: the only owner of hooks and patches."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradwatch.capture.forward.gate import ForwardGate
from gradwatch.capture.forward.layers import LayerCapture
from gradwatch.capture.model.facts import describe_model
from gradwatch.capture.model.names import (
    forward_root,
    is_compiled,
    unwrap_model,
    wrappers_of,
)
from gradwatch.capture.model.parameters import ParameterTable, has_stepped
from gradwatch.capture.part import CAPTURE, OF_ALL_RANKS, RANKS, REPORT
from gradwatch.capture.probe.probes import Probes
from gradwatch.capture.probe.view import ProbeView
from gradwatch.capture.ranks.exchange import Exchange
from gradwatch.capture.ranks.ranks import Ranks
from gradwatch.capture.sample import Sample, collect, make_sample
from gradwatch.capture.step.adam import FEWEST_STEPS
from gradwatch.capture.step.backward import BackwardObserver
from gradwatch.capture.step.clipping import ClippingRecord
from gradwatch.capture.step.clipping_tap import ClippingTap
from gradwatch.capture.step.gradient import GradientCapture
from gradwatch.capture.step.microbatch import MicrobatchTap
from gradwatch.capture.step.optimizer import OptimizerTap
from gradwatch.capture.step.told import Told
from gradwatch.capture.step_tensors import StepTensors
from gradwatch.interfaces import Need
from gradwatch.isolation import Isolation
from gradwatch.records import ModelInfo, ProbeUse


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
        make_probes: makes the probes of the monitors, given a context in which the hooks of this
            do nothing.
        track_loss: see the scalar of every `backward()`.
        track_clipping: see torch's own clipping function.
        facts: fields of `ModelInfo` that the user gave.

    Attributes:
        step: optimizer steps finished.
        info: facts about the model.
        told: what the user's loop said about the step under way.
        mixed: a forward of the next round ran in this one, or one of this round in the last one.
        activations_unavailable: why no hook may listen to the layers, or None.
        microbatches: the gradients that the step is averaged from.
        exchange: with the other ranks.
        probes: what runs the model again, or None.
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
        make_probes: Callable[[Callable[[], AbstractContextManager[None]]], Probes] | None = None,
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
        self._forward_since_step = False
        self.mixed = False
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
        # Inside a compiled region a hook would break the graph, and even decide whether there is
        # one; outside of it, on a wrapper, hooks run as ever.
        compiled = any(map(is_compiled, wrappers_of(model)))
        root = forward_root(model)
        self.gate = ForwardGate(
            root, self._begin_forward, self._end_forward, isolation, self._note_inputs
        )
        self.probes = None if make_probes is None else make_probes(self.gate.pause)
        self.activations_unavailable = _no_activations(compiled, ranks)
        wanted = "activations" in needs and self.activations_unavailable is None
        self.layers = LayerCapture(inner, self.gate, isolation) if wanted else None
        self.microbatches = MicrobatchTap(
            needs,
            model,
            self.table.everything,
            isolation,
            ranks,
            sees_forwards=root is not None,
        )
        self._clipping_tap = ClippingTap(
            self.clipping,
            self.gradients,
            self.table.everything,
            isolation,
            is_sampling=lambda: self.sampling,
            sharded=ranks.sharded,
            observe=track_clipping,
        )
        self._loss_tap = BackwardObserver(self._note_loss) if track_loss else None
        self._taps = [OptimizerTap(optimizer, self) for optimizer in self.optimizers]
        self.wants_parameters = "parameters" in needs
        self._wants_moments = "adam_moments" in needs and len(self.optimizers) == 1
        self.parts = (*OF_ALL_RANKS, *parts, *(self.probes.names if self.probes else ()))
        names = [layer.name for layer in self.info.layers]
        self.exchange = Exchange(
            ranks,
            self.table.all_known,
            names,
            self.parts,
            isolation,
            numbers=self.probes.numbers if self.probes else (),
            clock=1 + len(self.probes.names) if self.probes else 0,
        )
        if self.probes is not None and ranks.sums is not None:
            self.probes.join(ranks.sums, ranks.meet_for_sums)
        self.exchange.plan(self._every, self.step)
        self._plan()

    @property
    def sampling(self) -> bool:
        """Whether the step that is under way is sampled."""
        return self.gate.sampling

    @property
    def _reads_moments(self) -> bool:
        # A mean over fewer steps is no mean.
        return self._wants_moments and self.step >= FEWEST_STEPS

    @property
    def independent_expected(self) -> int:
        """Independent gradients that the one of the step under way is averaged from.

        Over micro-batches and ranks, 1 if they are not measured; exact once the gradients of the
        step are there, before that what the steps so far let expect.
        """
        return self.microbatches.parts

    def start_at(self, step: int) -> None:
        """Continues the count of an earlier run.

        Args:
            step: optimizer steps finished there.
        """
        self.step = step
        if self.probes is not None:
            self.probes.schedule.starts_at(step)
        self.exchange.plan(self._every, step)
        self._plan()

    def resume(self, info: ModelInfo, step: int) -> None:
        """Continues an earlier run, with the facts that were learnt in it.

        Args:
            info: the facts about the model at its initialisation.
            step: optimizer steps finished.
        """
        # A run is resumed to train longer than was planned, perhaps on more data.
        self.info = replace(
            info,
            train_size=self.info.train_size or info.train_size,
            planned_steps=self.info.planned_steps or info.planned_steps,
        )
        if self.layers is not None:
            self.layers.linked = True
        self.start_at(step)

    def observe(
        self,
        loss: float | Tensor | None,
        batch_size: int | None,
        epoch: float | None,
        *,
        gradients: bool,
    ) -> None:
        """Takes what the user says of the step under way.

        Args:
            loss: of the step [L].
            batch_size: its samples.
            epoch: epochs finished.
            gradients: measure its gradients as they are now, unless they have been clipped.
        """
        self.told.tell(loss, batch_size, epoch, sampled=self.sampling)
        if gradients and self.sampling and not self.clipping.happened:
            self._clipping_tap.measure()

    def tell_batch(self, batch: Any) -> None:
        """Takes the batch of the step under way.

        Args:
            batch: as the loss function takes it.
        """
        if self.probes is not None and self.sampling:
            self._isolation.run(CAPTURE, self.probes.tell, batch)

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
        return self._clipping_tap.clip(max_norm, **options)

    def close(self) -> None:
        """Takes every hook and patch off, and lets go of the model and its optimizers."""
        optional = [part for part in (self.layers, self._loss_tap) if part is not None]
        with ExitStack() as all_of_them:  # even if one of them fails
            all_of_them.callback(self.exchange.leave)
            for part in (self._clipping_tap, *optional, self.microbatches, self.gate, *self._taps):
                all_of_them.callback(part.remove)
        self._taps = []
        self.optimizers = ()
        self.probes = None
        self.table.release()
        self.gradients.release()

    # The moments of a step, as the optimizer taps tell them.

    def begins(self, optimizer: Optimizer) -> None:
        """An optimizer is about to step."""
        loaded_since = len(optimizer.state) > self._states[id(optimizer)]
        if self.step == 0 and not self._stepped and loaded_since:
            self.info = replace(self.info, untouched_optimizer=False)
        if id(optimizer) in self._stepped:
            self.mixed = self.mixed or self._forward_since_step
            mixed = self._forward_since_step
            self._end_round()
            self.mixed = mixed

    def abandoned(self) -> None:
        """A step raised: the forward passes that led to it were in vain."""
        self.gate.muted = False
        if self.sampling and not self._stepped:
            self._forget_inputs()
            self.microbatches.step_begins(sampled=True)
            self._begin_probes(sampled=True)

    def gradients_ready(self, optimizer: Optimizer, loss: Tensor | None) -> None:
        """The gradients of this step are there; the parameters have not moved yet."""
        self.gate.muted = True
        if self.sampling:
            self._isolation.run(CAPTURE, self._read_gradients, optimizer, loss)
        if self._scheduled and self.probes is not None and not self._stepped:
            able = CAPTURE not in self._isolation.failures
            if able or self.exchange.joint:
                # A rank that cannot probe takes part in what the others add up.
                part = CAPTURE if able else RANKS
                self._isolation.run(part, self._run_probes, self.probes, optimizer, able)

    def stepped(self, optimizer: Optimizer) -> None:
        """The step of one optimizer is over."""
        self.gate.muted = False
        if self.sampling:
            self._isolation.run(CAPTURE, self._read_update, optimizer)
            self.microbatches.optimizer_stepped()
        self._stepped.add(id(optimizer))
        self._forward_since_step = False
        if len(self._stepped) == len(self.optimizers):
            self._end_round()

    def _end_round(self) -> None:
        try:
            if self._scheduled:
                self._hand_over()
        finally:  # a step that was taken counts, even if the user wants to hear of an error
            self.step += 1
            self._stepped = set()
            self.mixed = False
            self._plan()

    def _plan(self) -> None:
        """Decides whether the step that begins now is sampled."""
        on = self.exchange.is_on(CAPTURE) and self.exchange.is_on(REPORT)
        if not on:
            self.exchange.leave()
        self._scheduled = on and self.step % self._every == 0
        wanted = self._scheduled and CAPTURE not in self._isolation.failures
        if wanted or self.gate.sampling:
            self.microbatches.forwards_seen(self.gate.passes, self.step)
            self._forget_inputs()
            self.gradients.reset()
        self.gate.sampling = wanted
        self.microbatches.step_begins(wanted)
        self._begin_probes(wanted or (self._scheduled and self.exchange.joint))

    def read_clock(self, of_all_ranks: Sequence[float]) -> None:
        """Tells the probes what they have cost, at a report.

        Args:
            of_all_ranks: the newest clock that travelled, of ranks that train together.
        """
        if self.probes is None or (self.exchange.joint and not of_all_ranks):
            return
        seconds = of_all_ranks if self.exchange.joint else self.probes.clock()
        self._isolation.run(CAPTURE, self.probes.read, self.step + 1, seconds)

    def use_of_probes(self, step: int) -> ProbeUse | None:
        """What probes have cost, and when they will run next.

        Args:
            step: that is over.

        Returns:
            None if there are none.
        """
        if self.probes is None:
            return None
        return self._isolation.run(CAPTURE, self.probes.use, step)

    def _begin_probes(self, sampled: bool) -> None:
        if self.probes is not None:
            joint = self.exchange.joint
            begin = self.probes.begin_step
            self._isolation.run(CAPTURE, begin, self.step, sampled=sampled, joint=joint)

    def _note_inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.probes is not None:
            self.probes.called(args, kwargs)

    def _run_probes(self, probes: Probes, optimizer: Optimizer, able: bool) -> None:
        lrs = [group["lr"] for group in optimizer.param_groups if "lr" in group]
        view = ProbeView(
            model=self.info,
            lr=lrs[0] if lrs else None,
            independent_gradients=self.independent_expected,
            ranks=self.exchange.size,
            optimized=frozenset(self.table.everything()),
            optimizer=optimizer if len(self.optimizers) == 1 else None,
        )
        probes.run(view, returned_loss=bool(self.gate.losses), able=able)

    def _hand_over(self) -> None:
        tensors = self._isolation.run(CAPTURE, self._collect) if self.sampling else None
        tensors, failures = self.exchange.combine(tensors)
        self._isolation.run(REPORT, self._deliver, tensors, failures)

    @torch.no_grad()
    def _collect(self) -> StepTensors:
        return collect(self)

    @torch.no_grad()
    def _deliver(self, tensors: StepTensors | None, failures: Tensor | None) -> None:
        self._on_sample(None if tensors is None else make_sample(self, tensors), failures)

    def _forget_inputs(self) -> None:
        self.gate.reset()
        self.clipping.reset()
        self.told.reset()

    @torch.no_grad()
    def _read_gradients(self, optimizer: Optimizer, loss: Tensor | None) -> None:
        parameters = self.table.of(optimizer)
        self.gradients.ready(optimizer, parameters)
        if self.microbatches.wants_parts:
            raw_known = self.gradients.raw() is not None
            self.microbatches.gradients_ready(parameters, raw_known=raw_known)
        if self._reads_moments and self.independent_expected == 1:
            self.gradients.read_moments(optimizer, parameters)
        if loss is not None:
            self.told.closure_loss = loss.detach().clone()

    @torch.no_grad()
    def _read_update(self, optimizer: Optimizer) -> None:
        self.gradients.stepped(optimizer)

    def _begin_forward(self) -> None:
        for tap in self._taps:
            tap.forward_began()
        if self.sampling:
            self.microbatches.forward_began()
        if self.gate.muted:
            return
        if self.gate.passes == 0:  # what came before was of another model, or in vain
            self.told.backward_loss = None
            self.clipping.reset()
            self.gradients.forget_observed()
        elif self.clipping.happened:
            self._isolation.run(CAPTURE, self._note_backward_to_come)
        self._forward_since_step = True
        if self.sampling and self.layers is not None:
            self.layers.begin_forward()

    def _note_backward_to_come(self) -> None:
        waiting = [item for item in self.optimizers if id(item) not in self._stepped]
        for optimizer in waiting:
            self.clipping.more_follows(self.table.of(optimizer).values())

    def _end_forward(self, completed: bool) -> None:
        self.microbatches.forward_ended(completed)
        if self.layers is not None:
            self.layers.end_forward(completed)

    def _note_loss(self, loss: Tensor) -> None:
        if self.sampling:
            self._isolation.run(CAPTURE, self.told.add_backward_loss, loss.detach())


def _no_activations(compiled: bool, ranks: Ranks) -> str | None:
    if ranks.tensor_parallel:
        return (
            "under tensor parallelism the output of a layer on one rank is a part of it, in a "
            "layout that the watch does not know"
        )
    if compiled:
        return "the model is compiled as a whole, and hooks inside of it would change its graphs"
    return None

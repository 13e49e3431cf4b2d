"""Micro-batch norms for those watches that want them; nothing at all for the others."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from weakref import WeakMethod

from torch import Tensor, nn

from gradwatch.capture.part import MICROBATCHES
from gradwatch.capture.step.backward import ScaleObserver
from gradwatch.capture.step.microbatch.capture import MicrobatchCapture
from gradwatch.capture.step.microbatch.expectation import Expectation, Replicas
from gradwatch.capture.step.microbatch.record import MicrobatchNorms
from gradwatch.capture.step.microbatch.weight import Weight, check_weight
from gradwatch.interfaces import Need
from gradwatch.isolation import Isolation
from gradwatch.numerics.gram import FEWEST


class MicrobatchTap:
    """Tells a `MicrobatchCapture`, if there is one, of the moments of a training.

    Where a monitor needs `microbatches` there always is one. For `independent_gradients` and
    `microbatch_covariance` there is one in the first sampled step, and as long as a step is made of
    several gradients.

    Args:
        needs: what the monitors need.
        model: with its wrappers.
        parameters: gives the optimized parameters by name.
        isolation: what to do when something fails.
        ranks: the processes that train the model together.
        sees_forwards: `forward_began` will be called.

    Attributes:
        unavailable: why the micro-batches of the last sampled step are not known, or None.
        count: micro-batches of the last sampled step on this rank, 0 if they are not known.
        parts: independent gradients that the one of this step is averaged from, over
            micro-batches and ranks, 1 if they will not be known; a guess until they are there.
        expectation: what is known of the steps to come.
    """

    def __init__(
        self,
        needs: Collection[Need],
        model: nn.Module,
        parameters: Callable[[], Mapping[str, Tensor]],
        isolation: Isolation,
        ranks: Replicas,
        *,
        sees_forwards: bool,
    ) -> None:
        self.unavailable: str | None = None
        self.count = 0
        self.parts = 1
        self.expectation = Expectation(ranks)
        self._always = "microbatches" in needs
        self._for_parts = "independent_gradients" in needs
        self._for_covariance = "microbatch_covariance" in needs
        self._isolation = isolation
        self._scale: Tensor | None = None
        self._untouched: list[bool] = []
        self._observer: ScaleObserver | None = None
        self._capture: MicrobatchCapture | None = None
        self._make: Callable[[], MicrobatchCapture] | None = lambda: MicrobatchCapture(
            model, parameters, isolation, sees_forwards=sees_forwards
        )
        self._open_or_close()

    @property
    def wants_parts(self) -> bool:
        """Some monitor asks for the independent gradients."""
        return self._for_parts

    @property
    def untouched(self) -> bool:
        """What the optimizers of this step consumed is what the last backward left."""
        return bool(self._untouched) and all(self._untouched)

    def forwards_seen(self, forwards: int, step: int) -> None:
        """Training forwards have been counted, and are counted anew from now on.

        Args:
            forwards: since the last call.
            step: optimizer steps finished now.
        """
        self.expectation.forwards_seen(forwards, step)

    def step_begins(self, sampled: bool) -> None:
        """A step begins, or begins anew because it raised.

        Args:
            sampled: it is measured.
        """
        self._scale = None
        self._untouched = []
        self.parts = 1
        if sampled:
            self._isolation.run(MICROBATCHES, self._open_or_close)
        if self._capture is not None:
            project = self._for_covariance and self.expectation.may_be(FEWEST)
            begin = partial(self._capture.begin_step, project=project)
            self._isolation.run(MICROBATCHES, begin if sampled else self._capture.end_step)
            self.parts = self.expectation.parts if self._for_parts else 1

    def forward_began(self) -> None:
        """A training forward of a sampled step begins."""
        if self._capture is not None:
            self._isolation.run(MICROBATCHES, self._capture.begin_microbatch)

    def forward_ended(self, completed: bool) -> None:
        """It is over.

        Args:
            completed: it did not raise.
        """
        if self._capture is not None and not completed:
            self._capture.abandon_microbatch()

    def weigh(self, weight: Weight) -> None:
        """Takes the weight of the micro-batch whose forward was the last.

        Args:
            weight: in the average that the gradient of the step is; None if it is not known.

        Raises:
            ConfigError: if it is something else.
        """
        check_weight(weight)
        if self._capture is not None:
            self._isolation.run(MICROBATCHES, self._capture.weigh, weight)

    def gradients_ready(self, parameters: Mapping[str, Tensor], *, raw_known: bool) -> None:
        """An optimizer is about to consume its gradients.

        Args:
            parameters: of the optimizer, by name.
            raw_known: their norms before clipping are known.
        """
        if self._capture is not None:
            self._untouched.append(self._capture.untouched(parameters))
            known = self._capture.count if raw_known or self.untouched else 0
            self.parts = max(1, known * self.expectation.replicas)
        if self.expectation.alone:
            self.parts = 1

    def optimizer_stepped(self) -> None:
        """One of the step's optimizers has stepped."""
        if self._capture is not None:
            self._capture.optimizer_stepped()

    def take(self, forwards: int) -> MicrobatchNorms | None:
        """The micro-batches of the step that ends, unscaled; None if they are not known.

        Args:
            forwards: training forwards of the step.
        """
        self.count, self.unavailable = 0, None
        if self._capture is None:
            return None
        found = self._capture.take()
        self.unavailable = found.unavailable
        self.count = len(found.forwards)
        self.expectation.parts_seen(forwards, self.count)
        self._isolation.run(MICROBATCHES, self._open_or_close)
        if found.unavailable is not None:
            return None
        if self._scale is None:
            return found
        scale = self._scale.to(found.squares)
        return replace(
            found,
            squares=found.squares / scale.square(),
            projections=None if found.projections is None else found.projections / scale,
        )

    def remove(self) -> None:
        """Takes everything off the model, for good."""
        self._close()
        self._make = None

    def _open_or_close(self) -> None:
        sometimes = self._for_parts or self._for_covariance
        wanted = self._always or (sometimes and self.expectation.worth_trying)
        if not wanted:
            self._close()
        elif self._capture is None and self._make is not None:
            self._capture = self._make()
            # Held by torch: a watch that nobody holds goes with its model all the same.
            note = WeakMethod(self._note_scale)
            self._observer = ScaleObserver(lambda factor: _call(note(), factor))

    def _close(self) -> None:
        observer, capture = self._observer, self._capture
        self._observer, self._capture = None, None
        if observer is not None:
            observer.remove()
        if capture is not None:
            capture.remove()

    def _note_scale(self, factor: Tensor) -> None:
        # It changes between steps only, so one factor serves all micro-batches of a step.
        self._isolation.run(MICROBATCHES, self._keep_scale, factor)

    def _keep_scale(self, factor: Tensor) -> None:
        if self._capture is not None and self._capture.recording:
            self._scale = factor.detach().clone()


def _call(note: Callable[[Tensor], None] | None, factor: Tensor) -> None:
    if note is not None:
        note(factor)

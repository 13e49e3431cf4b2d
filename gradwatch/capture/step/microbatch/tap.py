"""Micro-batch norms for those watches that want them; nothing at all for the others."""

from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import Tensor, nn

from gradwatch.capture.part import MICROBATCHES
from gradwatch.capture.step.backward import ScaleObserver
from gradwatch.capture.step.microbatch.capture import MicrobatchCapture
from gradwatch.capture.step.microbatch.record import MicrobatchNorms
from gradwatch.isolation import Isolation


class MicrobatchTap:
    """Tells a `MicrobatchCapture`, if there is one, of the moments of a training.

    Args:
        wanted: some monitor needs micro-batches.
        model: with its wrappers.
        parameters: gives the optimized parameters by name.
        isolation: what to do when something fails.
        sees_forwards: `forward_began` will be called.

    Attributes:
        unavailable: why the micro-batches of the last sampled step are not known, or None.
    """

    def __init__(
        self,
        wanted: bool,
        model: nn.Module,
        parameters: Callable[[], Mapping[str, Tensor]],
        isolation: Isolation,
        *,
        sees_forwards: bool,
    ) -> None:
        self.unavailable: str | None = None
        self._isolation = isolation
        self._scale: Tensor | None = None
        self._observer = ScaleObserver(self._note_scale) if wanted else None
        self._capture = (
            MicrobatchCapture(model, parameters, isolation, sees_forwards=sees_forwards)
            if wanted
            else None
        )

    def step_begins(self, sampled: bool) -> None:
        """A step begins, or begins anew because it raised.

        Args:
            sampled: it is measured.
        """
        if self._capture is not None:
            self._scale = None
            begin = self._capture.begin_step if sampled else self._capture.end_step
            self._isolation.run(MICROBATCHES, begin)

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

    def optimizer_stepped(self) -> None:
        """One of the step's optimizers has stepped."""
        if self._capture is not None:
            self._capture.optimizer_stepped()

    def take(self) -> MicrobatchNorms | None:
        """The micro-batches of the step that ends, unscaled; None if they are not known."""
        if self._capture is None:
            return None
        found = self._capture.take()
        self.unavailable = found.unavailable
        if found.unavailable is not None:
            return None
        if self._scale is None:
            return found
        return replace(found, squares=found.squares / self._scale.to(found.squares).square())

    def remove(self) -> None:
        """Takes everything off the model."""
        if self._observer is not None:
            self._observer.remove()
        if self._capture is not None:
            self._capture.remove()

    def _note_scale(self, factor: Tensor) -> None:
        # It changes between steps only, so one factor serves all micro-batches of a step.
        self._isolation.run(MICROBATCHES, self._keep_scale, factor)

    def _keep_scale(self, factor: Tensor) -> None:
        if self._capture is not None and self._capture.recording:
            self._scale = factor.detach().clone()

"""The squared gradient norms of the micro-batches of one step, as their parts arrive."""

from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

from gradwatch.capture.step.microbatch.weight import Weight, known_weights
from gradwatch.numerics.norms import total_norm
from gradwatch.numerics.projection import Projection

MOST: Final = 4096
"""A step of more micro-batches is one that never ends; what is kept of it must not grow."""

IN_PARTS: Final = (
    "a gradient arrived in several parts between two forwards of the model, as with several "
    "backward() calls for one forward or with reentrant checkpointing; squares of parts do not "
    "add up"
)
NO_BACKWARD: Final = "no backward() of the model was seen in this step"
PARTLY_RESET: Final = "some of the gradients were reset between two backward() calls, others not"
TOO_MANY: Final = f"the step had more than {MOST} micro-batches"


@dataclass(frozen=True, slots=True)
class MicrobatchNorms:
    """The micro-batches of one optimizer step on this process.

    A micro-batch is what was differentiated between two training forwards of the model. Its
    gradient is that of the user's own loss on this process: before ranks are reduced, micro-batches
    added, gradients clipped; loss scaling and a division by the number of micro-batches are in it.

    Attributes:
        squares: (k,) float32, `||g_i||²` of each micro-batch in their order, on the device of the
            first gradient [L²/P²].
        forwards: how many training forwards each of the k covers: more than 1 where several lead
            to one backward, or where FSDP2 does not reduce after each.
        weights: (k,) float32, of each in the average that the step's gradient is, 1 each if nobody
            told other ones; None if only some were told, or the ranks are not averaged.
        projections: (k, m), the gradient of each micro-batch as a random projection, or None where
            nobody asked for it [L/P].
        unavailable: why `squares` is empty, or None.
    """

    squares: Tensor
    forwards: tuple[int, ...] = ()
    weights: Tensor | None = None
    projections: Tensor | None = None
    unavailable: str | None = None


@dataclass(slots=True)
class _Microbatch:
    forwards: int = 0
    parts: dict[str, Tensor] = field(default_factory=dict)
    projections: list[Tensor] = field(default_factory=list)
    weights: list[Weight] = field(default_factory=list)
    continued: set[bool] = field(default_factory=set)


class MicrobatchRecord:
    """Collects the parts of each micro-batch's gradient; a part is a parameter or a shard group.

    Attributes:
        active: parts are wanted: a step is recorded, and nothing has spoilt it.
    """

    def __init__(self) -> None:
        self.active = False
        self._reason: str | None = None
        self._projecting = False
        self._projection = Projection()
        self._clear()

    def _clear(self) -> None:
        self._current = _Microbatch()
        self._squares: list[Tensor] = []
        self._forwards: list[int] = []
        self._weights: list[list[Weight]] = []
        self._projections: list[Tensor] = []
        self._known: set[str] = set()

    def start(self, *, project: bool = False) -> None:
        """Begins a step and forgets the last one.

        Args:
            project: keep a projection of the gradient of each micro-batch.
        """
        self._clear()
        self._reason = None
        self._projecting = project
        self.active = True

    def stop(self) -> None:
        """Ends the step and lets go of its tensors."""
        self._clear()
        self.active = False

    def spoil(self, reason: str) -> None:
        """Says that this step cannot be measured; the first reason stands.

        Args:
            reason: a sentence without a full stop.
        """
        self._reason = self._reason or reason
        self.stop()

    def begin(self) -> None:
        """A training forward begins."""
        self._finish_current()
        self._current.forwards += 1

    def abandon(self) -> None:
        """The forward that just began raised."""
        self._current.forwards = max(0, self._current.forwards - 1)

    def weigh(self, weight: Weight) -> None:
        """Takes the weight of the micro-batch whose forward was the last.

        Args:
            weight: in any unit; None if it is not known.
        """
        kept = weight.detach().clone() if isinstance(weight, Tensor) else weight
        self._current.weights.append(kept)

    @property
    def count(self) -> int:
        """The micro-batches since `start` whose gradients are in what was accumulated."""
        if not self.active:
            return 0
        if self._current.parts and self._current.continued == {False}:
            return 1
        return len(self._squares) + bool(self._current.parts)

    def projected(self, part: str, gradient: Tensor) -> Tensor | None:
        """The projection of a part of a gradient, where that is wanted.

        Args:
            part: name of a parameter or of a group of them.
            gradient: of it [L/P].

        Returns:
            (m,) what is to be given to `add`, or None.
        """
        return self._projection({part: gradient}) if self._projecting else None

    def add(
        self, part: str, norm: Tensor, *, continued: bool, projection: Tensor | None = None
    ) -> None:
        """Takes a part of the gradient of the micro-batch under way.

        Args:
            part: name of a parameter or of a group of them.
            norm: () float32, of its gradient [L/P].
            continued: the gradient is added to one that was there.
            projection: of its gradient, or None [L/P].
        """
        if part in self._current.parts:
            self.spoil(IN_PARTS)
            return
        if part in self._known:
            self._current.continued.add(continued)
        self._current.parts[part] = norm
        if projection is not None:
            self._current.projections.append(projection)

    def norms(self) -> MicrobatchNorms:
        """All micro-batches since `start` whose gradients are in what was accumulated."""
        self._finish_current()
        if self._reason is None and not self._squares:
            self._reason = NO_BACKWARD
        if self._reason is not None:
            return MicrobatchNorms(torch.zeros(0), unavailable=self._reason)
        device = self._squares[0].device
        squares = torch.stack([item.to(device) for item in self._squares])
        weights = known_weights(self._weights, device)
        projections = [item.to(device) for item in self._projections]
        return MicrobatchNorms(
            squares,
            tuple(self._forwards),
            weights,
            torch.stack(projections) if projections else None,
        )

    def _finish_current(self) -> None:
        finished = self._current
        if not finished.parts:
            return
        if len(finished.continued) > 1:
            self.spoil(PARTLY_RESET)
            return
        if len(self._squares) == MOST:
            self.spoil(TOO_MANY)
            return
        if finished.continued == {False}:  # the earlier ones were thrown away, as SAM and LBFGS do
            self._clear()
        self._current = _Microbatch()
        self._known.update(finished.parts)
        self._forwards.append(finished.forwards)
        self._weights.append(finished.weights)
        self._squares.append(_squared_norm(list(finished.parts.values())))
        if self._projecting:
            self._projections.append(_sum(finished.projections))


def _squared_norm(parts: list[Tensor]) -> Tensor:
    device = parts[0].device
    return total_norm(torch.stack([part.to(device) for part in parts])).square()


def _sum(parts: list[Tensor]) -> Tensor:
    return torch.stack([part.to(parts[0].device) for part in parts]).sum(0)

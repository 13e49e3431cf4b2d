"""What the ranks tell one another at the end of a sampled step, and when they do not."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gradwatch.capture.part import CAPTURE, RANKS
from gradwatch.capture.ranks.ranks import Ranks
from gradwatch.capture.ranks.reduction import Reduction
from gradwatch.capture.step_tensors import StepTensors
from gradwatch.errors import AttachError
from gradwatch.isolation import Isolation


class Exchange:
    """Combines the sampled steps of the ranks, as long as all of them come by.

    Args:
        ranks: the processes that train the model together.
        parameters: gives the optimized parameters by name.
        layers: the layers that may be measured.
        parts: the parts of the watch whose failures concern all ranks.
        isolation: what to do when something fails.
        numbers: what probes may measure.
        clock: length of the clock of the probes.
    """

    def __init__(
        self,
        ranks: Ranks,
        parameters: Callable[[], Mapping[str, Tensor]],
        layers: Sequence[str],
        parts: Sequence[str],
        isolation: Isolation,
        *,
        numbers: Sequence[str] = (),
        clock: int = 0,
    ) -> None:
        self._ranks = ranks
        self._parameters = parameters
        self._layers = layers
        self._parts = parts
        self._isolation = isolation
        self._numbers = numbers
        self._clock = clock
        self._reduction: Reduction | None = None
        if ranks.joint and isolation.run(RANKS, ranks.attach, parameters()) is None:
            ranks.go_alone("their store is out of reach")

    def plan(self, *plan: object) -> None:
        """Says what must be equal on all ranks.

        Args:
            plan: when this rank will come.
        """
        shared = [*plan, *self._parts, *self._layers, *self._numbers]
        self._isolation.run(RANKS, self._ranks.plan, shared)

    @property
    def joint(self) -> bool:
        """Whether the values are those of all ranks."""
        return self._ranks.joint

    @property
    def size(self) -> int:
        """How many ranks train together."""
        return self._ranks.size if self._ranks.joint else 1

    def is_on(self, part: str) -> bool:
        """Whether a part is on, as far as all ranks know.

        Until they know that it is off they wait for this one at the end of a step.
        """
        known = self._isolation.agreed if self._ranks.joint else self._isolation.failures
        return part not in known

    def combine(self, tensors: StepTensors | None) -> tuple[StepTensors | None, Tensor | None]:
        """The sampled step of all ranks.

        Args:
            tensors: of this rank, or None if it could not be captured.

        Returns:
            Those of all ranks, or of this one if they do not train together, None if neither can
            be told; and for each of the parts on how many ranks it has failed, None if there are
            no other ranks.
        """
        failures = None
        if self._ranks.joint:
            combined = self._isolation.run(RANKS, self._reduce, tensors)
            if combined is None:
                self._ranks.leave()
                self._ranks.go_alone("the exchange failed")
            else:
                tensors, failures = combined
        if self._ranks.in_parts and not self._ranks.joint:
            self._isolation.run(CAPTURE, self._refuse_parts)
            tensors = None
        return tensors, failures

    def limits(self) -> list[str]:
        """What this training hides from the watch, one sentence each."""
        found = []
        if self._ranks.because:
            rank, because = self._ranks.rank, self._ranks.because
            found.append(f"values are those of rank {rank} alone: {because}")
        return found

    def leave(self) -> None:
        """Tells the other ranks not to wait for this one any more; joins those that do."""
        if self._ranks.leave():
            self._isolation.run(RANKS, self._come_for_the_last_time)

    @torch.no_grad()
    def _come_for_the_last_time(self) -> None:
        self._layout().combine(None, self._isolation, left=True)

    @torch.no_grad()
    def _reduce(self, tensors: StepTensors | None) -> tuple[StepTensors | None, Tensor | None]:
        if not self._ranks.meet():
            # What the probes of this step added up may be without the ranks that are gone.
            return None if tensors is None else replace(tensors, probed={}), None
        return self._layout().combine(tensors, self._isolation)

    def _layout(self) -> Reduction:
        if self._reduction is None:
            self._reduction = Reduction(
                self._ranks,
                self._parameters(),
                self._layers,
                self._parts,
                self._numbers,
                self._clock,
            )
        return self._reduction

    def _refuse_parts(self) -> None:
        raise AttachError(
            f"the parameters lie on several ranks in parts, but "
            f"{self._ranks.because or 'distributed=False tells each rank apart'}; watch the "
            "model on every rank until the end"
        )

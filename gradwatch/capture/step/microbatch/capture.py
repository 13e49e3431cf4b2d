"""Micro-batch gradient norms of the sampled steps of one training."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final

from torch import Tensor, nn

from gradwatch.capture.hooks import inside_backward
from gradwatch.capture.part import MICROBATCHES
from gradwatch.capture.step.microbatch.leaf import LeafTap
from gradwatch.capture.step.microbatch.record import MicrobatchNorms, MicrobatchRecord
from gradwatch.capture.step.microbatch.reduce_scatter import TENSOR_PARALLEL, ReduceScatterTaps
from gradwatch.capture.step.microbatch.weight import Weight
from gradwatch.isolation import Isolation
from gradwatch.numerics.sharding import is_sharded

ALTERNATING: Final = (
    "the optimizers step one after another, each on a loss of its own, so that the step has no "
    "one gradient"
)
FAILED: Final = f"{MICROBATCHES} failed and are switched off"
FSDP1: Final = "FullyShardedDataParallel shows no gradient before it is reduced; use fully_shard"
STEP_IN_BACKWARD: Final = "the optimizer steps inside backward(), before all gradients are there"


class MicrobatchCapture:
    """Measures `||g_i||²` of every micro-batch of a sampled step, without a read on the host.

    Hooks are on the parameters from the first training forward of a sampled step to its end; on
    other steps nothing is there, save one test of a flag before each reduce-scatter of FSDP2.

    What cannot be seen: that gradients left over from an earlier step were kept, and that
    gradients were changed between two backwards of several processes.

    Args:
        model: with its wrappers.
        parameters: gives the optimized parameters by name, as they are now.
        isolation: what to do when something fails, under the name `MICROBATCHES`.
        sees_forwards: `begin_microbatch` will be called; otherwise a step may have one backward
            only.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Callable[[], Mapping[str, Tensor]],
        isolation: Isolation,
        *,
        sees_forwards: bool = True,
    ) -> None:
        self._parameters = parameters
        self._isolation = isolation
        self._sees_forwards = sees_forwards
        self._record = MicrobatchRecord()
        self._leaf = LeafTap(self._record, isolation)
        self._sharded = ReduceScatterTaps(model, self._record, isolation)
        fsdp1 = any(type(item).__name__ == "FullyShardedDataParallel" for item in model.modules())
        self._obstacle = FSDP1 if fsdp1 else self._sharded.unavailable
        self._attached = False
        self._stepped = False

    @property
    def recording(self) -> bool:
        """Whether a sampled step is under way."""
        return self._record.active

    def begin_step(self, *, project: bool = False) -> None:
        """A sampled step begins, or begins anew because it raised.

        Args:
            project: keep a projection of the gradient of each micro-batch.
        """
        self.end_step()
        if MICROBATCHES in self._isolation.failures:
            return
        self._record.start(project=project)
        if self._obstacle is not None:
            self._record.spoil(self._obstacle)
        elif not self._sees_forwards:
            self._attach()

    def begin_microbatch(self) -> None:
        """A training forward begins; does nothing outside of a sampled step."""
        if not self._record.active:
            return
        if self._stepped:
            self._record.spoil(ALTERNATING)
            return
        if not self._attached:
            self._attach()
        self._record.begin()

    def abandon_microbatch(self) -> None:
        """The forward that just began raised: there will be no backward of it."""
        self._record.abandon()

    def weigh(self, weight: Weight) -> None:
        """Takes the weight of the micro-batch whose forward was the last."""
        if self._record.active:
            self._record.weigh(weight)

    @property
    def count(self) -> int:
        """Micro-batches of the step under way so far, 0 if they cannot be measured."""
        return self._record.count

    def untouched(self, parameters: Mapping[str, Tensor]) -> bool:
        """Whether the gradients are what the last backward left.

        Args:
            parameters: of an optimizer that is about to step.
        """
        return self._record.active and self._leaf.untouched(parameters)

    def optimizer_stepped(self) -> None:
        """One of the step's optimizers has stepped."""
        self._stepped = True

    def take(self) -> MicrobatchNorms:
        """Ends the step.

        Returns:
            Its micro-batches, or why they are not known.
        """
        if MICROBATCHES in self._isolation.failures:
            self._record.spoil(FAILED)
        if self._record.active and inside_backward():
            self._record.spoil(STEP_IN_BACKWARD)
        if self._record.active and self._attached:
            self._leaf.check_complete(self._plain(self._parameters()))
            self._sharded.check_complete()
        norms = self._record.norms()
        self.end_step()
        return norms if self._sharded.averages else replace(norms, weights=None)

    def end_step(self) -> None:
        """Ends the step, taken or not; no hook is left on the parameters."""
        self._record.stop()
        self._leaf.remove()
        self._attached = False
        self._stepped = False

    def remove(self) -> None:
        """Takes everything off the model."""
        self.end_step()
        self._sharded.remove()

    def _attach(self) -> None:
        self._attached = True
        plain = self._plain(self._parameters())
        if any(map(is_sharded, plain.values())):
            self._record.spoil(TENSOR_PARALLEL)
            return
        self._leaf.attach(plain)

    def _plain(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: item for name, item in parameters.items() if not self._sharded.manages(item)}

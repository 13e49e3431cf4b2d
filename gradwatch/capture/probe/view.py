"""What a monitor's probe may do in one sampled step."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Final

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradwatch.capture.forward.gate import tensors_in
from gradwatch.capture.joint_sums import JointSums
from gradwatch.capture.model.names import canonical
from gradwatch.capture.probe.batch import ObjectiveError
from gradwatch.capture.probe.curvature import Curvature
from gradwatch.capture.probe.objective import Objective
from gradwatch.capture.probe.preconditioner import (
    Preconditioner,
    has_preconditioner,
    preconditioner,
)
from gradwatch.capture.probe.undisturbed import same_draws
from gradwatch.capture.probe.whole import (
    padded,
    sharded_parameters,
    whole_parameters,
    without_sharding,
)
from gradwatch.numerics.finite_difference import FiniteDifference
from gradwatch.numerics.hvp import Hessian
from gradwatch.records import ModelInfo

_ROUGH: Final = (
    "the curvature is measured under the autocast of the training, and is rough: without it the "
    "types of the model's parameters and of its batch do not fit together"
)


@dataclass(slots=True)
class ProbeView:
    """The training loss as a function of the parameters, at the beginning of an optimizer step.

    The parameters are those that the batch of the step has not moved yet, so that a gradient of
    the batch is a fresh draw.

    Attributes:
        model: facts about the model.
        lr: learning rate of the first parameter group [P²/L].
        independent_gradients: how many independent gradients the step's own one is averaged
            from, over micro-batches and ranks: with two or more, the noise is known anyway.
        ranks: that train together.
        objective: the loss on the last batch that the model was called with, or None.
        fixed_objective: the loss on the `probe_batch` of the watch, or None.
        optimized: names of the parameters that the optimizers hold; None for all.
        optimizer: the only one, as it is before its step; None if there are several.
        sums: over the ranks that probe together, as many as the monitor's `joint_sums` says;
            None where each rank probes by itself.
        notes: what could not be measured, and why.
    """

    model: ModelInfo
    lr: float | Tensor | None = None
    independent_gradients: int = 1
    ranks: int = 1
    objective: Objective | None = None
    fixed_objective: Objective | None = None
    optimized: frozenset[str] | None = None
    optimizer: Optimizer | None = None
    sums: JointSums | None = None
    notes: list[str] = field(default_factory=list)

    def note(self, reason: str) -> None:
        """Says what could not be measured, and why; shown once in the report.

        Args:
            reason: one sentence.
        """
        self.notes.append(reason)

    @property
    def last(self) -> Objective:
        """The loss on the last batch.

        Raises:
            ObjectiveError: if it cannot be evaluated again.
        """
        if self.objective is None:
            raise ObjectiveError(
                "the loss cannot be evaluated again; give the watch a loss_fn(model, batch)"
            )
        return self.objective

    @property
    def any(self) -> Objective:
        """The loss on the fixed probe batch, or else on the last batch.

        Raises:
            ObjectiveError: if neither can be evaluated.
        """
        return self.last if self.fixed_objective is None else self.fixed_objective

    @property
    def first_input(self) -> Tensor | None:
        """The first tensor of floating-point numbers in the last batch, without its graph, or None.

        Raises:
            ObjectiveError: if there is no batch.
        """
        found = (item.detach() for item in tensors_in(self.last.inputs()))
        return next((item for item in found if item.is_floating_point()), None)

    def parameters(self, objective: Objective) -> dict[str, Tensor]:
        """The optimized parameters as they are now, leaf tensors, copies.

        Args:
            objective: one of the two.

        Returns:
            Name and tensor.
        """
        return self.of_optimizers(objective.parameters())

    def gradient(
        self,
        objective: Objective,
        *,
        rows: slice | None = None,
        at: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """The gradient of the loss.

        Args:
            objective: one of the two.
            rows: the examples of the batch to use; None for all.
            at: other values of the parameters, leaf tensors that require gradients.

        Returns:
            Name and gradient of each optimized parameter, zeros where the loss does not depend on
            it [L/P].
        """
        given = self.parameters(objective) if at is None else at
        return objective.gradient(given, rows)

    @property
    def microbatches(self) -> int:
        """How many gradients of this rank the step's own one is averaged from, if it is known."""
        return max(1, self.independent_gradients // self.ranks)

    @property
    def preconditioned(self) -> bool:
        """Whether the optimizer is one whose preconditioner is known."""
        return self.optimizer is not None and has_preconditioner(self.optimizer)

    @contextmanager
    def curvature(
        self, objective: Objective, *, finite_differences: bool = False
    ) -> Iterator[Curvature]:
        """Gradient and Hessian of the loss by the optimized parameters, of all ranks together.

        Several ranks add up each gradient and each product: `joint_sums` of the monitor counts
        them. Sharded parameters are made whole on each rank for as long as the block lasts, which
        takes the memory of the whole model there. Autocast is off, unless parts of the model or
        of the batch are of another type than float32.

        Args:
            objective: one of the two.
            finite_differences: of gradients instead of second derivatives.

        Yields:
            The curvature, whose graph is kept until the block ends.

        Raises:
            ObjectiveError: for finite differences of sharded parameters, or under autocast; if
                the loss cannot be evaluated.
        """
        model, sums = objective.model, self.sums
        sharded = sums is not None and bool(sharded_parameters(model))
        if sums is not None and sharded:
            everything = whole_parameters(model, sums)
        else:
            everything = objective.parameters()
        wanted = self.of_optimizers(everything)
        own = self.of_optimizers(dict(model.named_parameters()))
        with ExitStack() as stack:
            if sharded:
                stack.enter_context(without_sharding(model))
            kind = next(iter(wanted.values())).device.type
            if _is_float32(objective):
                # Second derivatives of half precision are rough.
                stack.enter_context(torch.autocast(kind, enabled=False))
            elif torch.is_autocast_enabled(kind):
                if finite_differences:
                    raise ObjectiveError("finite differences are not taken under autocast")
                self.note(_ROUGH)
            precondition = partial(self._preconditioner, own)
            if finite_differences:
                hessian: Hessian | FiniteDifference = _differences(objective, wanted, sharded)
            else:
                kept = objective.hessian(everything, by=[*wanted.values()])
                hessian = stack.enter_context(kept)
            yield Curvature(hessian, sums, objective, everything, precondition)

    def _preconditioner(self, own: Mapping[str, Tensor]) -> Preconditioner | None:
        found = None if self.optimizer is None else preconditioner(self.optimizer, own)
        if found is None or self.sums is None:
            return found
        share = self.sums.share
        pairs = zip(own.values(), found.inverse_roots, strict=True)
        whole = self.sums.sum([padded(item, share(item), part) for item, part in pairs])
        return Preconditioner(tuple(whole))

    def of_optimizers(self, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those of some parameters that the optimizers hold and that are trained.

        Args:
            named: by the names that the model gives them.

        Returns:
            Name and tensor, in the same order.
        """
        held = self.optimized
        return {
            name: item
            for name, item in named.items()
            if item.requires_grad and (held is None or canonical(name) in held)
        }


def _is_float32(objective: Objective) -> bool:
    """Whether the model and its batch need no autocast to fit together, as far as they show."""
    tensors = chain(objective.model.parameters(), tensors_in(objective.inputs()))
    return all(item.dtype == torch.float32 for item in tensors if item.is_floating_point())


def _differences(
    objective: Objective, wanted: Mapping[str, Tensor], sharded: bool
) -> FiniteDifference:
    if sharded:
        raise ObjectiveError("finite differences are not taken of sharded parameters")

    def gradient(leaves: Sequence[Tensor]) -> list[Tensor]:
        with same_draws(objective.model):
            return [*objective.gradient(dict(zip(wanted, leaves, strict=True))).values()]

    return FiniteDifference(gradient, [*wanted.values()])

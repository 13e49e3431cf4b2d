"""What a monitor's probe may do in one sampled step."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from gradwatch.capture.forward.gate import tensors_in
from gradwatch.capture.model.names import canonical
from gradwatch.capture.probe.batch import ObjectiveError
from gradwatch.capture.probe.objective import Objective
from gradwatch.records import ModelInfo


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
        objective: the loss on the last batch that the model was called with, or None.
        fixed_objective: the loss on the `probe_batch` of the watch, or None.
        optimized: names of the parameters that the optimizers hold; None for all.
        notes: what could not be measured, and why.
    """

    model: ModelInfo
    lr: float | Tensor | None = None
    independent_gradients: int = 1
    objective: Objective | None = None
    fixed_objective: Objective | None = None
    optimized: frozenset[str] | None = None
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
        found = objective.parameters()
        held = self.optimized
        return {
            name: item for name, item in found.items() if held is None or canonical(name) in held
        }

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

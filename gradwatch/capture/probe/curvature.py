"""Gradient and Hessian of the training loss, of one process or of all that train together."""

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from gradwatch.capture.joint_sums import JointSums
from gradwatch.capture.probe.objective import Objective
from gradwatch.capture.probe.preconditioner import Preconditioner
from gradwatch.numerics.finite_difference import FiniteDifference
from gradwatch.numerics.hvp import Hessian
from gradwatch.numerics.noise import inner_product


class Curvature:
    """The loss to second order, at the beginning of an optimizer step.

    On several ranks it is that of the mean of their losses. All ranks must multiply the same
    vectors, as often as the monitor has said.

    Args:
        hessian: of the loss on this rank.
        sums: over the ranks; None for a single process.
        objective: the loss.
        parameters: by name, what the model has in the place of its own.
        precondition: reads the state of the optimizer.

    Attributes:
        point: the values that it is taken at, whole, one tensor a parameter [P].
        objective: the loss.
    """

    def __init__(
        self,
        hessian: Hessian | FiniteDifference,
        sums: JointSums | None,
        objective: Objective,
        parameters: Mapping[str, Tensor],
        precondition: Callable[[], Preconditioner | None] = lambda: None,
    ) -> None:
        self.point = hessian.parameters
        self.objective = objective
        self._hessian = hessian
        self._sums = sums
        self._parameters = parameters
        self._precondition = precondition

    def gradient(self) -> Sequence[Tensor]:
        """The gradient of the loss, one of the joint sums [L/P]."""
        return self.mean(self._hessian.gradient)

    def product(self, vector: Sequence[Tensor]) -> Sequence[Tensor]:
        """The Hessian times a vector, one of the joint sums.

        Args:
            vector: one tensor a parameter, of its shape.

        Returns:
            One tensor a parameter, of its shape [L/P² times the unit of the vector].
        """
        return self.mean(self._hessian(vector))

    def mean(self, vector: Sequence[Tensor]) -> Sequence[Tensor]:
        """The mean over the ranks, one of the joint sums; the vector itself for a single process.

        Args:
            vector: one tensor a parameter, of its shape.

        Returns:
            The same on all ranks.
        """
        sums = self._sums
        return vector if sums is None else sums.sum([item / sums.ranks for item in vector])

    def preconditioner(self) -> Preconditioner | None:
        """What the optimizer divides gradients by, one of the joint sums.

        Returns:
            `P^(-1/2)`, whole; None if it is not known, or not there yet.
        """
        return self._precondition()

    def along(self, vector: Sequence[Tensor], rows: slice) -> Tensor:
        """The curvature of the loss of some examples along a direction, on this rank alone.

        Args:
            vector: one tensor a parameter, together of length 1.
            rows: the examples.

        Returns:
            () tensor [L/P²].
        """
        with self.objective.hessian(self._parameters, rows, by=self.point) as hessian:
            return inner_product(vector, hessian(vector))

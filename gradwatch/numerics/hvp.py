"""Products of a loss's Hessian with vectors, by differentiating the gradient once more."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gradwatch.numerics.second_derivative import require_second_derivative


class Hessian:
    """The Hessian of a loss as a linear map, on one kept graph of the gradient.

    The gradient is taken once; each product costs one more backward through its graph, about two
    gradients. The graph lives as long as this object.

    Args:
        loss: () tensor with its graph [L].
        parameters: the tensors to differentiate by [P].

    Raises:
        NoSecondDerivativeError: if a custom function of the model has no second derivative; torch
            would take it for 0.

    Attributes:
        parameters: the same tensors.
        gradient: of the loss by each of them, zeros where it does not depend on one [L/P].

    Example:
        >>> point = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> hessian = Hessian((point**3).sum(), [point])
        >>> hessian([torch.ones(2)])
        (tensor([ 6., 12.]),)
    """

    def __init__(self, loss: Tensor, parameters: Sequence[Tensor]) -> None:
        self.parameters = tuple(parameters)
        require_second_derivative(loss)
        self._slopes = torch.autograd.grad(
            loss, self.parameters, create_graph=True, allow_unused=True, materialize_grads=True
        )

    @property
    def gradient(self) -> tuple[Tensor, ...]:
        """The gradient without its graph, one tensor a parameter [L/P]."""
        return tuple(slope.detach() for slope in self._slopes)

    def __call__(self, vector: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Multiplies the Hessian with a vector.

        Args:
            vector: one tensor a parameter, of its shape.

        Returns:
            One tensor a parameter, of its shape [L/P² times the unit of the vector].
        """
        pairs = zip(self._slopes, vector, strict=True)
        # Where the loss is linear the gradient has no graph, and the second derivative is 0.
        curved = [(slope, part) for slope, part in pairs if slope.requires_grad]
        if not curved:
            return tuple(torch.zeros_like(parameter) for parameter in self.parameters)
        slopes, parts = zip(*curved, strict=True)
        return torch.autograd.grad(
            slopes,
            self.parameters,
            grad_outputs=parts,
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )


def hvp(loss: Tensor, parameters: Sequence[Tensor], vector: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """A single product of a loss's Hessian with a vector.

    Args:
        loss: () tensor with its graph [L].
        parameters: the tensors to differentiate by [P].
        vector: one tensor a parameter, of its shape.

    Returns:
        One tensor a parameter, of its shape [L/P² times the unit of the vector].

    Example:
        >>> point = torch.tensor([3.0], requires_grad=True)
        >>> hvp(point.square().sum(), [point], [torch.tensor([0.5])])
        (tensor([1.]),)
    """
    return Hessian(loss, parameters)(vector)

"""Products with a Hessian from two gradients, where second derivatives do not exist."""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Final

import torch
from torch import Tensor

from gradwatch.numerics.noise import inner_product

Gradient = Callable[[Sequence[Tensor]], Sequence[Tensor]]
"""The gradient of a loss at leaf tensors that it is given, one tensor a parameter [L/P]."""
STEP: Final = 1e-3
"""Length of the step over that of the parameters: larger ones bend, smaller ones are rounding."""


class FiniteDifference:
    """The Hessian of a loss as a linear map, by central differences of its gradient.

    `H v ~ (g(theta + h v/|v|) - g(theta - h v/|v|)) |v| / (2 h)`, `h = 0.001 |theta|`. A fallback,
    to be labelled as one: fused attention, compiled models and user functions without a second
    derivative have gradients all the same. To be called like a `Hessian`.

    In float32 it was 0.005 % off on smooth networks, and 0.2 to 70 % on others, depending on the
    step. It is not valid with ReLU, whose kinks lie within the step (the sign of the curvature was
    wrong in one experiment), nor in half precision (58 % off). It is symmetric only up to these
    errors. The gradient must draw the same dropout masks each time.

    Args:
        gradient: of the loss, at other values of the parameters; two calls a product.
        parameters: the values to differentiate at, which are not changed: the points beside them
            are new tensors [P].
        step: length of the step over that of the parameters.

    Attributes:
        parameters: the same tensors.

    Example:
        >>> point = torch.tensor([1.0, 2.0], dtype=torch.float64)
        >>> product = FiniteDifference(lambda at: [3 * at[0] ** 2], [point])
        >>> product([torch.ones(2, dtype=torch.float64)])[0].round(decimals=4)
        tensor([ 6., 12.], dtype=torch.float64)
    """

    def __init__(
        self, gradient: Gradient, parameters: Sequence[Tensor], step: float = STEP
    ) -> None:
        self.parameters = tuple(parameters)
        self._gradient = gradient
        length = _length(self.parameters)
        # At the origin there is no length to go by.
        self._step = step * torch.where(length > 0, length, 1.0)

    @cached_property
    def gradient(self) -> tuple[Tensor, ...]:
        """The gradient, one tensor a parameter [L/P]."""
        return tuple(self._at([part.detach().clone() for part in self.parameters]))

    def __call__(self, vector: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Multiplies the Hessian with a vector.

        Args:
            vector: one tensor a parameter, of its shape.

        Returns:
            One tensor a parameter, of its shape [L/P² times the unit of the vector]; zeros for a
            vector of zeros.
        """
        length = _length(vector)
        scale = torch.where(length > 0, self._step / length, 0.0)
        above, below = (self._at(self._beside(vector, sign * scale)) for sign in (1, -1))
        back = length / (2 * self._step)
        return tuple(
            (one - other) * back.to(one.device, one.dtype)
            for one, other in zip(above, below, strict=True)
        )

    def _beside(self, vector: Sequence[Tensor], scale: Tensor) -> list[Tensor]:
        return [
            torch.add(point.detach(), scale.to(part.device, part.dtype) * part)
            for point, part in zip(self.parameters, vector, strict=True)
        ]

    def _at(self, point: Sequence[Tensor]) -> list[Tensor]:
        leaves = [part.requires_grad_() for part in point]
        return [slope.detach() for slope in self._gradient(leaves)]


def _length(vector: Sequence[Tensor]) -> Tensor:
    return inner_product(vector, vector).sqrt()

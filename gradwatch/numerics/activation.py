"""The activation functions that theory has laws for, on tensors."""

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

PLAIN: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "relu": torch.relu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "silu": functional.silu,
    "tanh": torch.tanh,
    "elu": functional.elu,
    "identity": lambda x: x,
}


def activate(name: str, values: Tensor, negative_slope: float = 0.0) -> Tensor:
    """Applies an activation by its name.

    Args:
        name: a key of `PLAIN` or "leaky_relu".
        values: pre-activations of any shape.
        negative_slope: of the leaky ReLU.

    Returns:
        The activations, of the same shape.

    Example:
        >>> activate("relu", torch.tensor([-1.0, 2.0]))
        tensor([0., 2.])
    """
    if name == "leaky_relu":
        return functional.leaky_relu(values, negative_slope)
    return PLAIN[name](values)

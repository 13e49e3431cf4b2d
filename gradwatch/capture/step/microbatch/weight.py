"""What a micro-batch weighs in the average that the gradient of its step is."""

import math
from collections.abc import Sequence
from numbers import Real
from typing import TypeGuard

import torch
from torch import Tensor

from gradwatch.errors import ConfigError

Weight = float | Tensor | None
"""In any unit; None where it is not known."""


def check_weight(weight: object) -> None:
    """Checks a weight; a tensor is not read.

    Args:
        weight: of one micro-batch.

    Raises:
        ConfigError: if it is neither None, nor one number from 0 up, nor a tensor of one.
    """
    if isinstance(weight, Tensor):
        if weight.numel() != 1:
            raise ConfigError(
                f"weight must be one number, got a tensor of shape {tuple(weight.shape)}; pass "
                "the number of tokens, or what else the loss is divided by"
            )
    elif weight is not None and not (_is_number(weight) and 0 <= weight < math.inf):
        raise ConfigError(
            f"weight must be None, a number from 0 up or a tensor of one, got {weight!r}; pass "
            "what the loss of the micro-batch counts for in that of the step"
        )


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, Real)


def known_weights(told: Sequence[Sequence[Weight]], device: torch.device) -> Tensor | None:
    """The weights of the micro-batches of one step.

    Args:
        told: for each of k micro-batches, what was told after each of its forwards.
        device: of the result.

    Returns:
        (k,) float32, 1 each if nobody told any; None if only some are known.
    """
    if not any(told):
        return torch.ones(len(told), device=device)
    if not all(told) or any(weight is None for weights in told for weight in weights):
        return None
    return torch.stack([_sum(weights, device) for weights in told])


def _sum(weights: Sequence[Weight], device: torch.device) -> Tensor:
    return torch.stack([_on_device(weight, device) for weight in weights]).sum()


def _on_device(weight: Weight, device: torch.device) -> Tensor:
    if isinstance(weight, Tensor):
        return weight.reshape(()).to(device, torch.float32, non_blocking=True)
    # Filled in there: a copy of a number would wait for the device.
    return torch.full((), float(weight or 0.0), device=device)

"""The diagonal matrix that an optimizer divides gradients by, from its state."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer, RMSprop

from gradwatch.capture.step.adam import bias_correction
from gradwatch.numerics.sharding import local_part

_KINDS: Final = (Adam, AdamW, RMSprop)
"""Subclasses may divide by something else."""


@dataclass(frozen=True, slots=True)
class Preconditioner:
    """`P`, by which an optimizer divides each entry of a gradient, or of its mean.

    Attributes:
        inverse_roots: `P^(-1/2)`, one tensor a parameter, of its part on this rank; 0 where the
            optimizer has no state, so that the parameter does not move [(P/L)^(1/2)].
    """

    inverse_roots: tuple[Tensor, ...]


def has_preconditioner(optimizer: Optimizer) -> bool:
    """Whether an optimizer is one whose preconditioner is known.

    Args:
        optimizer: any.

    Returns:
        True for torch's own Adam, AdamW and RMSprop.
    """
    return type(optimizer) in _KINDS


@torch.no_grad()
def preconditioner(optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> Preconditioner | None:
    """Reads the state of an optimizer, without a read on the host.

    Adam and AdamW after t steps: `P = (1 - beta1^t) (sqrt(v / (1 - beta2^t)) + eps)`, with the
    largest `v` so far for amsgrad. RMSprop: `P = sqrt(v) + eps`, and with `centered` the square of
    the mean gradient is taken off `v`.

    Args:
        optimizer: any.
        parameters: whose entries are wanted, by name, of the optimizer; may be sharded.

    Returns:
        The preconditioner; None for other optimizers, and before the first step.
    """
    if not has_preconditioner(optimizer):
        return None
    groups = {id(item): group for group in optimizer.param_groups for item in group["params"]}
    if not any(id(item) in groups and optimizer.state.get(item) for item in parameters.values()):
        return None
    return Preconditioner(
        tuple(_inverse_root(item, groups, optimizer) for item in parameters.values())
    )


def _inverse_root(
    parameter: Tensor, groups: Mapping[int, Mapping[str, Any]], optimizer: Optimizer
) -> Tensor:
    group, state = groups.get(id(parameter)), optimizer.state.get(parameter)
    if group is None or not state:
        return torch.zeros_like(local_part(parameter))
    divisor = _of_rmsprop(state, group) if "square_avg" in state else _of_adam(state, group)
    return divisor.rsqrt()


def _of_rmsprop(state: Mapping[str, Any], group: Mapping[str, Any]) -> Tensor:
    square = local_part(state["square_avg"])
    if group["centered"]:
        square = (square - local_part(state["grad_avg"]).square()).clamp(min=0.0)
    divisor: Tensor = square.sqrt() + group["eps"]
    return divisor


def _of_adam(state: Mapping[str, Any], group: Mapping[str, Any]) -> Tensor:
    square = local_part(state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"])
    first, second = (bias_correction(beta, _steps(state, square)) for beta in group["betas"])
    divisor: Tensor = first * ((square / second).sqrt() + group["eps"])
    return divisor


def _steps(state: Mapping[str, Any], like: Tensor) -> Tensor:
    """Of one parameter, beside its state; Adam mostly keeps the count on the host."""
    steps = torch.as_tensor(state["step"], dtype=torch.float32)
    return local_part(steps).reshape(()).to(like.device, non_blocking=True)

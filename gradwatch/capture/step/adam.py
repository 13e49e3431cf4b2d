"""What an Adam's state tells of the gradients before this step, without a read on the host."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer

from gradwatch.capture.view import NamedValues
from gradwatch.numerics.norms import norms
from gradwatch.numerics.sharding import local_part

_ADAMS: Final = (Adam, AdamW)
"""Subclasses may keep other things under the same names."""

FEWEST_STEPS: Final = 2
"""After one step both moments are those of one gradient, and nothing tells square and variance."""


@dataclass(frozen=True, slots=True)
class StateMoments:
    """The bias-corrected moments of each parameter, as far as they lie on this rank.

    Attributes:
        first_squares: `||m_hat||²` of each parameter [L²/P²].
        seconds: sum over its entries of `v_hat` [L²/P²].
        shrink: variance of `m_hat` over that of one gradient, mean over the parameters; NaN if
            one of them has taken less than two steps.
    """

    first_squares: NamedValues
    seconds: NamedValues
    shrink: Tensor


def state_moments(optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> StateMoments | None:
    """Reads the moments of an optimizer that is about to step.

    With t steps in the state, `m_hat = m / (1-b1^t)` and `v_hat = v / (1-b2^t)`; if all gradients
    had one law, `Var m_hat = shrink Var g`, `shrink = (1-b1)(1+b1^t) / ((1+b1)(1-b1^t))`.

    Args:
        optimizer: any; read if it is torch's own Adam or AdamW.
        parameters: all that it holds, by name.

    Returns:
        The moments, or None: without a step in the past, with `amsgrad` or groups of different
        betas, and with a weight decay that is added to the gradients, and so to their moments.
    """
    groups = optimizer.param_groups
    if type(optimizer) not in _ADAMS or not all(map(_is_of_gradients_alone, groups)):
        return None
    first, second = groups[0]["betas"]
    if any(group["betas"] is not groups[0]["betas"] for group in groups) and not _equal(groups):
        return None
    states = {
        name: optimizer.state[item]
        for name, item in parameters.items()
        if item.requires_grad and "exp_avg" in optimizer.state.get(item, {})
    }
    return _moments(states, first, second) if states else None


def _is_of_gradients_alone(group: Mapping[str, Any]) -> bool:
    decay = group["weight_decay"]
    decoupled = group.get("decoupled_weight_decay", False)
    plain = not isinstance(decay, Tensor) and decay == 0  # a tensor would have to be read
    return not group["amsgrad"] and (plain or decoupled)


def _equal(groups: Sequence[Mapping[str, Any]]) -> bool:
    betas = [group["betas"] for group in groups]
    numbers = all(not isinstance(beta, Tensor) for pair in betas for beta in pair)
    return numbers and all(tuple(pair) == tuple(betas[0]) for pair in betas)


def _moments(
    states: Mapping[str, Mapping[str, Any]], first: float | Tensor, second: float | Tensor
) -> StateMoments:
    names = tuple(states)
    averages = norms([local_part(state["exp_avg"]) for state in states.values()])
    device = averages.device
    squares = [_sum(local_part(state["exp_avg_sq"])).to(device) for state in states.values()]
    steps = [torch.as_tensor(state["step"], dtype=torch.float32) for state in states.values()]
    # Without waiting: these are counts that Adam keeps on the host.
    taken = torch.stack([local_part(step).reshape(()) for step in steps])
    taken = taken.to(device, non_blocking=True)
    corrections = bias_correction(first, taken)
    shrinks = (1 - first) / (1 + first) * (2 - corrections) / corrections
    return StateMoments(
        first_squares=NamedValues(names, (averages / corrections).square()),
        seconds=NamedValues(names, torch.stack(squares) / bias_correction(second, taken)),
        shrink=torch.where(taken < FEWEST_STEPS, torch.nan, shrinks).mean(),
    )


def _sum(values: Tensor) -> Tensor:
    """Added up in a tree, so that long tensors lose no digits."""
    real = torch.view_as_real(values) if values.is_complex() else values
    return real.sum(dtype=torch.float32)


def bias_correction(beta: float | Tensor, steps: Tensor) -> Tensor:
    """`1 - beta^t`, also for a beta so close to 1 that the difference would lose its digits.

    Args:
        beta: of a running mean that started at 0.
        steps: t.

    Returns:
        What the mean is divided by to be unbiased.
    """
    if isinstance(beta, Tensor):
        return -torch.expm1(steps * beta.to(steps).log())
    return -torch.expm1(steps * (math.log(beta) if beta > 0 else -math.inf))

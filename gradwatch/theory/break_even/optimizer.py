"""The stability threshold of the optimizer that is running, or why there is none."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from gradwatch.records import StepInfo
from gradwatch.theory.break_even.threshold import (
    adam_threshold,
    adamw_threshold,
    momentum_threshold,
    nesterov_threshold,
    rmsprop_threshold,
)

PRECONDITIONED: Final = frozenset({"Adam", "AdamW", "RMSprop"})
"""Optimizers whose threshold is about the preconditioned Hessian."""

UNSETTLED_STEPS: Final = 10.0
"""In its first steps an Adam divides by the noise of a few gradients."""
RMSPROP_UNSETTLED_STEPS: Final = 100.0
"""v starts at 0 without correction, so that sqrt(v) grows by 1/(2 t) in step t, whatever alpha."""


@dataclass(frozen=True, slots=True)
class Threshold:
    """A stability threshold, or the reason for which there is none.

    Attributes:
        value: the threshold, above 0; NaN if there is none. On lambda_max(H) [L/P²], or on
            lambda_max(P^-1 H) [1/P], with the weight decay of Adam and RMSprop in H.
        preconditioned: whether it is about P^-1 H; False if that is not known.
        because: why there is none, in words; empty if there is one.
    """

    value: float
    preconditioned: bool
    because: str = ""

    @property
    def known(self) -> bool:
        """Whether there is a threshold."""
        return not self.because


def threshold_of(
    optimizer: str,
    learning_rates: Sequence[float],
    *,
    momentum: float | None = None,
    dampening: float | None = None,
    nesterov: bool = False,
    maximize: bool = False,
    betas: Sequence[float] | None = None,
    weight_decay: float | None = None,
) -> Threshold:
    """The threshold of one of PyTorch's optimizers.

    Known are SGD (heavy ball, dampening, Nesterov, weight decay), Adam, AMSGrad, AdamW and RMSprop.
    For Adam and RMSprop with weight decay it is the threshold on P^-1 (H + wd I).

    Args:
        optimizer: name of its class.
        learning_rates: of all parameter groups [P²/L], of preconditioned ones [P].
        momentum: of SGD and RMSprop; None for none.
        dampening: of SGD; None for none.
        nesterov: whether the momentum of SGD is Nesterov's.
        maximize: whether it goes up the gradient, where no step is stable.
        betas: of Adam and AdamW.
        weight_decay: None for none.

    Returns:
        The threshold, or the reason for which there is none. Never raises.

    References:
        The formulas: `momentum_threshold` and its neighbours.

    Example:
        >>> threshold_of("SGD", [0.1]).value
        20.0
        >>> threshold_of("LBFGS", [0.1]).because
        'no stability threshold is known for LBFGS'
    """
    preconditioned = optimizer in PRECONDITIONED
    decay = weight_decay or 0.0
    because = (
        _of_the_optimizer(optimizer)
        or ("the optimizer maximises" if maximize else "")
        or _of_the_rates(learning_rates)
        or _of_the_momentum(optimizer, momentum, dampening, betas)
        or _of_the_decay(decay)
    )
    if because:
        return Threshold(math.nan, preconditioned, because)
    rate, beta, beta1 = learning_rates[0], momentum or 0.0, betas[0] if betas else 0.0
    match optimizer:
        case "RMSprop":
            value = rmsprop_threshold(rate, beta)
        case "Adam":
            value = adam_threshold(rate, beta1)
        case "AdamW":
            value = adamw_threshold(rate, beta1, decay)
        case _ if nesterov and beta:
            value = nesterov_threshold(rate, beta, decay)
        case _:
            # Without momentum torch's SGD leaves the dampening out of account.
            value = momentum_threshold(rate, beta, (dampening or 0.0) if beta else 0.0, decay)
    if not 0.0 < value < math.inf:
        return Threshold(math.nan, preconditioned, _no_number(value))
    return Threshold(value, preconditioned)


def threshold_at(step: StepInfo) -> Threshold:
    """The stability threshold with the settings of one step.

    Args:
        step: its settings.

    Returns:
        As `threshold_of`.
    """
    return threshold_of(
        step.optimizer,
        step.lrs,
        momentum=step.momentum,
        dampening=step.dampening,
        nesterov=step.nesterov,
        maximize=step.maximize,
        betas=step.betas,
        weight_decay=step.weight_decay,
    )


def settled_step(optimizer: str, betas: Sequence[float] | None = None) -> float:
    """Step from which on the preconditioner changes slowly enough for its threshold.

    0.1/(1 - beta2) and at least 10 steps for Adam, 100 steps for RMSprop, 0 for others.

    Args:
        optimizer: name of its class.
        betas: of Adam and AdamW.

    Returns:
        The step; inf for an Adam whose betas are unknown or outside [0, 1).

    References:
        Heuristic; the first ten steps of an Adam were seen to be off by far.

    Example:
        >>> round(settled_step("Adam", (0.9, 0.999)), 6), settled_step("SGD")
        (100.0, 0.0)
    """
    if optimizer == "RMSprop":
        return RMSPROP_UNSETTLED_STEPS
    if optimizer not in PRECONDITIONED:
        return 0.0
    if betas is None or len(betas) < 2 or not 0.0 <= betas[1] < 1.0:
        return math.inf
    return max(UNSETTLED_STEPS, 0.1 / (1.0 - betas[1]))


def _of_the_optimizer(name: str) -> str:
    if not name:
        return "the optimizer is unknown"
    if name == "SGD" or name in PRECONDITIONED:
        return ""
    return f"no stability threshold is known for {name}"


def _of_the_rates(rates: Sequence[float]) -> str:
    if not rates:
        return "the optimizer has no learning rate"
    if any(rate != rates[0] for rate in rates[1:]):
        return "the parameter groups have different learning rates"
    if rates[0] == 0.0:
        return "the learning rate is 0"
    if not 0.0 < rates[0] < math.inf:
        return f"the learning rate is {rates[0]:g}, not a positive number"
    return ""


def _of_the_momentum(
    name: str, momentum: float | None, dampening: float | None, betas: Sequence[float] | None
) -> str:
    if name in {"Adam", "AdamW"}:
        if not betas:
            return f"the betas of {name} are unknown"
        return "" if 0.0 <= betas[0] < 1.0 else f"beta1 is {betas[0]:g}, outside [0, 1)"
    if not 0.0 <= (momentum or 0.0) < 1.0:
        return f"the momentum is {momentum:g}, outside [0, 1)"
    if momentum and name == "SGD" and not abs(dampening or 0.0) < 1.0:
        return f"the dampening is {dampening:g}, outside (-1, 1)"
    return ""


def _of_the_decay(decay: float) -> str:
    return "" if 0.0 <= decay < math.inf else f"the weight decay is {decay:g}"


def _no_number(value: float) -> str:
    if value <= 0.0:
        return "the weight decay alone makes the steps unstable"
    return "the settings are too extreme for a threshold"

"""The settings of one optimizer step."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInfo:
    """The settings under which one optimizer step was taken.

    Attributes:
        step: optimizer steps finished before this one; the first is 0.
        epoch: epochs finished, if the loop said so.
        lrs: learning rate of each parameter group [P²/L].
        optimizer: class name of the optimizer; several are joined by "+".
        momentum: momentum of the first group, None where the optimizer has none.
        dampening: of the momentum of the first group, None where it has no momentum.
        nesterov: the momentum of the first group is Nesterov's.
        maximize: the first group goes up the gradient.
        betas: Adam's decay rates of the first group, None where it has none.
        weight_decay: of the first group, None where the optimizer has none.
        batch_size: samples per optimizer step, summed over micro-batches; None if unseen.
        grads_clipped: True or False where clipping was observed, else None.
        loss: the training loss of the step [L]; None if unseen.
        loss_scale: the factor of mixed-precision loss scaling, None without.
        skipped: the loss scaler skipped the step because gradients were not finite.
    """

    step: int
    epoch: float | None = None
    lrs: tuple[float, ...] = ()
    optimizer: str = ""
    momentum: float | None = None
    dampening: float | None = None
    nesterov: bool = False
    maximize: bool = False
    betas: tuple[float, ...] | None = None
    weight_decay: float | None = None
    batch_size: int | None = None
    grads_clipped: bool | None = None
    loss: float | None = None
    loss_scale: float | None = None
    skipped: bool = False

    @property
    def lr(self) -> float | None:
        """The largest learning rate of any parameter group [P²/L]."""
        return max(self.lrs, default=None)

    @property
    def momentum_gain(self) -> float:
        """`(1 - dampening)/(1 - momentum)`, by which momentum makes the steps longer.

        It is 1 without momentum and NaN for a momentum of 1 or more, which has no such limit.

        Example:
            >>> StepInfo(step=0, momentum=0.5, dampening=0.25).momentum_gain
            1.5
        """
        if not self.momentum:
            return 1.0
        if not self.momentum < 1.0:
            return math.nan
        return (1.0 - (self.dampening or 0.0)) / (1.0 - self.momentum)

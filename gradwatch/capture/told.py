"""What is said about a step from outside the model: loss, batch size, epoch."""

from collections.abc import Sequence

import torch
from torch import Tensor


class Told:
    """The loss and the batch size of one step, by where they come from.

    Attributes:
        loss: given by the user.
        closure_loss: returned by the closure of the optimizer step.
        backward_loss: sum of the scalars of the step's `backward()` calls.
        batch_size: given by the user.
        epoch: given by the user; stands until the next one.
    """

    def __init__(self) -> None:
        self.epoch: float | None = None
        self.reset()

    def reset(self) -> None:
        """Forgets all but the epoch, at the end of a step."""
        self.loss: Tensor | None = None
        self.closure_loss: Tensor | None = None
        self.backward_loss: Tensor | None = None
        self.batch_size: int | None = None

    def add_backward_loss(self, loss: Tensor) -> None:
        """Adds the scalar of one `backward()`: with accumulation the parts add up."""
        known = self.backward_loss
        self.backward_loss = loss.clone() if known is None else known + loss

    def best_loss(self, from_model: Sequence[Tensor]) -> Tensor | None:
        """The loss from the most reliable source that spoke.

        Args:
            from_model: the losses that the model itself returned, one a micro-batch.

        Returns:
            What the user gave, else the closure's, else the mean of the model's own, else what
            `backward()` was called on; None if nobody spoke.
        """
        if self.loss is not None:
            return self.loss
        if self.closure_loss is not None:
            return self.closure_loss
        if from_model:
            return torch.stack([loss.reshape(()) for loss in from_model]).mean()
        return self.backward_loss

"""What is said about a step from outside the model: loss, batch size, epoch."""

from collections.abc import Sequence
from numbers import Integral, Real
from types import NoneType

import torch
from torch import Tensor

from gradwatch.errors import ConfigError


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

    def tell(
        self,
        loss: float | Tensor | None,
        batch_size: int | None,
        epoch: float | None,
        *,
        sampled: bool,
    ) -> None:
        """Takes what the user says; None leaves what is known.

        Args:
            loss: a number or a tensor of one, which is not read.
            batch_size: number of samples.
            epoch: epochs finished.
            sampled: the step is sampled; otherwise only the epoch is kept.

        Raises:
            ConfigError: if one of them is something else.
        """
        _check(loss, batch_size, epoch)
        self.epoch = self.epoch if epoch is None else float(epoch)
        if sampled:
            self.batch_size = self.batch_size if batch_size is None else int(batch_size)
            if loss is not None:
                self.loss = torch.as_tensor(loss).detach().reshape(()).clone()

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


def _check(loss: object, batch_size: object, epoch: object) -> None:
    if isinstance(loss, Tensor) and loss.numel() != 1:
        raise ConfigError(
            f"loss must be one number, got a tensor of shape {tuple(loss.shape)}; pass the mean "
            "that backward() is called on"
        )
    if not isinstance(loss, (Tensor, Real, NoneType)):
        raise ConfigError(f"loss must be a number or a tensor of one, got {loss!r}")
    if batch_size is not None and not (isinstance(batch_size, Integral) and int(batch_size) > 0):
        raise ConfigError(f"batch_size must be a positive integer, got {batch_size!r}")
    if not isinstance(epoch, (Real, NoneType)):
        raise ConfigError(f"epoch must be a number, got {epoch!r}")

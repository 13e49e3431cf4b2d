"""The learning rate over the batch size."""

from collections.abc import Iterator

import torch
from torch import Tensor
from typing_extensions import override

from gradwatch.capture.view import StepView
from gradwatch.interfaces import Monitor
from gradwatch.numerics.reading import Reading


class LrBatchRatio(Monitor):
    """Learning rate over batch size, the scale of the noise of SGD [P²/(L sample)].

    The learning rate is that of the first parameter group; the batch size counts the samples of
    all micro-batches of a step.

    References:
        Jastrzebski et al. 2018, "Three Factors Influencing Minima in SGD", arXiv:1711.04623.
    """

    metrics = ("lr_batch_ratio", "batch_size")

    @override
    def read(self, view: StepView) -> Iterator[Reading]:
        if view.batch_size is None:
            view.note(
                "batch_size: the model's inputs do not show it; call watch.observe(batch_size=...)"
            )
            return
        samples = torch.as_tensor(view.batch_size, dtype=torch.float32)
        yield Reading("batch_size", samples, unit="sample")
        if view.lr is not None:
            yield Reading("lr_batch_ratio", _ratio(view.lr, samples), unit="P²/(L sample)")


def _ratio(lr: float | Tensor, samples: Tensor) -> Tensor:
    """On the device of whichever is on one: the other way would be a host read."""
    if not isinstance(lr, Tensor):
        return lr / samples
    device = lr.device if samples.device.type == "cpu" else samples.device
    return lr.to(device, torch.float32) / samples.to(device)

"""The learning rate over the batch size."""

from collections.abc import Iterator

import torch
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
        yield Reading("batch_size", torch.tensor(float(view.batch_size)), unit="sample")
        if view.lr is not None:
            ratio = torch.as_tensor(view.lr, dtype=torch.float32) / view.batch_size
            yield Reading("lr_batch_ratio", ratio, unit="P²/(L sample)")

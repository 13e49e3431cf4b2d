"""How large the gradients of single micro-batches are."""

from collections.abc import Iterator

import torch
from typing_extensions import override

from gradwatch.capture.view import StepView
from gradwatch.interfaces import Monitor
from gradwatch.numerics.reading import Reading


class MicrobatchGradientNorm(Monitor):
    """Root mean square norm of the gradients that a step is averaged from [L/P].

    `microbatch_gradient_norm` is `sqrt(mean_i ||g_i||²)` over all micro-batches of the step on all
    ranks, each before accumulation, before the exchange between ranks and before clipping, after
    unscaling. It is of the loss that `backward()` was called on: where the loop divides it by the
    number of micro-batches, so is `g_i`. `microbatches` is their number. Together with
    `gradient_norm` they tell how noisy the gradient is.

    It needs hooks on all parameters during sampled steps, so it is not among the default monitors.
    """

    metrics = ("microbatch_gradient_norm", "microbatches")
    needs = frozenset({"microbatches"})

    @override
    def read(self, view: StepView) -> Iterator[Reading]:
        if view.microbatch_mean_square is None or view.microbatches is None:
            reason = view.microbatches_unavailable or "no backward() was seen"
            view.note(f"microbatch_gradient_norm: {reason}")
            return
        yield Reading("microbatch_gradient_norm", view.microbatch_mean_square.sqrt(), unit="L/P")
        count = torch.as_tensor(view.microbatches, dtype=torch.float32)
        yield Reading("microbatches", count, unit="micro-batches")

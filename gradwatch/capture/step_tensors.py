"""What the taps hold at the end of a sampled step."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from gradwatch.capture.view import NamedValues


@dataclass(frozen=True, slots=True)
class StepTensors:
    """The tensors of one sampled step: of this rank, or of all ranks together.

    Attributes:
        used: norms of the gradients that the optimizers consumed [L/P].
        raw: the same before clipping, or None where that was not seen [L/P].
        updates: norms of the change of each parameter, or None [P].
        unmoved: for each of them, the number of entries with a gradient that did not change.
        pushed: for each of them, the number of entries with a gradient.
        parameters: norms after the step, or None [P].
        activations: root mean square over examples of the norm of each layer's output [A].
        log_gains: log gain of each chained layer.
        facts: `weight_facts` of each chained layer, in the first step that shows them.
        loss: training loss [L], or None.
        microbatch_squares: sum over micro-batches of the squared norm of their gradients [L²/P²].
        microbatches: their number, or None where they were not seen.
        weights: sum of their weights in the average that the gradient of the step is, or None
            where that is not known to be their average.
        weight_squares: sum of the squares of the weights, likewise.
        covariance: (4,) `covariance_estimate` of the micro-batches of one rank, or its mean over
            the ranks, or None [L²/P²].
        first_squares: squared norm of each parameter's mean gradient in an Adam's state, or None
            [L²/P²].
        seconds: sum over its entries of the second moments there, likewise [L²/P²].
        shrink: variance of the mean gradients over that of one gradient, likewise.
        samples: samples of the step, or None where they were not seen.
        loss_scale: of a GradScaler, or None.
        found_inf: above 0 if the scaler skipped the step, or None.
        probed: numbers that the probes of the step measured.
        clock: seconds since the watch was attached, then those spent in each probe, or None where
            no other rank needs them.
    """

    used: NamedValues
    raw: NamedValues | None = None
    updates: NamedValues | None = None
    unmoved: NamedValues | None = None
    pushed: NamedValues | None = None
    parameters: NamedValues | None = None
    activations: NamedValues | None = None
    log_gains: NamedValues | None = None
    facts: Mapping[str, Tensor] = field(default_factory=dict)
    loss: Tensor | None = None
    microbatch_squares: Tensor | None = None
    microbatches: int | Tensor | None = None
    weights: Tensor | None = None
    weight_squares: Tensor | None = None
    covariance: Tensor | None = None
    first_squares: NamedValues | None = None
    seconds: NamedValues | None = None
    shrink: Tensor | None = None
    samples: int | Tensor | None = None
    loss_scale: Tensor | None = None
    found_inf: Tensor | None = None
    probed: Mapping[str, Tensor] = field(default_factory=dict)
    clock: Tensor | None = None

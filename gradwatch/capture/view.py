"""What a monitor sees of one sampled step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gradwatch.numerics.norms import total_norm
from gradwatch.records import ModelInfo


@dataclass(frozen=True, slots=True)
class NamedValues:
    """Numbers on their device, one for each name.

    Attributes:
        names: n names of parameters or layers.
        values: (n,) tensor.
    """

    names: tuple[str, ...]
    values: Tensor

    @classmethod
    def stack(cls, values: Mapping[str, Tensor]) -> "NamedValues":
        """From single numbers, all moved to the device of the first one.

        Args:
            values: a 0-d tensor for each name.

        Returns:
            The stacked values.
        """
        if not values:
            return cls((), torch.zeros(0))
        device = next(iter(values.values())).device
        return cls(tuple(values), torch.stack([value.to(device) for value in values.values()]))

    @classmethod
    def join(cls, parts: Sequence["NamedValues"]) -> "NamedValues":
        """Several one after the other.

        Args:
            parts: at least one.

        Returns:
            All names and values.
        """
        if len(parts) == 1:
            return parts[0]
        names = tuple(name for part in parts for name in part.names)
        device = parts[0].values.device
        return cls(names, torch.cat([part.values.to(device) for part in parts]))

    def total(self) -> Tensor:
        """The norm of the whole, for values that are norms of its parts."""
        return total_norm(self.values)


@dataclass(frozen=True, slots=True)
class IndependentGradients:
    """The parts that a step's gradient was averaged from, each of other samples.

    With `c_i` the contribution of part i to the whole gradient `S = sum_i c_i`, before clipping,
    and `p_i` its weight in the average, `sum_i p_i = 1`.

    Attributes:
        total_square: `||S||²` [L²/P²].
        part_squares: `sum_i ||c_i||²` [L²/P²].
        share_squares: `sum_i p_i²`, 1/A for A equal parts.
        source: what the parts are, such as "4 micro-batches".
    """

    total_square: Tensor
    part_squares: Tensor
    share_squares: float | Tensor
    source: str


@dataclass(frozen=True, slots=True)
class MicrobatchCovariance:
    """Covariance of the gradient of one example, from the micro-batches of a step.

    Attributes:
        values: (4,) trace, largest eigenvalue [L²/P²] and the variances of their errors [L⁴/P⁴],
            as `gradwatch.numerics.gram.covariance_estimate` gives them; of one rank, or the mean
            over the ranks.
        gradients: from how many gradients, on this rank.
        examples: of each of them, on average.
        source: what they are, such as "8 micro-batches".
    """

    values: Tensor
    gradients: int
    examples: float
    source: str


@dataclass(frozen=True, slots=True)
class AdamMoments:
    """What an Adam remembers of the gradients before this step, bias-corrected.

    Attributes:
        first_square: sum over all entries of `m_hat²` [L²/P²].
        second: sum over all entries of `v_hat` [L²/P²].
        shrink: variance of `m_hat` over that of one gradient, for gradients of the same law,
            `(1-b1)(1+b1^t)/((1+b1)(1-b1^t))` after t steps.
    """

    first_square: Tensor
    second: Tensor
    shrink: float | Tensor


@dataclass(slots=True)
class StepView:
    """One sampled step: settings as Python numbers, measurements as tensors on the device.

    Everything is of the gradients after unscaling, summed over micro-batches, and of all ranks
    that train together. A test can build a view from fixed tensors.

    Attributes:
        step: the optimizer step, from 0.
        model: facts about the model.
        gradient_norms: of what the optimizer consumed, for each parameter with a gradient [L/P].
        raw_gradient_norms: the same before clipping, or None where that was not seen [L/P].
        clipping_hidden: why clipping could not be seen, where that is known, or None.
        clip_coefficient: norm of the whole gradient after over before clipping, 1 for no
            clipping, or None if that was not seen.
        parameter_norms: after the step [P]; needs `parameters`.
        update_norms: of the change of each parameter [P]; needs `updates`.
        unmoved_fractions: share of each parameter's entries that had a gradient and did not
            change; needs `updates`.
        activation_norms: for each layer in the order of execution [A]; needs `activations`.
        activation_log_gains: for each layer of a recognised chain, the batch mean of
            log(||phi(W h)||²/m / (||h||²/n)); needs `activations`.
        activations_unavailable: why there are none, or None.
        loss: training loss [L], or None if it was not seen.
        lr: learning rate of the first parameter group [P²/L]; a tensor if the optimizer holds
            it as one.
        batch_size: samples in this optimizer step on all ranks, or None if not seen; a tensor
            where several ranks added theirs up.
        microbatch_mean_square: mean over the step's micro-batches on all ranks of the squared norm
            of the gradient of each [L²/P²]; needs `microbatches`.
        microbatches: their number on all ranks, or None.
        microbatches_unavailable: why the two are None, or None.
        independent_gradients: the parts of the step's gradient, if there are at least two and
            the gradient before clipping is known; needs `independent_gradients`.
        independent_gradients_unavailable: why they are None, or None.
        microbatch_covariance: if a step has at least four micro-batches on this rank and their
            samples are known; needs `microbatch_covariance`.
        adam_moments: of an Adam's state; needs `adam_moments`.
        probed: the numbers that the probes of this step measured, by name.
        loss_can_be_probed: probes can evaluate the loss again, in this step or, when the budget
            allows it, in a later one.
        without_gradient: trainable parameters that no gradient reached in this step.
        notes: what could not be measured, and why.
    """

    step: int
    model: ModelInfo
    gradient_norms: NamedValues
    raw_gradient_norms: NamedValues | None = None
    clipping_hidden: str | None = None
    clip_coefficient: Tensor | None = None
    parameter_norms: NamedValues | None = None
    update_norms: NamedValues | None = None
    unmoved_fractions: NamedValues | None = None
    activation_norms: NamedValues | None = None
    activation_log_gains: NamedValues | None = None
    activations_unavailable: str | None = None
    loss: Tensor | None = None
    lr: float | Tensor | None = None
    batch_size: int | Tensor | None = None
    microbatch_mean_square: Tensor | None = None
    microbatches: int | Tensor | None = None
    microbatches_unavailable: str | None = None
    independent_gradients: IndependentGradients | None = None
    independent_gradients_unavailable: str | None = None
    microbatch_covariance: MicrobatchCovariance | None = None
    adam_moments: AdamMoments | None = None
    probed: Mapping[str, Tensor] = field(default_factory=dict)
    loss_can_be_probed: bool = False
    without_gradient: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)

    def note(self, reason: str) -> None:
        """Says what could not be measured, and why; shown once in the report.

        Args:
            reason: one sentence.
        """
        self.notes.append(reason)


def some_examples(values: Tensor, elements: int) -> Tensor:
    """The first examples of a batch, as many as hold about `elements` entries.

    Args:
        values: (B, ...) tensor.
        elements: the wanted number of entries.

    Returns:
        A view of the first examples, at least one; all of them if they are few.
    """
    if values.dim() == 0 or values.numel() <= elements:
        return values
    return values[: max(1, elements * values.shape[0] // values.numel())]

"""Why a loss that trains cannot be probed: what torch says, and what to do about it."""

from collections.abc import Mapping
from typing import Final

import torch

from gradwatch.numerics.second_derivative import NoSecondDerivativeError

_TYPES: Final = (
    "the same dtype",  # products of matrices, attention
    "Input type (",  # convolutions: "... and bias type (float) should be the same"
    "expected scalar type",
    "does not match weight dtype",  # recurrent layers
)
_TWO_TYPES: Final = (
    "an operation was given numbers of two types; second derivatives are taken without autocast, "
    "and so is every probe of a training in float16: the model must not rely on it, nor a "
    "probe_batch differ in type from the batches of the training"
)
_OLD_STATE: Final = (
    "a recurrent layer begins with the state that the last batch left, which fits no part of a "
    "batch and no batch of another size"
)

LIMITS: Final[Mapping[str, str]] = {
    "use_reentrant=True": "the loss of a reentrant activation checkpoint cannot be differentiated "
    "by torch.autograd.grad; pass use_reentrant=False to it",
    "Expected more than 1 value per channel": "a part of the batch is a single example, which "
    "batch normalisation cannot take",
    **dict.fromkeys(("Expected hidden", "doesn't match hidden"), _OLD_STATE),
    **dict.fromkeys(_TYPES, _TWO_TYPES),
}
"""What may hold for a batch and not for the next one, by torch's message."""

_OUT_OF_MEMORY: Final = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "cannot allocate memory",
    "ALLOC_FAILED",
)
_NO_SECOND_DERIVATIVE: Final = (
    "marked with @once_differentiable",
    "does not currently support double backward",
    "does not support double backward",
    "double backward is not implemented",
    "arguments don't support automatic differentiation",  # a backward that fills buffers of its own
)
_LONGEST: Final = 200


def limit_of(error: Exception) -> str | None:
    """Why a probe led to nothing in this step, if it is known.

    Args:
        error: that the probe raised.

    Returns:
        A sentence without its full stop, or None.
    """
    return next((LIMITS[text] for text in LIMITS if text in str(error)), None)


def hopeless(error: Exception, monitor: str) -> str | None:
    """Why it is of no use to try a probe again, if it is known.

    Args:
        error: that the probe raised.
        monitor: the name of its class.

    Returns:
        What happened, what it means and what can be done, or None.
    """
    message = str(error)
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or _any_in(_OUT_OF_MEMORY, message):
        return (
            f"it ran out of memory ({_first_line(error)}) and is not tried again; everything else "
            f"goes on. Give a smaller probe_batch, if {monitor} uses it, or leave {monitor} out of "
            "monitors=[...]"
        )
    if isinstance(error, NoSecondDerivativeError) or _is_missing_derivative(message):
        return (
            f"{monitor} needs second derivatives, and an operation of the model has none "
            f"({_first_line(error)}); it is not tried again, everything else goes on. Choose an "
            "implementation that has them, for attention the plain one "
            "(attn_implementation='eager'); Sharpness(finite_differences=True) needs none, for "
            f"smooth networks; or leave {monitor} out of monitors=[...]"
        )
    return None


def _any_in(texts: tuple[str, ...], message: str) -> bool:
    return any(text.lower() in message.lower() for text in texts)


def _is_missing_derivative(message: str) -> bool:
    # "derivative for aten::_scaled_dot_product_flash_attention_backward is not implemented"
    missing = "derivative for" in message and "is not implemented" in message
    return missing or _any_in(_NO_SECOND_DERIVATIVE, message)


def _first_line(error: Exception) -> str:
    """The type where the message does not say it all: out of memory has a long one."""
    first = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    return first if len(first) <= _LONGEST else f"{first[:_LONGEST].rstrip()} ..."

"""What each micro-batch weighs in the gradient of its step.

Where the Trainer divides the loss of each micro-batch by the number of tokens in all of them
together, `num_items_in_batch`, the gradient of a step is not the mean of those of its
micro-batches: each counts by its own number of tokens with a label.
"""

from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from gradwatch import Watch
from gradwatch.capture.hooks import HookHandles, OwnHook, inside_backward, is_traced
from gradwatch.capture.model.names import forward_root, unwrap_model

IGNORED: Final = -100
"""The label of a token that does not count."""


class TokenWeights:
    """Tells a watch how many of the step's tokens were in each micro-batch, on sampled steps.

    Args:
        model: as the training calls it, or inside its wrappers.
        watch: is told.
    """

    def __init__(self, model: nn.Module, watch: Watch) -> None:
        self._watch = watch
        self._shifts = shifts_labels(unwrap_model(model))
        self._handles = HookHandles()
        root = forward_root(model)
        if root is not None:
            self._handles.add(root.register_forward_hook(OwnHook(self._note), with_kwargs=True))

    def remove(self) -> None:
        """Takes the hook off."""
        self._handles.remove()

    def _note(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        trains = module.training and torch.is_grad_enabled()
        if not (trains and self._watch.sampling) or inside_backward() or is_traced():
            return
        items = kwargs.get("num_items_in_batch")
        if items is not None:
            self._watch.weigh_microbatch(self._weight(kwargs, items))

    def _weight(self, kwargs: dict[str, Any], items: Any) -> Tensor | None:
        """The share of the tokens: of this process's or of all, as the loss is divided by."""
        shifted, labels = kwargs.get("shift_labels"), kwargs.get("labels")
        counted = labels if shifted is None else shifted
        if not isinstance(counted, Tensor):  # the loss is computed outside of the model
            return None
        if shifted is None and self._shifts:
            counted = counted[..., 1:]
        number = counted.ne(IGNORED).sum()
        # For several devices of one process the number is repeated.
        return number / (
            items.reshape(-1)[0].to(number.device) if isinstance(items, Tensor) else items
        )


def shifts_labels(model: nn.Module) -> bool:
    """Whether the first label of each row is never predicted, as in causal language models.

    Args:
        model: without wrappers.

    Returns:
        True if its loss is that of a causal language model without an encoder.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    loss = LOSS_MAPPING.get(str(getattr(model, "loss_type", None)))
    if loss is None:  # transformers takes the causal one for names that it does not know
        return bool(getattr(model, "can_generate", lambda: False)())
    return loss is ForCausalLMLoss

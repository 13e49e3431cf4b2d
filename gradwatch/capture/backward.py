"""The loss, seen where `loss.backward()` begins."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class BackwardObserver:
    """Sees the scalar of every `backward()` of the process while it is attached.

    `Tensor.backward` looks up `torch.autograd.backward` each time, so replacing that attribute
    is enough; a name bound earlier escapes. Under loss scaling or accumulation this is the
    scaled or divided loss, which is why it is only done when asked for.

    Args:
        note: called with the scalar, detached.
    """

    def __init__(self, note: Callable[[Tensor], None]) -> None:
        original = torch.autograd.backward

        def observed(tensors: Any, *rest: Any, **more: Any) -> None:
            if isinstance(tensors, Tensor) and tensors.numel() == 1:
                note(tensors.detach())
            original(tensors, *rest, **more)

        self._original = original
        self._observed = observed
        torch.autograd.backward = observed

    def remove(self) -> None:
        """Puts torch's function back, unless somebody else has replaced it meanwhile."""
        if torch.autograd.backward is self._observed:
            torch.autograd.backward = self._original

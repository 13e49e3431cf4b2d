"""The loss, seen where `loss.backward()` begins."""

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from gradwatch.capture.patch import Patch


class BackwardObserver:
    """Sees the scalar of every `backward()` of the process while it is attached.

    `Tensor.backward` looks up `torch.autograd.backward` each time, so replacing that attribute
    is enough; a name bound earlier escapes. Under loss scaling or accumulation this is the
    scaled or divided loss, which is why it is only done when asked for.

    Args:
        note: called with the scalar, as it is.
    """

    def __init__(self, note: Callable[[Tensor], None]) -> None:
        self._note = note
        _PATCH.add(note)

    def remove(self) -> None:
        """Stops observing; torch's function is back when nobody observes any more."""
        _PATCH.remove(self._note)


def _observed(original: Callable[..., None], tell: Callable[[Tensor], None]) -> Any:
    def observed(tensors: Any, *rest: Any, **more: Any) -> None:
        if isinstance(tensors, Tensor) and tensors.numel() == 1:
            tell(tensors)
        original(tensors, *rest, **more)

    return observed


_PATCH: Final = Patch(torch.autograd, "backward", _observed)

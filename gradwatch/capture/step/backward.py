"""The loss, seen where `loss.backward()` begins."""

from collections.abc import Callable
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from gradwatch.capture.patch import Patch


class BackwardObserver:
    """Sees the scalar of every `backward()` of the process while it is attached.

    `Tensor.backward` looks up `torch.autograd.backward` each time, so replacing that attribute
    is enough; a name bound earlier escapes. What torch's own `GradScaler` has multiplied is told
    as it was before. A loss that is divided for accumulation or scaled by anything else is told
    as it is, which is why this is only done when asked for.

    Args:
        note: called with the scalar.
    """

    def __init__(self, note: Callable[[Tensor], None]) -> None:
        self._note = note
        self._unscaled: WeakIdKeyDictionary = WeakIdKeyDictionary()
        _BACKWARD.add(self._see)
        _SCALE.add(self._remember)

    def remove(self) -> None:
        """Stops observing; torch's functions are back when nobody observes any more."""
        _BACKWARD.remove(self._see)
        _SCALE.remove(self._remember)

    def _see(self, loss: Tensor) -> None:
        self._note(self._unscaled.get(loss, loss))

    def _remember(self, loss: Tensor, scaled: Tensor, factor: Tensor | None) -> None:
        if scaled is not loss:
            self._unscaled[scaled] = loss


class ScaleObserver:
    """Sees the factor by which torch's own `GradScaler` multiplies a loss, while it is attached.

    Args:
        note: called with the factor, on its device.
    """

    def __init__(self, note: Callable[[Tensor], None]) -> None:
        self._note = note
        _SCALE.add(self._see)

    def remove(self) -> None:
        """Stops observing; torch's function is back when nobody observes any more."""
        _SCALE.remove(self._see)

    def _see(self, loss: Tensor, scaled: Tensor, factor: Tensor | None) -> None:
        if factor is not None and scaled is not loss:
            self._note(factor)


def _observed(original: Callable[..., None], tell: Callable[[Tensor], None]) -> Any:
    tell = torch.compiler.disable(tell)  # in a compiled function it would be compiled as well

    @partial(torch.compiler.disable, recursive=False)
    def observed(tensors: Any, *rest: Any, **more: Any) -> None:
        if isinstance(tensors, Tensor) and tensors.numel() == 1:
            tell(tensors)
        original(tensors, *rest, **more)

    return observed


def _scaled(original: Callable[..., Any], tell: Callable[..., None]) -> Any:
    def scale(scaler: Any, outputs: Any) -> Any:
        results = original(scaler, outputs)
        for loss, scaled in _pairs(outputs, results):
            tell(loss, scaled, getattr(scaler, "_scale", None))
        return results

    return scale


def _pairs(outputs: Any, results: Any) -> list[tuple[Tensor, Tensor]]:
    """Each scalar and what it became; an iterator can be read by the user only."""
    if isinstance(outputs, Tensor) and isinstance(results, Tensor):
        return [(outputs, results)] if outputs.numel() == 1 else []
    if isinstance(outputs, (list, tuple)) and isinstance(results, (list, tuple)):
        parts = zip(outputs, results, strict=False)
        return [pair for output, result in parts for pair in _pairs(output, result)]
    return []


_BACKWARD: Final = Patch(torch.autograd, "backward", _observed)
_SCALE: Final = Patch(torch.amp.GradScaler, "scale", _scaled)

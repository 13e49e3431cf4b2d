"""Gradient clipping, seen from both sides."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad

from gradwatch.capture.patch import Patch
from gradwatch.capture.view import NamedValues
from gradwatch.errors import AttachError

_PATCHED: Final = "_clip_grads_with_norm_"


class ClippingRecord:
    """What clipping by norm did to which parameters since the last optimizer step.

    Args:
        visible: the watch would see it if gradients were clipped.

    Attributes:
        visible: the watch would see it if gradients were clipped.
    """

    def __init__(self, visible: bool = False) -> None:
        self.visible = visible
        self._clipped: list[tuple[frozenset[int], Tensor]] = []

    def record(
        self, parameters: Sequence[Tensor], total_norm: Tensor, max_norm: float | Tensor
    ) -> None:
        """Takes in one clipping.

        Args:
            parameters: whose gradients were multiplied.
            total_norm: of their gradients before, in any norm [L/P].
            max_norm: the largest norm let through [L/P].
        """
        # torch's own formula for the factor
        coefficient = torch.clamp(max_norm / (total_norm.detach() + 1e-6), max=1.0)
        self._clipped.append((frozenset(map(id, parameters)), coefficient))

    def undo(self, used: NamedValues, parameters: Sequence[Tensor]) -> NamedValues | None:
        """The gradient norms before clipping, from those after it.

        Args:
            used: norms of the gradients that the optimizer consumed [L/P].
            parameters: whose norms they are.

        Returns:
            The norms before, or None if clipping is not visible. Clipping by norm multiplies
            each gradient by one factor, so the quotient is exact.
        """
        if not self.visible:
            return None
        values = used.values
        for identities, factor in self._clipped:
            touched = [id(parameter) in identities for parameter in parameters]
            whole = values / factor.to(values)
            mask = torch.tensor(touched).to(values.device)
            values = whole if all(touched) else torch.where(mask, whole, values)
        return NamedValues(used.names, values)

    def reset(self) -> None:
        """Forgets, at the end of a step."""
        self._clipped = []


class ClippingObserver:
    """Sees every `clip_grad_norm_` on the watched parameters while it is attached.

    The function hands the norm to a private function of its module; that one is wrapped,
    which also works for users who imported `clip_grad_norm_` by name, and restored on `remove`.

    Args:
        note: called with parameters, their norm and the largest norm, before they are clipped.

    Raises:
        AttachError: if this version of torch has no such function.
    """

    def __init__(self, note: Callable[[Sequence[Tensor], Tensor, float], None]) -> None:
        if not hasattr(clip_grad, _PATCHED):
            raise AttachError(
                f"track_clipping=True does not work with torch {torch.__version__}, which has "
                f"no {_PATCHED}; clip with watch.clip_grad_norm_(max_norm) instead"
            )
        self._note = note
        _PATCH.add(note)

    def remove(self) -> None:
        """Stops observing; torch's function is back when nobody observes any more."""
        _PATCH.remove(self._note)


def _observed(
    original: Callable[..., Any], tell: Callable[[Sequence[Tensor], Tensor, float], None]
) -> Any:
    def observed(
        parameters: Tensor | Iterable[Tensor],
        max_norm: float,
        total_norm: Tensor,
        *rest: Any,
        **more: Any,
    ) -> Any:
        tensors = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        tell(tensors, total_norm, max_norm)
        return original(tensors, max_norm, total_norm, *rest, **more)

    return observed


_PATCH: Final = Patch(clip_grad, _PATCHED, _observed)


def clip_gradients(parameters: Sequence[Tensor], max_norm: float, **options: Any) -> Tensor:
    """The clipping of torch.

    Args:
        parameters: whose gradients to clip.
        max_norm: the largest norm to let through [L/P].
        **options: as for `torch.nn.utils.clip_grad_norm_`.

    Returns:
        The norm before clipping [L/P].
    """
    return nn.utils.clip_grad_norm_(parameters, max_norm, **options)

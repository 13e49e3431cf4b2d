"""Gradient clipping, seen from both sides."""

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad

from gradwatch.capture.patch import Patch
from gradwatch.capture.view import NamedValues
from gradwatch.errors import AttachError

_BY_NORM: Final = "_clip_grads_with_norm_"
_BY_VALUE: Final = "_group_tensors_by_device_and_dtype"


COMPILED: Final = "a compiled function clips, where the watch does not see"
BETWEEN: Final = "gradients were clipped before the last backward() of the step"


class ClippingRecord:
    """What clipping by norm did to which parameters since the last optimizer step.

    Args:
        visible: the watch would see it if gradients were clipped.

    Attributes:
        visible: the watch would see it if gradients were clipped.
        hidden: why clipping cannot be undone in this step, or for good, or None.
    """

    def __init__(self, visible: bool = False) -> None:
        self.visible = visible
        self.hidden: str | None = None
        self._touched: set[int] = set()
        self._clipped: list[tuple[frozenset[int], Tensor]] = []

    @property
    def happened(self) -> bool:
        """Whether gradients of the watched parameters have been clipped since the last step."""
        return bool(self._touched)

    def touch(self, parameters: Iterable[Tensor]) -> None:
        """Takes in whose gradients are clipped, in whatever way.

        Args:
            parameters: of the watched ones.
        """
        self._touched.update(map(id, parameters))

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
        if not self.visible or self.hidden is not None:
            return None
        values = used.values
        for identities, factor in self._clipped:
            touched = [id(parameter) in identities for parameter in parameters]
            whole = values / factor.to(values)
            mask = torch.tensor(touched).to(values.device)
            values = whole if all(touched) else torch.where(mask, whole, values)
        return NamedValues(used.names, values)

    def more_follows(self, parameters: Iterable[Tensor]) -> None:
        """Another backward of the same step will add to gradients.

        Args:
            parameters: that have not been stepped on yet.
        """
        if not self._touched.isdisjoint(map(id, parameters)):
            self.hidden = self.hidden or BETWEEN

    def reset(self) -> None:
        """Forgets, at the end of a step."""
        if self.hidden == BETWEEN:
            self.hidden = None
        self._touched = set()
        self._clipped = []


class ClippingObserver:
    """Sees every `clip_grad_norm_` and `clip_grad_value_` of torch while it is attached.

    Both look up a private function of their module before they change a gradient; those are
    wrapped, which also works for users who imported the public ones by name, and restored on
    `remove`.

    Args:
        on_norm: called with parameters, their norm and the largest norm, before they are clipped.
        on_value: called with the gradients whose entries are about to be clipped.
        on_compiled: called when a function that clips is compiled; what it does is not seen.

    Raises:
        AttachError: if this version of torch has no such functions.
    """

    def __init__(
        self,
        on_norm: Callable[[Sequence[Tensor], Tensor, float], None],
        on_value: Callable[[Sequence[Tensor]], None],
        on_compiled: Callable[[], None],
    ) -> None:
        missing = [name for name in (_BY_NORM, _BY_VALUE) if not hasattr(clip_grad, name)]
        if missing:
            raise AttachError(
                f"track_clipping=True does not work with torch {torch.__version__}, which has "
                f"no {missing[0]}; clip with watch.clip_grad_norm_(max_norm) instead"
            )
        self._on_norm, self._on_value, self._on_compiled = on_norm, on_value, on_compiled
        _on_compiled.append(on_compiled)
        _NORM_PATCH.add(on_norm)
        _VALUE_PATCH.add(on_value)

    def remove(self) -> None:
        """Stops observing; torch's functions are back when nobody observes any more."""
        _NORM_PATCH.remove(self._on_norm)
        _VALUE_PATCH.remove(self._on_value)
        if self._on_compiled in _on_compiled:
            _on_compiled.remove(self._on_compiled)


_on_compiled: list[Callable[[], None]] = []


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _note_compiled_clipping() -> bool:
    """Runs when a function is compiled, not when the compiled function runs."""
    for listener in tuple(_on_compiled):
        listener()
    return True


def _seen_by_norm(
    original: Callable[..., Any], tell: Callable[[Sequence[Tensor], Tensor, float], None]
) -> Any:
    def observed(
        parameters: Tensor | Iterable[Tensor],
        max_norm: float,
        total_norm: Tensor,
        *rest: Any,
        **more: Any,
    ) -> Any:
        if torch.compiler.is_compiling():  # what a compiled function does must stay what it was
            _note_compiled_clipping()
            return original(parameters, max_norm, total_norm, *rest, **more)
        tensors = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        tell(tensors, total_norm, max_norm)
        return original(tensors, max_norm, total_norm, *rest, **more)

    return observed


def _seen_by_value(original: Callable[..., Any], tell: Callable[[Sequence[Tensor]], None]) -> Any:
    def observed(tensors: list[list[Tensor]], *rest: Any, **more: Any) -> Any:
        if torch.compiler.is_compiling():
            _note_compiled_clipping()
            return original(tensors, *rest, **more)
        # Clipping by norm groups its gradients with the same function.
        if sys._getframe(1).f_code.co_name == clip_grad.clip_grad_value_.__name__:
            tell(tensors[0])
        return original(tensors, *rest, **more)

    return observed


_NORM_PATCH: Final = Patch(clip_grad, _BY_NORM, _seen_by_norm)
_VALUE_PATCH: Final = Patch(clip_grad, _BY_VALUE, _seen_by_value)


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

"""When the gradients of a sampled step are clipped, and what they were before."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gradwatch.capture.clipping import ClippingObserver, ClippingRecord, clip_gradients
from gradwatch.capture.gradient import GradientCapture
from gradwatch.capture.part import CAPTURE
from gradwatch.isolation import Isolation


class ClippingTap:
    """Sees the clipping of the watched parameters.

    Clipping by norm multiplies whole gradients, so that one number undoes it. Where that number
    is not at hand, or entries are clipped one by one, the gradients are measured before.

    Args:
        record: what to write it into.
        gradients: measures gradients.
        parameters: gives the optimized parameters by name.
        isolation: what to do when something fails.
        is_sampling: says whether the step under way is sampled.
        sharded: to read the norm of a gradient would be an exchange between ranks, which others
            may not join.
        observe: see torch's own functions, too.
    """

    def __init__(
        self,
        record: ClippingRecord,
        gradients: GradientCapture,
        parameters: Callable[[], Mapping[str, Tensor]],
        isolation: Isolation,
        *,
        is_sampling: Callable[[], bool],
        sharded: bool,
        observe: bool,
    ) -> None:
        self._record = record
        self._gradients = gradients
        self._parameters = parameters
        self._isolation = isolation
        self._is_sampling = is_sampling
        self._sharded = sharded
        self._observer = ClippingObserver(self._by_norm, self._by_value) if observe else None

    def clip(self, max_norm: float, **options: Any) -> Tensor:
        """Does torch's clipping on all optimized parameters and records it.

        Args:
            max_norm: the largest norm to let through [L/P].
            **options: as for `torch.nn.utils.clip_grad_norm_`.

        Returns:
            The norm before clipping [L/P].
        """
        parameters = list(self._parameters().values())
        if self._observer is not None:
            return clip_gradients(parameters, max_norm, **options)
        if self._sharded:
            self._measure_before()
        total = clip_gradients(parameters, max_norm, **options)
        if not self._sharded:
            self._by_norm(parameters, total, max_norm)
        return total

    def measure(self) -> None:
        """Measures the gradients as they are now, before the user clips them."""
        self._isolation.run(CAPTURE, self._measure)

    def remove(self) -> None:
        """Puts torch's functions back."""
        if self._observer is not None:
            self._observer.remove()

    def _by_norm(self, parameters: Sequence[Tensor], total: Tensor, max_norm: float) -> None:
        """The gradients are about to be multiplied, or have just been."""
        if self._sharded:
            self._measure_before()
            return
        self._record.visible = True
        if self._is_sampling():
            self._isolation.run(CAPTURE, self._write, parameters, total, max_norm)

    def _by_value(self, gradients: Sequence[Tensor]) -> None:
        """The entries of gradients, perhaps of another model, are about to be clipped."""
        if self._is_sampling():
            clamped = set(map(id, gradients))
            if any(id(parameter.grad) in clamped for parameter in self._parameters().values()):
                self._measure_before()

    def _measure_before(self) -> None:
        self._record.visible = True
        if self._is_sampling() and not self._gradients.observed:
            self.measure()
        self._record.happened = True

    @torch.no_grad()
    def _measure(self) -> None:
        self._gradients.observe(self._parameters())

    @torch.no_grad()
    def _write(self, parameters: Sequence[Tensor], total: Tensor, max_norm: float) -> None:
        clipped = set(map(id, parameters))
        if any(id(parameter) in clipped for parameter in self._parameters().values()):
            self._record.happened = True
            self._record.record(parameters, total, max_norm)

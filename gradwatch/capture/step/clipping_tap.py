"""When the gradients of a sampled step are clipped, and what they were before."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gradwatch.capture.part import CAPTURE
from gradwatch.capture.step.clipping import (
    COMPILED,
    ClippingObserver,
    ClippingRecord,
    clip_gradients,
)
from gradwatch.capture.step.gradient import GradientCapture
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
        self._observer = (
            ClippingObserver(self._by_norm, self._by_value, self._compiled) if observe else None
        )

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
            self._in_sight(self._measure_before, parameters)
        total = clip_gradients(parameters, max_norm, **options)
        if not self._sharded:
            self._in_sight(self._write, parameters, total, max_norm)
        return total

    def measure(self) -> None:
        """Measures the gradients as they are now, before the user clips them."""
        self._isolation.run(CAPTURE, lambda: self._measure(self._parameters(), again=True))

    def remove(self) -> None:
        """Puts torch's functions back."""
        if self._observer is not None:
            self._observer.remove()

    def _by_norm(self, parameters: Sequence[Tensor], total: Tensor, max_norm: float) -> None:
        """The gradients are about to be multiplied."""
        if self._sharded:
            self._in_sight(self._measure_before, parameters)
        else:
            self._in_sight(self._write, parameters, total, max_norm)

    def _by_value(self, gradients: Sequence[Tensor]) -> None:
        """The entries of gradients are about to be clipped."""
        self._in_sight(self._measure_clamped, gradients)

    def _compiled(self) -> None:
        self._record.hidden = COMPILED

    def _in_sight(self, take: Callable[..., None], *arguments: Any) -> None:
        """Clipping is seen from now on; what it does is taken down in sampled steps."""
        self._record.visible = True
        if self._is_sampling():
            self._isolation.run(CAPTURE, take, *arguments)

    def _mine(self, parameters: Sequence[Tensor]) -> dict[str, Tensor]:
        """Those of them that are watched; others may be of another model."""
        given = set(map(id, parameters))
        return {name: item for name, item in self._parameters().items() if id(item) in given}

    def _measure_clamped(self, gradients: Sequence[Tensor]) -> None:
        clamped = set(map(id, gradients))
        parameters = self._parameters().values()
        self._measure_before([item for item in parameters if id(item.grad) in clamped])

    def _measure_before(self, parameters: Sequence[Tensor]) -> None:
        """Gradients are about to be changed in a way that cannot be undone."""
        mine = self._mine(parameters)
        if mine:
            self._measure(mine, again=False)
            self._record.touch(mine.values())

    @torch.no_grad()
    def _measure(self, parameters: Mapping[str, Tensor], *, again: bool) -> None:
        self._gradients.observe(parameters, again=again)

    @torch.no_grad()
    def _write(self, parameters: Sequence[Tensor], total: Tensor, max_norm: float) -> None:
        mine = self._mine(parameters)
        if mine:
            self._record.touch(mine.values())
            self._record.record(parameters, total, max_norm)

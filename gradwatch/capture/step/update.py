"""What the step changed, for one optimizer."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gradwatch.capture.view import NamedValues
from gradwatch.numerics.sampling import CoordinateSample
from gradwatch.numerics.sharding import local_part


@dataclass(frozen=True, slots=True)
class Change:
    """What a step did to the parameters that had a gradient.

    Attributes:
        norms: of the update of each [P].
        unmoved: number of entries with a gradient that did not change.
        pushed: number of entries with a gradient.
    """

    norms: NamedValues
    unmoved: NamedValues
    pushed: NamedValues


class UpdateCapture:
    """Samples the parameters of one optimizer before and after its step, their local parts."""

    def __init__(self) -> None:
        self._parameters: dict[str, Tensor] = {}
        self._sample: CoordinateSample | None = None
        self._before: Tensor | None = None
        self._gradient: Tensor | None = None

    def before(self, parameters: Mapping[str, Tensor]) -> None:
        """Copies the sampled coordinates of the parameters and of their gradients.

        Args:
            parameters: name and parameter of those that have a gradient.
        """
        if not _same(self._parameters, parameters) or self._sample is None:
            self._parameters = dict(parameters)
            self._sample = CoordinateSample(self._values())
        gradients = [_dense(parameter.grad) for parameter in parameters.values()]
        self._before = self._sample.gather(self._values())
        self._gradient = self._sample.gather(gradients)

    def after(self) -> Change | None:
        """Compares with the parameters as they are now.

        Returns:
            What changed, or None if `before` was not called.
        """
        if self._sample is None or self._before is None or self._gradient is None:
            return None
        before, gradient, names = self._before, self._gradient, tuple(self._parameters)
        self._before = self._gradient = None
        now = self._sample.gather(self._values())
        unmoved, pushed = self._sample.unmoved_counts(before, now, gradient)
        return Change(
            NamedValues(names, self._sample.change_norms(before, now)),
            NamedValues(names, unmoved),
            NamedValues(names, pushed),
        )

    def _values(self) -> list[Tensor]:
        return [local_part(parameter) for parameter in self._parameters.values()]


def _dense(gradient: Tensor | None) -> Tensor | None:
    part = None if gradient is None else local_part(gradient)
    return None if part is None or part.layout != torch.strided else part


def _same(old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> bool:
    return old.keys() == new.keys() and all(old[name] is new[name] for name in new)

"""What the step changed, for one optimizer."""

from collections.abc import Mapping

import torch
from torch import Tensor

from gradwatch.capture.view import NamedValues
from gradwatch.numerics.sampling import CoordinateSample


class UpdateCapture:
    """Samples the parameters of one optimizer before and after its step."""

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
            self._sample = CoordinateSample(list(parameters.values()))
        gradients = [parameter.grad for parameter in parameters.values()]
        self._before = self._sample.gather(list(parameters.values()))
        self._gradient = self._sample.gather(
            [None if item is None or item.layout != torch.strided else item for item in gradients]
        )

    def after(self) -> tuple[NamedValues, NamedValues] | None:
        """Compares with the parameters as they are now.

        Returns:
            Norm of the update [P] and fraction left unmoved for each parameter, or None if
            `before` was not called.
        """
        if self._sample is None or self._before is None or self._gradient is None:
            return None
        before, gradient, names = self._before, self._gradient, tuple(self._parameters)
        self._before = self._gradient = None
        now = self._sample.gather(list(self._parameters.values()))
        return (
            NamedValues(names, self._sample.change_norms(before, now)),
            NamedValues(names, self._sample.unmoved_fractions(before, now, gradient)),
        )


def _same(old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> bool:
    return old.keys() == new.keys() and all(old[name] is new[name] for name in new)

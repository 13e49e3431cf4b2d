"""Where values stop being finite, and where it began."""

from collections.abc import Iterator

import torch
from typing_extensions import override

from gradwatch.capture.view import NamedValues, StepView
from gradwatch.interfaces import Monitor
from gradwatch.numerics.reading import Reading


class NonFinite(Monitor):
    """Counts tensors with infinite or undefined entries, and names them.

    `nonfinite_activation`, `nonfinite_gradient` and `nonfinite_parameter` count the layers or
    parameters concerned; each of them is also listed by name, layers in the order of execution,
    so that the first one is where it began.
    """

    metrics = ("nonfinite_activation", "nonfinite_gradient", "nonfinite_parameter")
    needs = frozenset({"activations", "parameters"})

    @override
    def read(self, view: StepView) -> Iterator[Reading]:
        families = {
            "nonfinite_activation": view.activation_norms,
            "nonfinite_gradient": view.gradient_norms,
            "nonfinite_parameter": view.parameter_norms,
        }
        for metric, norms in families.items():
            if norms is not None and norms.names:
                yield from _count(metric, norms)


def _count(metric: str, norms: NamedValues) -> Iterator[Reading]:
    wrong = torch.logical_not(torch.isfinite(norms.values)).to(torch.float32)
    yield Reading(metric, wrong.sum(), unit="tensors")
    yield Reading(metric, wrong, norms.names, unit="tensors", only_nonzero=True)

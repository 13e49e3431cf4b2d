"""How large the parameters are."""

from collections.abc import Iterator

from typing_extensions import override

from gradwatch.capture.view import StepView
from gradwatch.interfaces import Monitor
from gradwatch.numerics.reading import Reading


class ParameterNorm(Monitor):
    """L2 norm of the parameters after the step, of the model and of each parameter [P]."""

    metrics = ("parameter_norm",)
    needs = frozenset({"parameters"})

    @override
    def read(self, view: StepView) -> Iterator[Reading]:
        norms = view.parameter_norms
        if norms is not None and norms.names:
            yield Reading("parameter_norm", norms.total(), unit="P")
            yield Reading("parameter_norm", norms.values, norms.names, unit="P")

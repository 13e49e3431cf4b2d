"""The sum of all curvatures of the training loss."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from gradwatch.capture.probe.view import ProbeView
from gradwatch.capture.view import StepView
from gradwatch.errors import ConfigError
from gradwatch.interfaces import Monitor
from gradwatch.numerics.reading import Reading
from gradwatch.numerics.trace import hutchinson_trace

FEWEST = 2
"""Samples, of which a standard error can be told."""


class HessianTrace(Monitor):
    """Trace of the Hessian of the training loss [L/P²], the sum of its eigenvalues.

    `hessian_trace = mean of z^T H z` over random signs z, unbiased, with the standard error of that
    mean: `sqrt(2 sum_{i != j} H_ij² / samples)`. On the fixed probe batch of the watch or else on
    the batch of the step, at the parameters before the step. Each probe draws other signs. Several
    ranks average theirs, which is the trace of the Hessian of their mean loss.

    Divided by the number of parameters it is the mean eigenvalue. Unlike the largest one it is
    dominated by the many small ones, and nothing bounds it.

    Memory: the graph of a gradient and two copies of the parameters, during a probe.

    Args:
        samples: products of the Hessian with a vector in a probe, each about two gradients.

    Raises:
        ConfigError: if `samples` is no whole number of at least 2.

    References:
        Hutchinson 1990; Yao et al. 2020, arXiv:1912.07145 (of networks).
    """

    metrics = ("hessian_trace",)
    probed = ("hessian_trace", "hessian_trace_error")
    probe_cost = 18.0

    def __init__(self, samples: int = 8) -> None:
        if isinstance(samples, bool) or not isinstance(samples, int) or samples < FEWEST:
            raise ConfigError(
                f"samples must be a whole number of at least {FEWEST}, got {samples!r}"
            )
        self.samples = samples
        self._probes = 0

    @override
    def probe(self, view: ProbeView) -> dict[str, Tensor]:
        with view.curvature(view.any) as curvature:
            point = curvature.point
            if any(item.element_size() < torch.float32.itemsize for item in point):
                view.note("hessian_trace: half precision is too coarse for second derivatives")
                return {}
            first = self._probes * self.samples
            self._probes += 1
            found = hutchinson_trace(curvature.product, point, self.samples, seed=first)
        return {"hessian_trace": found.value, "hessian_trace_error": found.standard_error}

    @override
    def read(self, view: StepView) -> Iterator[Reading]:
        if "hessian_trace" in view.probed:
            value, error = (view.probed[name] for name in self.probed)
            yield Reading("hessian_trace", value, unit="L/P²", standard_errors=error)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"probes": self._probes}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._probes = int(state["probes"])

"""How fast the gradient changes along a step."""

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from typing_extensions import override

from gradwatch.capture.probe.batch import ObjectiveError
from gradwatch.capture.probe.undisturbed import same_draws
from gradwatch.capture.probe.view import ProbeView
from gradwatch.capture.view import StepView
from gradwatch.interfaces import Monitor
from gradwatch.numerics.noise import inner_product, squared_distance
from gradwatch.numerics.reading import Reading
from gradwatch.numerics.running import reading_of
from gradwatch.records import MODEL, Measurement, ModelInfo, StepInfo

UNIT: Final = "L/P²"
KEPT: Final = 20
"""Older secants are of a curvature that the path has left."""
SECANTS: Final = f"largest of the newest {KEPT} secants"
SHARPNESS: Final = "largest eigenvalue of the Hessian"
FINITE_DIFFERENCES: Final = "finite differences"
"""Source of a sharpness that may be far off."""
LARGEST_ERROR: Final = 0.05
"""Of a sharpness, relative."""


class Smoothness(Monitor):
    """Smoothness of the loss from secants along gradient steps [L/P²].

    `smoothness_secant = ||g(w - lr g) - g(w)|| / ||lr g||`, both gradients of the same batch
    with the same dropout masks. It is the mean curvature along the step and mostly below the
    largest eigenvalue of the Hessian of the batch (0.76 times it on average in one experiment), so
    `smoothness` is a running maximum, of the newest 20 secants. Batches of few samples curve more
    than the whole data, so that it may also be several times too large.

    It runs on the fixed probe batch where there is one. Parameters in half precision are left
    out: their rounding is larger than the change of the gradient.

    On the last batch the probe also gives the squared norm of its first gradient [L²/P²] and its
    number of examples, which `GradientNoise` compares with the gradient of the step.
    """

    metrics = ("smoothness_secant", "smoothness")
    probed = ("smoothness_secant", "smoothness_gradient_square", "smoothness_examples")
    probe_cost = 2.0

    def __init__(self) -> None:
        self._newest: deque[float] = deque(maxlen=KEPT)

    @override
    def probe(self, view: ProbeView) -> dict[str, Tensor]:
        start = view.parameters(view.any)
        if view.lr is None or (not isinstance(view.lr, Tensor) and view.lr == 0):
            return {}
        if any(item.element_size() < torch.float32.itemsize for item in start.values()):
            view.note("smoothness_secant: half precision is too coarse for it")
            return {}
        with same_draws(view.any.model):
            before = view.gradient(view.any, at=start)
        moved = {
            name: (item.detach() - view.lr * before[name]).requires_grad_()
            for name, item in start.items()
        }
        after = view.gradient(view.any, at=moved)
        change = squared_distance([*after.values()], [*before.values()])
        # What was added to the parameters, rounding included, not what should have been.
        length = squared_distance([*moved.values()], [*start.values()])
        found = {"smoothness_secant": (change / length).sqrt()}
        examples = _examples(view)
        if examples:
            gradient = [*before.values()]
            square = inner_product(gradient, gradient)
            found["smoothness_gradient_square"] = square
            found["smoothness_examples"] = torch.full_like(square, examples)
        return found

    @override
    def read(self, view: StepView) -> Iterator[Reading]:
        secant = view.probed.get("smoothness_secant")
        if secant is not None:
            yield Reading("smoothness_secant", secant, unit=UNIT)

    @override
    def derive(
        self, step: StepInfo, measurements: Sequence[Measurement], model: ModelInfo
    ) -> Iterator[Measurement]:
        secant = reading_of(measurements, "smoothness_secant")
        if secant is None or step.skipped:
            return
        self._newest.append(secant.value)
        yield Measurement(
            metric="smoothness",
            scope=MODEL,
            step=step.step,
            value=max(self._newest),
            unit=UNIT,
            source=SECANTS,
        )

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"newest": list(self._newest)}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._newest = deque(map(float, state["newest"]), maxlen=KEPT)


def _examples(view: ProbeView) -> int:
    """Of the last batch; 0 if it is not the one that was probed or shows none."""
    if view.fixed_objective is not None:
        return 0
    try:
        return view.last.examples
    except ObjectiveError:
        return 0


def _is_known(sharpness: Measurement) -> bool:
    """An eigenvalue that has not been found, or that is negative, is no smoothness."""
    error = sharpness.standard_error or 0.0
    if sharpness.source == FINITE_DIFFERENCES:
        return False
    return sharpness.value > 0 and error <= LARGEST_ERROR * sharpness.value


class KnownSmoothness:
    """The newest smoothness that is known: the sharpness if it is measured, else the secants'."""

    def __init__(self) -> None:
        self._sharpness = math.nan
        self._secants = math.nan

    @property
    def value(self) -> float:
        """The largest eigenvalue of the Hessian or the largest secant [L/P²]; NaN if unknown."""
        return self._secants if self.is_secant else self._sharpness

    @property
    def is_secant(self) -> bool:
        """Whether no sharpness is known."""
        return math.isnan(self._sharpness)

    @property
    def source(self) -> str:
        """What it was estimated from."""
        return SECANTS if self.is_secant else SHARPNESS

    def learn(self, measurements: Sequence[Measurement]) -> None:
        """Takes what was measured in one step.

        Args:
            measurements: of the step.
        """
        sharpness = reading_of(measurements, "sharpness")
        secants = reading_of(measurements, "smoothness")
        if sharpness is not None and _is_known(sharpness):
            self._sharpness = sharpness.value
        self._secants = self._secants if secants is None else secants.value

    def state_dict(self) -> dict[str, Any]:
        """Both values."""
        return {"sharpness": self._sharpness, "secants": self._secants}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` returned.

        Args:
            state: both values.
        """
        sharpness, secants = float(state["sharpness"]), float(state["secants"])
        self._sharpness, self._secants = sharpness, secants

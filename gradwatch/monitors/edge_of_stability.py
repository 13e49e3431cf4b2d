"""The sharpness against what the steps of the optimizer can stand, and when it got there."""

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from statistics import median, median_high
from typing import Any, Final

from typing_extensions import override

from gradwatch.capture.view import StepView
from gradwatch.interfaces import Monitor
from gradwatch.monitors.noise_stability import (
    CONVERGED,
    UNDER_NOISE,
    is_beyond,
    noise_stability,
    relative_error,
)
from gradwatch.monitors.steady_means import SteadyMeans
from gradwatch.numerics.reading import Reading
from gradwatch.numerics.running import reading_of
from gradwatch.records import MODEL, Measurement, ModelInfo, StepInfo
from gradwatch.theory.break_even import (
    Threshold,
    another_gradient,
    settled_step,
    stands_for_all,
    threshold_at,
)

PLAIN: Final = "sharpness"
PRECONDITIONED: Final = "preconditioned_sharpness"
VARIANCE: Final = "sharpness_variance"

REACHED: Final = 0.97
"""Ratio to the threshold; a sharpness that hovers about it is within a few per cent of it."""
STEPS_OF_CLIPPING: Final = 50
STEPS_OF_BATCHES: Final = 21
MICROBATCHES: Final = "micro-batches"
"""In the source of a reading of `GradientNoise`, whose parts the gradient was added up from."""
SCALES: Final = 100
"""Number of known `gradient_scale` whose median counts."""

BY_SHARPNESS: Final = "the sharpness reached the stability threshold"
BY_NOISE: Final = "the gradient noise made the learning rate reach its limit"
FROM_THE_START: Final = " at the first reading or before it: the run may have begun there"

_WATCHED: Final = frozenset({PLAIN, PRECONDITIONED, VARIANCE})


class EdgeOfStability(Monitor):
    """How close the curvature comes to what the optimizer can stand.

    `stability_threshold` is the largest curvature at which the steps converge on a parabola: for
    SGD that of the sharpness, `2 (1 + beta)/eta`, for Adam, AdamW and RMSprop that of the
    preconditioned sharpness. `stability_ratio` is the running mean of the sharpness over it, in
    which each reading weighs as much as all before it.

    `noise_stability_ratio = eta/eta_max`, for SGD without Nesterov's momentum, with
    `eta_max = 2 (1 + beta) lambda / (lambda² + kappa s² (1 + beta)/(1 - beta))` from the running
    means of the sharpness and of its variance `s²` over the examples, and `kappa` of the usual
    batch size. It assumes that the losses of all examples have a common minimum.

    `break_even_step` is the step of the first reading that was at 0.97 of the threshold or above,
    or at the limit of the noise, for certain, and of 128 examples at least: fewer curve more than
    all data. It is repeated with each reading after that. There is none while the median of the
    newest 100 `gradient_scale` of `GradientNoise` is outside [1/2, 2]: the steps then follow
    another gradient than that of the loss whose curvature is measured, and both ratios, which have
    that median in their inputs, are wrong by its square root.

    The means begin anew with another optimizer, or if between two readings the threshold or the
    gain `1/(1 - momentum)` changes by more than 5 %; that of `s²` also with another usual batch
    size. A slow schedule goes through: the sharpness does not depend on the learning rate, and each
    ratio is taken with the settings of its step. `inputs["readings"]` counts since then.

    Nothing is measured here and nothing is said where the threshold of the optimizer is not known,
    and with Adam and RMSprop before their preconditioner has settled. The monitor must stand behind
    the one that measures the sharpness.

    References:
        Cohen et al. 2021, arXiv:2103.00065, and 2022, arXiv:2207.14484 (thresholds);
        Jastrzebski et al. 2020, arXiv:2002.09572 (noise, break-even point); what is not in them is
        derived in `gradwatch.theory.break_even`.
    """

    metrics = (
        "stability_threshold",
        "stability_ratio",
        UNDER_NOISE,
        "break_even_step",
    )

    def __init__(self) -> None:
        self._clipped: deque[float] = deque(maxlen=STEPS_OF_CLIPPING)
        self._batches: deque[float] = deque(maxlen=STEPS_OF_BATCHES)
        self._scales: deque[float] = deque(maxlen=SCALES)
        self._added_up = math.nan
        self._means = SteadyMeans()
        self._optimizer = ""
        self._first: dict[str, float] = {}
        self._break_even: dict[str, float] = {}

    @override
    def read(self, view: StepView) -> tuple[Reading, ...]:
        return ()

    @override
    def derive(
        self, step: StepInfo, measurements: Sequence[Measurement], model: ModelInfo
    ) -> Iterator[Measurement]:
        if step.skipped:
            return
        self._clipped.append(math.nan if step.grads_clipped is None else float(step.grads_clipped))
        if step.batch_size:
            self._batches.append(float(step.batch_size))
        scale = reading_of(measurements, "gradient_scale")
        if scale is not None:
            self._scales.append(scale.value)
        square = reading_of(measurements, "gradient_square")
        if square is not None:
            self._added_up = float(MICROBATCHES in square.source)
        readings = {item.metric: item for item in measurements if _is_watched(item)}
        if not readings:
            return
        threshold = threshold_at(step)
        newest = readings.get(PRECONDITIONED if threshold.preconditioned else PLAIN)
        settled = step.step >= settled_step(step.optimizer, step.betas)
        if newest is not None and threshold.known and settled:
            self._learn(step, newest, readings.get(VARIANCE), threshold)
            yield from self._compare(step, newest, readings.get(VARIANCE), threshold, model)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "clipped": list(self._clipped),
            "batches": list(self._batches),
            "scales": list(self._scales),
            "added_up": self._added_up,
            "means": self._means.state_dict(),
            "optimizer": self._optimizer,
            "first": dict(self._first),
            "break_even": dict(self._break_even),
        }

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        names = ("clipped", "batches", "scales")
        clipped, batches, scales = (list(map(float, state[name])) for name in names)
        first, reached = (
            {str(name): float(value) for name, value in state[part].items()}
            for part in ("first", "break_even")
        )
        self._means.load_state_dict(state["means"])
        self._clipped = deque(clipped, maxlen=STEPS_OF_CLIPPING)
        self._batches = deque(batches, maxlen=STEPS_OF_BATCHES)
        self._scales = deque(scales, maxlen=SCALES)
        self._added_up = float(state["added_up"])
        self._optimizer = str(state["optimizer"])
        self._first, self._break_even = first, reached

    @property
    def _scale(self) -> float:
        """Square of the gradient of a step over that of the loss that probes evaluate."""
        return median(self._scales) if self._scales else math.nan

    def _learn(
        self,
        step: StepInfo,
        newest: Measurement,
        variance: Measurement | None,
        threshold: Threshold,
    ) -> None:
        if step.optimizer != self._optimizer:
            self._means, self._optimizer = SteadyMeans(), step.optimizer
            self._first, self._break_even = {}, {}
        self._means.add(
            newest.value,
            None if variance is None else variance.value,
            threshold=threshold.value,
            momentum=_momentum(step),
            batch_size=median_high(self._batches) if self._batches else math.nan,
        )
        if not self._first and relative_error(newest) <= CONVERGED:
            self._first = {
                "first_sharpness": newest.value,
                "first_step": float(step.step),
                "first_learning_rate": step.lrs[0],
            }

    def _compare(
        self,
        step: StepInfo,
        newest: Measurement,
        variance: Measurement | None,
        threshold: Threshold,
        model: ModelInfo,
    ) -> Iterator[Measurement]:
        ratio, limit = self._means.sharpness.value / threshold.value, threshold.value
        if not math.isfinite(ratio):
            return
        yield _measurement("stability_threshold", step, limit, unit=newest.unit)
        error = relative_error(newest) * abs(newest.value) / limit
        inputs = self._inputs(step, newest, threshold)
        yield _measurement("stability_ratio", step, ratio, error=error, inputs=inputs)
        noise = None if variance is None else self._noise(step, newest, variance, model)
        if noise is not None:
            yield noise
        enough = stands_for_all(newest.inputs.get("examples", math.nan), model.train_size)
        if enough and not another_gradient(self._scale) and not self._break_even:
            self._break_even = self._reached(step, newest, threshold, noise)
        if self._break_even:
            yield self._break_even_step(step)

    def _inputs(
        self, step: StepInfo, newest: Measurement, threshold: Threshold
    ) -> dict[str, float]:
        seen = [share for share in self._clipped if not math.isnan(share)]
        unknown = dict.fromkeys(("first_sharpness", "first_step", "first_learning_rate"), math.nan)
        return {
            "sharpness": self._means.sharpness.value,
            "newest": newest.value,
            "relative_error": relative_error(newest),
            "threshold": threshold.value,
            "learning_rate": step.lrs[0],
            "momentum": _momentum(step),
            "preconditioned": float(threshold.preconditioned),
            "readings": self._means.sharpness.count,
            "clipped_share": sum(seen) / len(seen) if seen else math.nan,
            "groups_differ": float(len(set(step.lrs)) > 1),
            "examples": newest.inputs.get("examples", math.nan),
            "gradient_scale": self._scale,
            "added_up": self._added_up,
            **unknown,
            **self._first,
        }

    def _noise(
        self, step: StepInfo, newest: Measurement, variance: Measurement, model: ModelInfo
    ) -> Measurement | None:
        found = noise_stability(
            step,
            sharpness=self._means.sharpness.value,
            variance=self._means.variance.value,
            batch_size=self._means.batch_size,
            train_size=model.train_size,
            errors=(relative_error(newest), relative_error(variance)),
        )
        if found is None:
            return None
        return _measurement(
            UNDER_NOISE,
            step,
            found.ratio,
            error=found.error,
            inputs={
                **found.inputs,
                "readings": self._means.variance.count,
                "examples": newest.inputs.get("examples", math.nan),
                "gradient_scale": self._scale,
                "added_up": self._added_up,
            },
        )

    def _reached(
        self,
        step: StepInfo,
        newest: Measurement,
        threshold: Threshold,
        noise: Measurement | None,
    ) -> dict[str, float]:
        """What to remember of the break-even point, empty before it."""
        if step.grads_clipped:
            return {}
        ratio = newest.value / threshold.value
        by_sharpness = ratio >= REACHED and relative_error(newest) <= CONVERGED
        if not by_sharpness and not (noise is not None and is_beyond(noise)):
            return {}
        return {
            "step": float(step.step),
            "ratio": ratio,
            "noise_ratio": math.nan if noise is None else noise.value,
            "by_noise": float(not by_sharpness),
            "from_the_start": float(self._first.get("first_step") == step.step),
        }

    def _break_even_step(self, step: StepInfo) -> Measurement:
        reached = self._break_even
        source = BY_NOISE if reached["by_noise"] else BY_SHARPNESS
        return _measurement(
            "break_even_step",
            step,
            reached["step"],
            inputs={"ratio": reached["ratio"], "noise_ratio": reached["noise_ratio"]},
            source=source + (FROM_THE_START if reached["from_the_start"] else ""),
        )


def _is_watched(item: Measurement) -> bool:
    return item.metric in _WATCHED and item.scope == MODEL and math.isfinite(item.value)


def _momentum(step: StepInfo) -> float:
    """That of SGD and RMSprop, or beta1."""
    return step.betas[0] if step.betas else step.momentum or 0.0


def _measurement(
    metric: str,
    step: StepInfo,
    value: float,
    *,
    unit: str = "1",
    error: float = math.nan,
    inputs: Mapping[str, float] | None = None,
    source: str = "",
) -> Measurement:
    return Measurement(
        metric=metric,
        scope=MODEL,
        step=step.step,
        value=value,
        unit=unit,
        standard_error=error if math.isfinite(error) else None,
        inputs=inputs or {},
        source=source,
    )

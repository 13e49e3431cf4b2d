"""The mean square of the true gradient over a run, and what SGD's theory says it is made of."""

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any, Final

from typing_extensions import override

from gradwatch.capture.view import StepView
from gradwatch.errors import ConfigError
from gradwatch.interfaces import Monitor
from gradwatch.monitors.gradient_noise import SQUARE_UNIT
from gradwatch.monitors.noise_scale import ADAM, share_of
from gradwatch.monitors.path import (
    BEYOND,
    Path,
    PathReading,
    changes,
    lasting_changes,
    loss_trend,
    share_above,
)
from gradwatch.monitors.smoothness import KnownSmoothness
from gradwatch.numerics.reading import Reading
from gradwatch.numerics.running import BLOCKS, Estimate, mean_of, reading_of
from gradwatch.records import MODEL, Measurement, ModelInfo, StepInfo
from gradwatch.theory.gradient_convergence import Split, stationarity_bound

WINDOW: Final = 400
"""Of fewer readings the mean is rarely known to half its size."""

EDGE: Final = 1.8
"""Step size times smoothness at which SGD is at the edge of stability."""

SCALES: Final = 100
"""Number of known `gradient_scale` whose median counts; of 20 it may be wrong by a factor 2."""


class Stationarity(Monitor):
    """Mean of the squared norm of the true gradient, which measures how near SGD is to rest.

    `stationarity = sum_k w_k ||G_k||² / sum_k w_k` since the start, with the weights
    `w_k = 2 g_k - L_k g_k²` of randomly stopped SGD, `g` the step size and `L` the smoothness
    [L²/P²]. In expectation it is at most the sum of `stationarity_step_term`,
    `2 (first loss - lowest loss) / sum_k w_k`, and `stationarity_noise_term`,
    `sum_k L_k g_k² sigma_k²/B_k / sum_k w_k`. A sampled step stands for those since the one before.
    From `2/L` on a step size has no weight and the sums lose their meaning: the first such reading
    is the last that the three are reported with.

    `stationarity_recent` is the plain mean over the newest 400 readings, `noise_floor` the level
    below which more steps cannot get it, `L g sigma²/B / (2 - L g)`, and `noise_share` the share
    of the noise in the bound for constant settings.

    The step size is the largest learning rate of any group; with heavy ball, heuristically,
    `lr (1 - dampening)/(1 - momentum)`. Everything is reported for any optimizer, but means what it
    says for SGD only. It needs `GradientNoise`, and `Smoothness` or a monitor of the sharpness.

    Args:
        lowest_loss: a value that the training loss cannot fall below [L].

    Raises:
        ConfigError: if `lowest_loss` is not a finite number.

    References:
        Derived from the descent lemma; same as Ghadimi and Lan 2013, "Stochastic First- and
        Zeroth-order Methods for Nonconvex Stochastic Programming", theorem 2.1; for the link to
        network structure and dropout Ithapu, Ravi and Singh 2017, arXiv:1702.08670.
    """

    metrics = (
        "stationarity",
        "stationarity_step_term",
        "stationarity_noise_term",
        "stationarity_recent",
        "noise_floor",
        "noise_share",
    )

    def __init__(self, lowest_loss: float = 0.0) -> None:
        if not _is_number(lowest_loss):
            raise ConfigError(
                f"lowest_loss must be a finite number, got {lowest_loss!r}; give a value that the "
                "training loss cannot fall below"
            )
        self.lowest_loss = float(lowest_loss)
        self._path = Path()
        self._rows: deque[PathReading] = deque(maxlen=WINDOW)
        self._smoothness = KnownSmoothness()
        self._variance = math.nan
        self._first_loss = math.nan
        self._smallest_loss = math.nan
        self._scales: deque[float] = deque(maxlen=SCALES)
        self._ended = False

    @override
    def read(self, view: StepView) -> tuple[Reading, ...]:
        return ()

    @override
    def derive(
        self, step: StepInfo, measurements: Sequence[Measurement], model: ModelInfo
    ) -> Iterator[Measurement]:
        if step.skipped:
            return
        self._learn(step, measurements)
        square = reading_of(measurements, "gradient_square")
        if square is None:
            return
        row = self._row(step, square.value)
        self._rows.append(row)
        self._path.add(row)
        if len(self._rows) < BLOCKS:
            return
        inputs = {**self._inputs(step), "from_adam": float(square.source == ADAM)}
        if self._path.means.count >= BLOCKS and not self._ended:
            # Once more with the share beyond the edge, so that no older verdict stands.
            self._ended = self._path.beyond_share > 0.0
            yield from self._whole(step.step, inputs)
        yield from self._newest(step.step, inputs)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "path": self._path.state_dict(),
            "rows": [list(row) for row in self._rows],
            "smoothness": self._smoothness.state_dict(),
            "variance": self._variance,
            "first_loss": self._first_loss,
            "smallest_loss": self._smallest_loss,
            "scales": list(self._scales),
            "ended": self._ended,
        }

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        names = ("variance", "first_loss", "smallest_loss")
        variance, first_loss, smallest_loss = (float(state[name]) for name in names)
        rows = [PathReading(*map(float, row)) for row in state["rows"]]
        self._path.load_state_dict(state["path"])
        self._smoothness.load_state_dict(state["smoothness"])
        self._rows = deque(rows, maxlen=WINDOW)
        self._variance, self._first_loss, self._smallest_loss = variance, first_loss, smallest_loss
        self._scales = deque(map(float, state["scales"]), maxlen=SCALES)
        self._ended = bool(state["ended"])

    def _learn(self, step: StepInfo, measurements: Sequence[Measurement]) -> None:
        self._smoothness.learn(measurements)
        variance = reading_of(measurements, "gradient_variance")
        self._variance = self._variance if variance is None else variance.value
        scale = reading_of(measurements, "gradient_scale")
        if scale is not None:
            self._scales.append(scale.value)
        loss = _known(step.loss)
        if math.isfinite(loss):
            if math.isnan(self._first_loss):
                self._first_loss = loss
            # An unknown one second: a comparison with NaN is false.
            self._smallest_loss = min(loss, self._smallest_loss)

    def _row(self, step: StepInfo, square: float) -> PathReading:
        loss = _known(step.loss)
        return PathReading(
            step=float(step.step),
            square=square,
            variance=self._variance,
            step_size=_known(step.lr) * step.momentum_gain,
            smoothness=self._smoothness.value,
            batch_size=_known(step.batch_size),
            loss=loss if math.isfinite(loss) else math.nan,
            loss_scale=_known(step.loss_scale),
            clipped=_known(step.grads_clipped),
        )

    def _whole(self, step: int, inputs: Mapping[str, float]) -> Iterator[Measurement]:
        estimate = self._path.means.estimate
        split = self._split_of_path()
        found = {
            **inputs,
            "estimates": float(estimate.count),
            "clipped_share": self._path.clipped_share,
            "beyond_edge": self._path.beyond_share,
            "relative_error": estimate.relative_error,
        }
        yield from _measured("stationarity", step, estimate, found)
        for metric, value in (
            ("stationarity_step_term", split.step_term),
            ("stationarity_noise_term", split.noise_term),
        ):
            yield from _measured(metric, step, _exact(value), {})

    def _newest(self, step: int, inputs: Mapping[str, float]) -> Iterator[Measurement]:
        estimate = mean_of(self._column("square"))
        found = {
            **inputs,
            "estimates": float(estimate.count),
            "clipped_share": share_of(self._column("clipped")),
            "beyond_edge": share_above(self._column("edge"), BEYOND),
            "relative_error": estimate.relative_error,
        }
        yield from _measured("stationarity_recent", step, estimate, found)
        now = self._split_now(inputs)
        yield from _measured("noise_floor", step, _exact(now.noise_term), {})
        yield from _measured("noise_share", step, _exact(now.noise_share), found, unit="1")

    def _split_of_path(self) -> Split:
        weight = self._path.means.weight
        return Split(
            2.0 * (self._first_loss - self.lowest_loss) / weight, self._path.noise / weight
        )

    def _split_now(self, inputs: Mapping[str, float]) -> Split:
        """The two terms for the settings of now, as if they had been so from the start."""
        names = ("smoothness", "variance", "batch_size", "step_size", "steps")
        try:
            gap = self._first_loss - self.lowest_loss
            known = gap >= 0.0
            # The floor does not depend on the loss.
            split = stationarity_bound(gap if known else 0.0, *(inputs[name] for name in names))
        except (ConfigError, ArithmeticError):
            return _UNKNOWN
        return split if known else Split(math.nan, split.noise_term)

    def _inputs(self, step: StepInfo) -> dict[str, float]:
        row, split = self._rows[-1], self._split_of_path() if self._path.means.count else _UNKNOWN
        variance = mean_of(_finite(self._column("variance")))
        inputs = {
            "step_term": split.step_term,
            "noise_term": split.noise_term,
            "lr_changes": changes(self._column("step_size")),
            "batch_changes": lasting_changes(self._column("batch_size")),
            "loss_scale_changes": changes(self._column("loss_scale")),
            # The edge is that of plain SGD; heavy ball has another one.
            "edge_share": math.nan if step.momentum else share_above(self._column("edge"), EDGE),
            "gradient_scale": median(self._scales) if len(self._scales) >= BLOCKS else math.nan,
            "lowest_loss": self.lowest_loss,
            "smallest_loss": self._smallest_loss,
            "first_loss": self._first_loss,
            "loss_recent": mean_of(_finite(self._column("loss"))).value,
            "loss_trend": loss_trend(self._rows),
            "smoothness": self._smoothness.value,
            "smoothness_is_secant": float(self._smoothness.is_secant),
            "step_size": row.step_size,
            "batch_size": _median(self._column("batch_size")),
            "variance": variance.value,
            "variance_error": variance.standard_error,
            "groups_differ": float(len(set(step.lrs)) > 1),
            "momentum": step.momentum or 0.0,
            "dampening": step.dampening or 0.0,
            "weight_decay": step.weight_decay or 0.0,
            "steps": step.step + 1.0,
        }
        inputs["floor"] = self._split_now(inputs).noise_term
        return inputs

    def _column(self, name: str) -> list[float]:
        return [getattr(row, name) for row in self._rows]


_UNKNOWN: Final = Split(math.nan, math.nan)


def _measured(
    metric: str,
    step: int,
    estimate: Estimate,
    inputs: Mapping[str, float],
    unit: str = SQUARE_UNIT,
) -> Iterator[Measurement]:
    if math.isfinite(estimate.value):
        yield Measurement(
            metric=metric,
            scope=MODEL,
            step=step,
            value=estimate.value,
            unit=unit,
            standard_error=estimate.error,
            inputs=inputs,
        )


def _exact(value: float) -> Estimate:
    return Estimate(value, math.nan, 0)


def _finite(values: Sequence[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def _median(values: Sequence[float]) -> float:
    finite = _finite(values)
    return median(finite) if finite else math.nan


def _known(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value) and not isinstance(value, bool)

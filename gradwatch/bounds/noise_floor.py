"""The noise floor: how large the true gradient may be now, at this learning rate."""

import math
from collections.abc import Mapping
from typing import ClassVar

from typing_extensions import override

from gradwatch.bounds.randomly_stopped_sgd import assumptions, judged, known
from gradwatch.errors import ConfigError
from gradwatch.interfaces import Bound
from gradwatch.records import MODEL, Interval, Measurement, ModelInfo, StepInfo
from gradwatch.theory.gradient_convergence import stationarity_bound


class NoiseFloor(Bound):
    """The newest mean of `||grad f||²` stays below a step term plus the noise floor.

    `2 D / (N g (2 - L g)) + L g s² / (2 - L g)` with `s² = sigma²/B`, the bound of a run of N steps
    of constant size g. It is a theorem for the mean over such a run; of its newest steps, with
    the constants measured now, it is a heuristic. The first part shrinks with more steps, the
    second one, the floor, does not.

    Undecided as `RandomlyStoppedSgd` is, and where learning rate or batch size changed within the
    window of the measurement.

    References:
        derived from the descent lemma, as Ghadimi and Lan 2013, SIAM J. Optim. 23, theorem 2.1.
    """

    metric = "stationarity_recent"
    source: ClassVar[str] = (
        "constant-step bound derived from the descent lemma, as Ghadimi & Lan 2013, SIAM J. Optim. "
        "23, theorem 2.1; subject of Ithapu, Ravi & Singh 2017, arXiv:1702.08670"
    )

    @override
    def interval(
        self, measurement: Measurement, step: StepInfo, model: ModelInfo
    ) -> Interval | None:
        if measurement.scope != MODEL:
            return None
        inputs = measurement.inputs
        unmet = _changed(inputs) or assumptions(inputs, step)
        return judged(measurement, _bound_now(inputs), unmet, "heuristic")


def _changed(inputs: Mapping[str, float]) -> str:
    if known(inputs, "lr_changes") != 0:
        return "the learning rate changed within the window"
    if known(inputs, "batch_changes") != 0:
        return "the batch size changed within the window"
    return ""


def _bound_now(inputs: Mapping[str, float]) -> float:
    """The bound with the constants of the window; NaN where they are no constants."""
    try:
        split = stationarity_bound(
            loss_gap=known(inputs, "first_loss") - known(inputs, "lowest_loss"),
            smoothness=known(inputs, "smoothness"),
            variance=known(inputs, "variance"),
            batch_size=known(inputs, "batch_size"),
            learning_rate=known(inputs, "step_size"),
            steps=known(inputs, "steps"),
        )
    except (ConfigError, ArithmeticError):  # theory refuses what was not, or oddly, measured
        return math.nan
    return split.bound

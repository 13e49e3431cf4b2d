"""What rules know of the gradient noise scale, and when they must not speak of it."""

import math
from dataclasses import dataclass
from typing import Final

from gradwatch.records import History, Measurement, ModelInfo, StepInfo
from gradwatch.rules.recent import known, newest_value, usable, usual_batch_size
from gradwatch.table import number

ENOUGH_ESTIMATES: Final = 50
WARM_UP: Final = 0.02
"""Share of the planned steps."""
LARGEST_CLIPPED_SHARE: Final = 0.2
HEAVY_TAIL: Final = 3.0
"""Mean over median of the gradient variance above which its tail decides."""
SIGMAS: Final = 2.0
LOWER_LIMIT: Final = "noise_scale_at_least"
"""What is measured instead where the gradient is lost in the noise."""


@dataclass(frozen=True, slots=True)
class NoiseScale:
    """A gradient noise scale `tr(Sigma)/|G|²` that may be spoken of.

    Attributes:
        measurement: what was measured.
        batch_size: S, samples per step.
        clipped_share: share of the steps with clipped gradients; NaN if unknown.
    """

    measurement: Measurement
    batch_size: float
    clipped_share: float

    @property
    def value(self) -> float:
        """The noise scale [sample]."""
        return self.measurement.value

    @property
    def error(self) -> float:
        """Twice its standard error [sample]."""
        return SIGMAS * (self.measurement.standard_error or 0.0)

    @property
    def lr_is_step_size(self) -> bool:
        """Gradients are known to be clipped seldom."""
        return self.clipped_share <= LARGEST_CLIPPED_SHARE

    def __str__(self) -> str:
        return (
            f"noise scale tr(Sigma)/|G|² = {number(self.value)} ± {number(self.error)} samples at "
            f"step {self.measurement.step}, batch {number(self.batch_size)}"
        )


def noise_scale(history: History) -> NoiseScale | None:
    """The newest noise scale, unless a rule has to be silent on it.

    Args:
        history: the reports so far.

    Returns:
        The noise scale; None if it is not significant, rests on fewer than 50 estimates, is of the
        warm-up, of gradients that are clipped in more than 20 % of the steps, of batches of half
        the data or more, of a heavy tail, or from the state of Adam: that follows the drift of the
        gradient as if it were noise.
    """
    found, limit = (newest_value(history, metric) for metric in ("noise_scale", LOWER_LIMIT))
    if found is None or not _significant(found) or _heavy_tailed(found):
        return None
    if limit is not None and limit.step > found.step:
        return None
    now, inputs = history[-1].info, found.inputs
    batch_size = usual_batch_size(history) or known(inputs, "batch_size")
    clipped = known(inputs, "clipped_share")
    if clipped > LARGEST_CLIPPED_SHARE or known(inputs, "step_of_adam") != 0:
        return None
    if warming_up(now, history.model) or not _small(batch_size, history.model):
        return None
    return NoiseScale(found, batch_size, clipped)


def warming_up(step: StepInfo, model: ModelInfo) -> bool:
    """Whether a step is one of the first 2 % that are planned.

    Args:
        step: its settings.
        model: facts about the model.

    Returns:
        True if it is; False if nobody said how many steps are planned.
    """
    return step.step < WARM_UP * (model.planned_steps or 0)


def _significant(found: Measurement) -> bool:
    error = found.standard_error
    enough = known(found.inputs, "estimates") >= ENOUGH_ESTIMATES
    if not enough or error is None or not usable(found.value):
        return False
    return 0 <= error < found.value / SIGMAS


def _heavy_tailed(found: Measurement) -> bool:
    mean, median = known(found.inputs, "gradient_variance"), known(found.inputs, "variance_median")
    return not median >= mean / HEAVY_TAIL


def _small(batch_size: float, model: ModelInfo) -> bool:
    return 1 <= batch_size < (model.train_size or math.inf) / 2

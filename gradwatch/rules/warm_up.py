"""Trainings that start with steps too large for the curvature at the initial weights."""

from dataclasses import dataclass
from typing import Final

from gradwatch.records import History, Recommendation
from gradwatch.rules.curvature import LARGEST_ERROR, SOURCE, applies, evidence, of_all, reliable
from gradwatch.rules.loss_course import loss_course
from gradwatch.rules.readings import SHARPNESS, STABILITY, curvature_readings
from gradwatch.rules.recent import differs, known, usable
from gradwatch.table import number

EARLY: Final = 0.05
"""Share of the planned steps within which the start is news."""
EARLY_REPORTS: Final = 10
"""Number of reports within which it is."""
SHARE_OF_THRESHOLD: Final = 0.5
"""Of the largest stable learning rate, to begin with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """The first reading of the sharpness of a run of SGD, against the threshold of its step.

    Attributes:
        step: of the reading.
        sharpness: lambda_0 [L/P²].
        ratio: r_0, lambda_0 over the threshold.
        learning_rate: of then [P²/L].
    """

    step: int
    sharpness: float
    ratio: float
    learning_rate: float

    @property
    def limit(self) -> float:
        """Largest learning rate that is stable at lambda_0 [P²/L]."""
        return self.learning_rate / self.ratio

    def __str__(self) -> str:
        return (
            f"the sharpness at step {self.step} was {number(self.sharpness)} = "
            f"{number(self.ratio)} of the stability threshold of lr {number(self.learning_rate)}"
        )


def start(history: History) -> Start | None:
    """The start of a run whose settings are still those of the start.

    Adam has none: its preconditioner means nothing in the first steps.

    Args:
        history: the reports so far.

    Returns:
        The start; None if it is not known, its sharpness had not converged or was not positive,
        if settings have changed or differ between groups, if gradients are clipped in more than
        20 % of the steps, and for other optimizers than SGD.
    """
    readings, now = curvature_readings(history, STABILITY), history[-1].info
    if not readings or now.optimizer != "SGD":
        return None
    newest, inputs = readings[-1], readings[-1].measurement.inputs
    names = ("first_sharpness", "first_learning_rate", "threshold", "learning_rate")
    sharpness, first_lr, threshold, lr = (known(inputs, name) for name in names)
    if not usable(sharpness, first_lr, threshold, lr) or not applies(inputs):
        return None
    # Without weight decay, lr x threshold does not depend on the learning rate.
    then = threshold * lr / first_lr
    step = known(inputs, "first_step")
    same = not differs(first_lr, now.lr or 0.0) and newest.info.momentum == now.momentum
    if not same or not 0 <= step <= now.step or not usable(sharpness / then):
        return None
    found = Start(
        step=int(step), sharpness=sharpness, ratio=sharpness / then, learning_rate=first_lr
    )
    return found if _converged(history, found) else None


def warm_up(history: History) -> Recommendation | None:
    """Recommends to begin at half of the threshold where the first steps were above it.

    Said within the first 5 % of the planned steps or the first ten reports, and only if the loss
    has not come below the first one: a run that is thrown into a flatter region and learns there
    is healthy.

    Args:
        history: the reports so far.

    Returns:
        The recommendation, None if the start was below the threshold, or is no news, and where the
        curvature is that of few examples.
    """
    begun = start(history)
    if begun is None or begun.ratio <= 1 or not _early(history) or not _of_all(history):
        return None
    course, lr = loss_course(history, begun.step + 1), history[-1].info.lr or 0.0
    proposed = SHARE_OF_THRESHOLD * begun.limit
    if course is None or not course.not_below_first or not differs(lr, proposed):
        return None
    return Recommendation(
        knob="learning_rate",
        current=lr,
        proposed=proposed,
        unit="P²/L",
        severity="info",
        reason=(
            f"{begun}, and the loss has not come down since ({number(course.newer)} against "
            f"{number(course.first)}): begin with a warm-up, at {number(proposed)} or less, half "
            "of what is stable there"
        ),
        expected="the loss falls from the first steps on; the sharpness usually falls in a warm-up",
        evidence=evidence(history),
        source=SOURCE,
    )


def _of_all(history: History) -> bool:
    return of_all(curvature_readings(history, STABILITY)[-1].measurement.inputs, history)


def _early(history: History) -> bool:
    model = history.model
    within = history[-1].step < EARLY * (model.planned_steps or 0)
    return model.untouched_optimizer and (within or len(history) <= EARLY_REPORTS)


def _converged(history: History, begun: Start) -> bool:
    """Whether the first reading can be relied on."""
    newest = curvature_readings(history, STABILITY)[-1]
    if newest.step == begun.step:
        return abs(known(newest.measurement.inputs, "relative_error")) <= LARGEST_ERROR
    sharpness = curvature_readings(history, SHARPNESS)
    first = [item.measurement for item in sharpness if item.step == begun.step]
    return all(map(reliable, first))

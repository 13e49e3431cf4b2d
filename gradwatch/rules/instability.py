"""Training above the stability threshold whose loss says so too."""

from collections.abc import Sequence
from itertools import takewhile
from typing import Final

from gradwatch.records import History, Recommendation, Severity
from gradwatch.rules.curvature import (
    EDGE,
    SAFE,
    SOURCE,
    applies,
    evidence,
    of_all,
    spaced,
    stability,
    steady,
)
from gradwatch.rules.loss_course import LossCourse, loss_course
from gradwatch.rules.readings import (
    NOISE_STABILITY,
    STABILITY,
    CurvatureReading,
    curvature_readings,
)
from gradwatch.rules.recent import differs, usable
from gradwatch.rules.warm_up import SHARE_OF_THRESHOLD, Start, start
from gradwatch.table import number

READINGS: Final = 3
PATIENCE: Final = 100
"""Steps after which a run that was thrown up by its first steps has come down again."""
RECENT_LOSSES: Final = 30
"""What a loss is like now, where the steps since a reading may be thousands."""
AT_A_TIME: Final = 8.0
"""Factor by which a reading on the way off may lower the limit; weights that are far off curve by
any number."""
COLLAPSED: Final = 0.5
"""r below which the curvature of a run that was beyond the threshold is gone, with the signal."""


def unstable(history: History) -> Recommendation | None:
    """Lowers the learning rate of a run beyond the stability threshold to 0.8 of the limit.

    The limit is that of the curvature, or the lower one of curvature and gradient noise together.

    Either r >= 1.2 in three readings and the smoothed loss rose by more than 5 % over them. Or the
    loss is above the first one, or not finite, and r was 1.2 or more at the start or is now: a run
    that diverges at once has no time for three readings. Where the loss is ten times the first one
    and still rises, or not finite, r > 1 at the start is enough.

    A run that was too fast from the start on is told half of the limit instead: the sharpness of
    the initial weights is the lowest that it will see, and with momentum the way up breaks it.

    Or else, for SGD, the run has died: r was 1.2 or more in some reading at these settings and is
    below 0.5 now, and 100 steps later the loss stands where it began, within 5 %.

    A loss that falls is left in peace, whatever r says. The curvature of few examples, which is
    too large, counts only where the loss is ten times the first one.

    Args:
        history: the reports so far.

    Returns:
        The recommendation, None if the training is not known to be unstable.
    """
    return _diverged(history) or _rising(history) or _died(history)


def _rising(history: History) -> Recommendation | None:
    state = stability(history)
    window = state.window(READINGS) if state is not None else ()
    if state is None or not _beyond(window) or not of_all(state.inputs, history):
        return None
    course = loss_course(history, window[-1].step)
    if course is None or not course.rising:
        return None
    return _recommend(
        history,
        SAFE * _with_noise(history, state.readings[0].step, state.limit),
        f"{state}, {number(EDGE)} or more in {len(window)} readings since step {window[-1].step}, "
        f"and the loss rose from {number(course.older)} to {number(course.newer)} since",
        "advice",
    )


def _diverged(history: History) -> Recommendation | None:
    """The run is off: the threshold that counts for the next one is that of healthy weights."""
    found = curvature_readings(history, STABILITY)
    if not found or not applies(found[-1].measurement.inputs):
        return None
    begun, readings = start(history), steady(history, STABILITY)
    if begun is not None and _too_fast(history, begun):
        share, since, why = SHARE_OF_THRESHOLD, begun.step + 1, str(begun)
        limit = _with_noise(history, begun.step, begun.limit)
    elif _beyond(readings[:1]) and _enough(readings):
        above = list(takewhile(lambda reading: reading.value >= EDGE, readings))
        nearest = min(above, key=lambda reading: reading.value)
        share, since = SAFE, above[-1].step
        limit = (nearest.info.lr or 0.0) / min(nearest.value, AT_A_TIME)
        limit = _with_noise(history, nearest.step, limit)
        why = (
            f"the sharpness was {number(nearest.value)} of the stability threshold at step "
            f"{nearest.step}"
        )
    else:
        return None
    course = loss_course(history, since, most=RECENT_LOSSES)
    few = not of_all(found[-1].measurement.inputs, history)
    if course is None or not (course.lost if few else course.above_first):
        return None
    if not (course.blown_up or history[-1].step >= since + PATIENCE):
        return None
    return _recommend(
        history,
        share * limit,
        f"{loss_in_words(course)}; {why}, where steps move away from a minimum; weights that are "
        "far off by now need a restart, with this learning rate or with a warm-up that begins "
        f"below {number(limit)}",
        "warning",
    )


def _died(history: History) -> Recommendation | None:
    """Thrown off to where nothing is learnt any more, as with rectifiers that are all off."""
    readings = steady(history, STABILITY)
    above = [reading for reading in readings if reading.value >= EDGE]
    if (
        not above
        or history[-1].info.optimizer != "SGD"
        or not back_where_it_began(history, above[0].step)
    ):
        return None
    nearest = min(above, key=lambda reading: reading.value)
    limit = (nearest.info.lr or 0.0) / min(nearest.value, AT_A_TIME)
    limit = _with_noise(history, nearest.step, limit)
    return _recommend(
        history,
        SAFE * limit,
        "the loss is back where it began and stays there, and the curvature is gone; the sharpness "
        f"was {number(nearest.value)} of the stability threshold at step {nearest.step}, where "
        "steps move away from a minimum; a run that has died needs a restart, with this learning "
        f"rate or with a warm-up that begins below {number(limit)}",
        "advice",
    )


def back_where_it_began(history: History, since: int) -> bool:
    """Whether a run has lost its curvature and all that it had learnt.

    Args:
        history: the reports so far.
        since: step of a reading at which it was unstable.

    Returns:
        True if r is that of now and below 0.5, of enough examples and without clipping, and for 100
        steps since the loss is the first one and moves no more.
    """
    found = curvature_readings(history, STABILITY)
    if not found or found[-1].value >= COLLAPSED or found[-1].step <= since:
        return False
    inputs = found[-1].measurement.inputs
    course = loss_course(history, since + PATIENCE, most=RECENT_LOSSES)
    at_first = course is not None and course.back_at_first
    return at_first and applies(inputs) and of_all(inputs, history)


def _too_fast(history: History, begun: Start) -> bool:
    """Whether the first steps are what threw the run off.

    A loss that is off and still multiplies is what steps just beyond the threshold make of it.
    """
    course = loss_course(history, begun.step + 1, most=RECENT_LOSSES)
    multiplies = course is not None and course.lost and course.rising
    return begun.ratio >= EDGE or (multiplies and begun.ratio > 1)


def _with_noise(history: History, step: int, limit: float) -> float:
    """The limit of the curvature, or that of curvature and gradient noise where it is known."""
    limits = [
        (reading.info.lr or 0.0) / reading.value
        for reading in curvature_readings(history, NOISE_STABILITY)
        if reading.step == step and usable(reading.value, reading.info.lr or 0.0)
    ]
    return min([limit, *limits])


def _enough(readings: Sequence[CurvatureReading]) -> bool:
    """One reading of SGD, whose loss confirms it; the preconditioner of Adam is itself noisy."""
    if readings[0].info.optimizer == "SGD":
        return True
    return _beyond(spaced(readings, READINGS))


def _beyond(readings: Sequence[CurvatureReading]) -> bool:
    return bool(readings) and all(reading.value >= EDGE for reading in readings)


def loss_in_words(course: LossCourse) -> str:
    """How a loss that is above the first one is spoken of.

    Args:
        course: of the newest steps.

    Returns:
        The words.
    """
    if course.blown_up:
        return "the loss is not finite any more"
    return (
        f"the loss is higher than at the start ({number(course.newer)} against "
        f"{number(course.first)}) and does not fall"
    )


def _recommend(
    history: History, proposed: float, reason: str, severity: Severity
) -> Recommendation | None:
    now = history[-1].info
    lr = now.lr or 0.0
    if proposed >= lr or not differs(lr, proposed):
        return None
    return Recommendation(
        knob="learning_rate",
        current=lr,
        proposed=proposed,
        unit="P²/L" if now.optimizer == "SGD" else "P",
        severity=severity,
        reason=reason,
        expected="the loss falls; stability_ratio below 1 at the same curvature, which usually "
        "rises back to 1 in time",
        evidence=evidence(history),
        source=SOURCE,
    )

"""Curvature that leaves room for a larger learning rate, and gradients that are not all noise."""

from typing import Final

from gradwatch.records import History, Measurement, Recommendation
from gradwatch.rules.convergence import Convergence, converging
from gradwatch.rules.curvature import (
    ROOM,
    SAFE,
    SOURCE,
    Stability,
    evidence,
    stability,
)
from gradwatch.rules.limits import largest_raise
from gradwatch.rules.loss_course import loss_course
from gradwatch.rules.noise_scale import SIGMAS, warming_up
from gradwatch.rules.recent import differs, known, newest_value, same_steps
from gradwatch.table import number
from gradwatch.theory.break_even import same_gradient

READINGS: Final = 5
LARGEST_STALL: Final = 0.1
"""Stall ratio below which noise does not limit the learning rate."""
AT_A_TIME: Final = 2.0
"""Factor of a proposal: the curvature follows the learning rate."""


def headroom(history: History) -> Recommendation | None:
    """Doubles the learning rate where neither curvature nor noise limits it.

    r < 0.3 in five readings, a loss that neither rises nor jumps over them, and a stall ratio
    significantly below 0.1. The proposal is also at most 0.8 of every limit of the curvature that
    is known.

    Args:
        history: the reports so far.

    Returns:
        The recommendation; None as well in the first 2 % of the planned steps, where a schedule
        moves the learning rate or has lowered it, where nobody saw whether gradients were
        clipped or whether they are those of the loss that is measured (`gradient_scale`), where
        more than half of the bound of `NoiseFloor` is noise, and where the stall ratio is
        not measured, which is so with momentum and for other optimizers than SGD.
    """
    state, stall, now = stability(history), newest_value(history, "stall_ratio"), history[-1].info
    if state is None or stall is None or not state.clipping_is_known or not _is_low(stall):
        return None
    if not same_gradient(known(state.inputs, "gradient_scale")):
        return None
    window, lr = state.window(READINGS), now.lr or 0.0
    low = bool(window) and all(reading.value < ROOM for reading in window)
    if not low or warming_up(now, history.model) or not _constant(history, window[-1].step):
        return None
    course, floor = loss_course(history, window[-1].step), converging(history)
    if course is None or not course.smooth or (floor is not None and floor.noisy):
        return None
    proposed = min(AT_A_TIME * lr, largest_raise(history))
    if proposed <= lr or not differs(lr, proposed):
        return None
    return Recommendation(
        knob="learning_rate",
        current=lr,
        proposed=proposed,
        unit="P²/L",
        severity="info",
        reason=f"{_room(state, stall, floor)}; raise it in steps, as the curvature follows",
        expected="the loss falls faster; stability_ratio rises, so look again after the change",
        evidence=(*evidence(history), *((floor.verdict,) if floor is not None else ())),
        source=f"{SOURCE}; stall ratio derived",
    )


def _room(state: Stability, stall: Measurement, floor: Convergence | None) -> str:
    share = f", {floor.split.noise_share:.0%} of the bound on |grad|² is noise" if floor else ""
    return (
        f"neither curvature nor noise limits the learning rate: {state}, so that the curvature "
        f"allows lr up to about {number(SAFE * state.limit)}; stall ratio "
        f"{number(stall.value)}{share}"
    )


def _is_low(stall: Measurement) -> bool:
    error = stall.standard_error
    return error is not None and stall.value + SIGMAS * error < LARGEST_STALL and error >= 0


def _constant(history: History, since: int) -> bool:
    """Whether the learning rate is the largest one so far, and the same since a step."""
    now = history[-1].info
    steps = [step for report in history for step in report.steps]
    highest = max((step.lr or 0.0 for step in steps), default=0.0)
    same = all(same_steps(step, now) for step in steps if step.step >= since)
    return same and (now.lr or 0.0) >= highest

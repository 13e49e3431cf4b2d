"""Training that stalls: a step adds as much loss as it removes."""

from typing import Final

from gradwatch.records import MODEL, History, Measurement, Recommendation
from gradwatch.rules.convergence import FALLING
from gradwatch.rules.noise_scale import SIGMAS, NoiseScale
from gradwatch.rules.recent import known, newest_value, same_steps, usable
from gradwatch.table import number

METRIC: Final = "stall_ratio"
READINGS: Final = 3
APART: Final = 100
"""Steps between two readings: each is a mean over a window, and neighbours share most of it."""
FACTOR: Final = 0.3


def stalled(history: History, scale: NoiseScale | None) -> Recommendation | None:
    """Cuts the learning rate where a step adds as much loss as it removes, and the loss is flat.

    Silent with momentum: the stall ratio is about the step of plain SGD.

    Args:
        history: the reports so far.
        scale: the noise scale.

    Returns:
        The recommendation, None if the training is not known to stall.
    """
    now, window = history[-1].info, newest_value(history, "stationarity_recent")
    lr = now.lr or 0.0
    plain = now.optimizer == "SGD" and not now.momentum
    if scale is None or not scale.lr_is_step_size or not plain or not usable(lr):
        return None
    trend = known(window.inputs, "loss_trend") if window else FALLING
    readings = _spaced_readings(history)
    if not trend > FALLING or not readings or not all(map(adds_loss, readings)):
        return None
    values = ", ".join(number(item.value) for item in readings)
    return Recommendation(
        knob="learning_rate",
        current=lr,
        proposed=FACTOR * lr,
        unit="P²/L",
        severity="advice",
        reason=(
            f"a step adds as much loss as it removes (stall ratio {values}) and the loss is flat "
            f"(trend {number(trend)} standard errors); lr x {FACTOR}, or batch size x 3, "
            f"which does the same to lr/batch; {scale}"
        ),
        expected="stall_ratio below 1, and the loss falls again",
        source="derived from a quadratic model of the loss; heuristic factor",
    )


def has_stalled(history: History) -> bool:
    """Whether a step was known to add more loss than it removed, at any time.

    Args:
        history: the reports so far.

    Returns:
        True if any reading says so.
    """
    return any(
        item.metric == METRIC and item.scope == MODEL and adds_loss(item)
        for report in history
        for item in report.measurements
    )


def adds_loss(reading: Measurement) -> bool:
    """Whether a stall ratio is significantly above 1.

    Args:
        reading: of the stall ratio.

    Returns:
        True if it is; False if its standard error is unknown.
    """
    error = reading.standard_error
    return error is not None and reading.value - SIGMAS * error > 1


def _spaced_readings(history: History) -> list[Measurement]:
    """The newest three far enough apart, if all are of the settings of now; else none."""
    newest = newest_value(history, METRIC)
    found = [] if newest is None else [newest]
    for report in history[:][::-1]:
        if not found or not same_steps(report.info, history[-1].info):
            return []
        for item in reversed(report.measurements):
            if (item.metric, item.scope) == (METRIC, MODEL) and item.step + APART <= found[-1].step:
                found.append(item)
                if len(found) == READINGS:
                    return found
    return []

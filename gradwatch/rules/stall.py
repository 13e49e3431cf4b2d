"""Training that stalls: a step adds as much loss as it removes."""

from typing import Final

from gradwatch.records import MODEL, History, Measurement, Recommendation
from gradwatch.rules.convergence import FALLING
from gradwatch.rules.noise_scale import NoiseScale
from gradwatch.rules.recent import known, newest_value, same_steps, usable
from gradwatch.table import number

READINGS: Final = 3
FACTOR: Final = 0.3


def stalled(history: History, scale: NoiseScale | None) -> Recommendation | None:
    """Cuts the learning rate where a step adds as much loss as it removes, and the loss is flat.

    Args:
        history: the reports so far.
        scale: the noise scale.

    Returns:
        The recommendation, None if the training is not known to stall.
    """
    now, window = history[-1].info, newest_value(history, "stationarity_recent")
    lr = now.lr or 0.0
    if scale is None or not scale.lr_is_step_size or now.optimizer != "SGD" or not usable(lr):
        return None
    trend = known(window.inputs, "loss_trend") if window else FALLING
    readings = _stall_readings(history)
    if not trend > FALLING or not all(item.value >= 1 for item in readings) or not readings:
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


def _stall_readings(history: History) -> list[Measurement]:
    """The newest three, if all were taken with the settings of now; else none."""
    now = history[-1].info
    found: list[Measurement] = []
    for report in history[:][::-1]:
        if not same_steps(report.info, now):
            break
        found += [
            item
            for item in reversed(report.measurements)
            if item.metric == "stall_ratio" and item.scope == MODEL
        ]
        if len(found) >= READINGS:
            return found[:READINGS]
    return []

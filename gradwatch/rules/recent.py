"""What rules look up in the newest reports."""

import math
from collections.abc import Mapping
from statistics import median_high
from typing import Final

from gradwatch.records import MODEL, History, Measurement, StepInfo, Verdict

LOOK_BACK: Final = 20
"""Reports that a value may be old: what needs a probe is not measured for each report."""
SMALLEST_CHANGE: Final = 0.05
"""Of a setting, relative; less is not worth the user's time."""

_STEPS: Final = 21


def newest_verdict(history: History, bound: str) -> Verdict | None:
    """The newest verdict of a bound on the whole model, if the settings are still the same.

    Args:
        history: the reports so far.
        bound: name of the bound.

    Returns:
        The verdict; None if there is none in the newest reports, or if it was given at another
        learning rate, momentum or optimizer.
    """
    now = history[-1].info
    for report in history[-LOOK_BACK:][::-1]:
        for verdict in reversed(report.verdicts):
            if verdict.bound == bound and verdict.measurement.scope == MODEL:
                return verdict if same_steps(report.info, now) else None
    return None


def newest_value(history: History, metric: str) -> Measurement | None:
    """The newest value of a metric of the whole model.

    Args:
        history: the reports so far.
        metric: its name.

    Returns:
        The measurement, None if there is none in the newest reports.
    """
    for report in history[-LOOK_BACK:][::-1]:
        for item in reversed(report.measurements):
            if item.metric == metric and item.scope == MODEL:
                return item
    return None


def usual_batch_size(history: History) -> int | None:
    """The batch size of now, whatever the odd one at the end of an epoch.

    Args:
        history: the reports so far.

    Returns:
        The median of the newest 21 that are known [sample]; None if none is.
    """
    newest = history[-LOOK_BACK:]
    sizes = [step.batch_size for report in newest for step in report.steps if step.batch_size]
    return median_high(sizes[-_STEPS:]) if sizes else None


def same_steps(one: StepInfo, other: StepInfo) -> bool:
    """Whether two steps were taken with the same optimizer, learning rates and momentum.

    Args:
        one: the settings of a step.
        other: those of another one.

    Returns:
        True if they were.
    """
    return (one.optimizer, one.lrs, one.momentum) == (other.optimizer, other.lrs, other.momentum)


def nearly_same_steps(one: StepInfo, other: StepInfo) -> bool:
    """Whether two steps were taken with the same optimizer and momentum at nearly one rate.

    A schedule that moves slowly leaves the readings of a hundred steps comparable.

    Args:
        one: the settings of a step.
        other: those of another one.

    Returns:
        True if they were, and no learning rate differs by more than 5 %.
    """
    kinds = [
        (step.optimizer, step.momentum, step.dampening, step.nesterov, step.betas, len(step.lrs))
        for step in (one, other)
    ]
    if kinds[0] != kinds[1]:
        return False
    pairs = zip(one.lrs, other.lrs, strict=True)
    return all(math.isclose(here, there, rel_tol=SMALLEST_CHANGE) for here, there in pairs)


def known(inputs: Mapping[str, float], name: str) -> float:
    """An input of a measurement.

    Args:
        inputs: of the measurement.
        name: of the input.

    Returns:
        Its value, NaN if it is missing.
    """
    return inputs.get(name, math.nan)


def usable(*values: float) -> bool:
    """Whether numbers are positive and of a size at which formulas neither over- nor underflow.

    Args:
        values: any numbers.

    Returns:
        True if all are.

    Example:
        >>> usable(0.1, 3.0), usable(0.0), usable(float("nan")), usable(1e-300)
        (True, False, False, False)
    """
    smallest, largest = 1e-30, 1e30
    return all(smallest <= value <= largest for value in values)


def differs(current: float, proposed: float) -> bool:
    """Whether a proposal is worth telling.

    Args:
        current: present setting.
        proposed: recommended setting.

    Returns:
        True if both are usable numbers that differ by more than 5 %.

    Example:
        >>> differs(0.1, 0.05), differs(0.1, 0.101), differs(0.1, 0.0)
        (True, False, False)
    """
    both = usable(current, proposed)
    return both and abs(math.log(proposed / current)) > math.log1p(SMALLEST_CHANGE)

"""What rules know of the curvature against the stability threshold, and when they must not speak.

Below, r is the stability ratio: the sharpness over the threshold of the running optimizer, which
for Adam and RMSprop are those of the preconditioned Hessian.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Final

from gradwatch.records import MODEL, History, Measurement, StepInfo, Verdict
from gradwatch.rules.readings import (
    PRECONDITIONED,
    SHARPNESS,
    STABILITY,
    CurvatureReading,
    curvature_readings,
)
from gradwatch.rules.recent import known, nearly_same_steps, newest_value, usable
from gradwatch.table import number
from gradwatch.theory.break_even import another_gradient, settled_step, stands_for_all

EDGE: Final = 1.2
"""r from which a rising loss is an instability; below it, hovering about 1 is usual."""
ROOM: Final = 0.3
"""r below which the curvature does not limit the learning rate."""
SAFE: Final = 0.8
"""r that a proposal aims at."""
LARGEST_ERROR: Final = 0.05
"""Relative standard error above which the sharpness has not converged."""
LARGEST_CLIPPED_SHARE: Final = 0.2
"""Of the newest steps; a clipped step is shorter than the learning rate says."""
APART: Final = 50
"""Steps between two readings that count twice; at the edge of stability, excursions are shorter."""
SOURCE: Final = (
    "stability of the optimizer on a quadratic, derived; for networks Cohen et al. 2021, "
    "arXiv:2103.00065, and 2022, arXiv:2207.14484"
)

_BOUND = "StabilityThreshold"


@dataclass(frozen=True, slots=True)
class Stability:
    """The stability ratio of now, with the readings of the same settings before it.

    Attributes:
        readings: the newest first; at least one.
    """

    readings: tuple[CurvatureReading, ...]

    @property
    def inputs(self) -> Mapping[str, float]:
        """Other numbers of the newest reading."""
        return self.readings[0].measurement.inputs

    @property
    def ratio(self) -> float:
        """The newest r [1]."""
        return self.readings[0].value

    @property
    def limit(self) -> float:
        """Largest learning rate that is stable at this curvature [P²/L, Adam: P]."""
        return (self.readings[0].info.lr or 0.0) / self.ratio

    @property
    def clipping_is_known(self) -> bool:
        """The learning rate is known to be the size of a step in most steps."""
        return known(self.inputs, "clipped_share") <= LARGEST_CLIPPED_SHARE

    def window(self, count: int) -> Sequence[CurvatureReading]:
        """The newest readings, back to where `count` are at least 50 steps apart.

        Args:
            count: how many.

        Returns:
            All readings in between, the newest first; none if there are not that many.
        """
        if not known(self.inputs, "readings") >= count:
            return ()
        return spaced(self.readings, count)

    def __str__(self) -> str:
        preconditioned = known(self.inputs, "preconditioned") == 1
        name = "preconditioned sharpness" if preconditioned else "sharpness"
        return (
            f"{name} {number(known(self.inputs, 'sharpness'))} = {number(self.ratio)} of the "
            f"stability threshold {number(known(self.inputs, 'threshold'))}, at step "
            f"{self.readings[0].step}"
        )


def stability(history: History) -> Stability | None:
    """The stability ratio, unless a rule has to be silent on it.

    Args:
        history: the reports so far.

    Returns:
        The newest ratio; None if there is none (no probe, or an optimizer without a threshold), if
        the sharpness is not positive or its relative error above 5 %, if the settings have
        changed since, if groups have different learning rates, if more than 20 % of the steps are
        clipped, if the steps follow another gradient than that of the loss that is measured, or in
        the first steps of Adam.
    """
    readings = curvature_readings(history, STABILITY)
    if not readings or not applies(readings[-1].measurement.inputs):
        return None
    inputs, lasting = readings[-1].measurement.inputs, steady(history, STABILITY)
    converged = abs(known(inputs, "relative_error")) <= LARGEST_ERROR
    numbers = (known(inputs, name) for name in ("sharpness", "threshold"))
    if not converged or not usable(*numbers) or not lasting or lasting[0] is not readings[-1]:
        return None
    return Stability(lasting)


def applies(inputs: Mapping[str, float]) -> bool:
    """Whether one learning rate is the size of the steps, as far as is known.

    Args:
        inputs: of a stability ratio.

    Returns:
        False where groups have different learning rates, over 20 % of the steps are clipped, or
        the steps are known to follow another gradient than that of the loss that is measured.
    """
    clipped = known(inputs, "clipped_share") > LARGEST_CLIPPED_SHARE
    other = another_gradient(known(inputs, "gradient_scale"))
    return known(inputs, "groups_differ") == 0 and not clipped and not other


def of_all(inputs: Mapping[str, float], history: History) -> bool:
    """Whether a curvature is about that of all data and not that of few examples, which is larger.

    Args:
        inputs: of a ratio of the curvature.
        history: the reports so far.

    Returns:
        True from 128 examples on, for all examples, and if their number is unknown.
    """
    return stands_for_all(known(inputs, "examples"), history.model.train_size)


def steady(history: History, metric: str) -> tuple[CurvatureReading, ...]:
    """The readings at the settings of now that can be relied on.

    Args:
        history: the reports so far.
        metric: `stability_ratio` or `noise_stability_ratio`.

    Returns:
        The newest first; without those whose sharpness has not converged or is not positive, and
        those of the first steps of Adam.
    """
    now, failed = history[-1].info, _failed_steps(history)
    of_now = takewhile(
        lambda reading: nearly_same_steps(reading.info, now),
        reversed(curvature_readings(history, metric)),
    )
    return tuple(
        reading
        for reading in of_now
        if usable(reading.value, reading.info.lr or 0.0)
        and reading.step not in failed
        and _settled(reading.info)
    )


def spaced(readings: Sequence[CurvatureReading], count: int) -> Sequence[CurvatureReading]:
    """The first readings, up to where `count` are at least 50 steps apart.

    Args:
        readings: the newest first.
        count: how many.

    Returns:
        All of them in between; none if there are not that many.
    """
    found, last = 0, math.inf
    for place, reading in enumerate(readings):
        if reading.step + APART <= last:
            found, last = found + 1, reading.step
            if found == count:
                return readings[: place + 1]
    return ()


def evidence(history: History) -> tuple[Verdict, ...]:
    """The newest decided verdict on the stability threshold.

    Args:
        history: the reports so far.

    Returns:
        One verdict or none.
    """
    readings = curvature_readings(history, STABILITY)
    at = readings[-1].step if readings else None
    found = (
        verdict
        for report in history[:][::-1]
        if at is not None and report.step >= at
        for verdict in report.verdicts
        if verdict.bound == _BOUND and verdict.measurement.scope == MODEL
    )
    return tuple(verdict for verdict in found if verdict.status in {"holds", "violated"})[:1]


def reliable(sharpness: Measurement) -> bool:
    """Whether a sharpness is positive and has converged.

    Args:
        sharpness: the largest eigenvalue of a Hessian.

    Returns:
        True if its standard error is known and at most 5 % of it.
    """
    error = sharpness.standard_error
    return (
        usable(sharpness.value)
        and error is not None
        and 0 <= error <= LARGEST_ERROR * sharpness.value
    )


def sound(inputs: Mapping[str, float], history: History) -> bool:
    """Whether the L behind a measurement of the stationarity may be spoken of.

    Args:
        inputs: of that measurement.
        history: the reports so far.

    Returns:
        False if L is a sharpness of which the newest reading has not converged or is not positive;
        True for an L from secants.
    """
    if known(inputs, "smoothness_is_secant") != 0:
        return True
    sharpness = newest_value(history, SHARPNESS)
    return sharpness is None or reliable(sharpness)


def _failed_steps(history: History) -> frozenset[int]:
    """Steps at which a sharpness was measured that cannot be relied on."""
    newest = curvature_readings(history, STABILITY)
    preconditioned = bool(newest) and known(newest[-1].measurement.inputs, "preconditioned") == 1
    metric = PRECONDITIONED if preconditioned else SHARPNESS
    readings = curvature_readings(history, metric)
    return frozenset(item.step for item in readings if not reliable(item.measurement))


def _settled(info: StepInfo) -> bool:
    """Whether the preconditioner, if there is one, is more than that of the first gradients."""
    return info.step >= settled_step(info.optimizer, info.betas)

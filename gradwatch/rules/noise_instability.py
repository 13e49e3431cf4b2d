"""Training that gradient noise makes unstable, below the threshold of the curvature alone."""

import math
from dataclasses import dataclass
from typing import Final, Literal

from gradwatch.records import History, Measurement, Recommendation
from gradwatch.rules.curvature import EDGE, SAFE, applies, of_all, spaced, stability, steady
from gradwatch.rules.instability import (
    PATIENCE,
    READINGS,
    RECENT_LOSSES,
    back_where_it_began,
    loss_in_words,
    unstable,
)
from gradwatch.rules.loss_course import RISE, LossCourse, early_loss, loss_course
from gradwatch.rules.readings import (
    NOISE_STABILITY,
    STABILITY,
    CurvatureReading,
    curvature_readings,
)
from gradwatch.rules.recent import differs, known, usable, usual_batch_size
from gradwatch.table import number

VARIANCE_ERROR: Final = 0.2
"""Relative standard error of a running mean of the variance where nothing better is known; that of
one estimate is 0.3."""
LARGE_MOMENTUM: Final = 0.5
"""Momentum from which it is what makes the noise harmful: from 3 times on."""
LEAST_MOMENTUM: Final = 0.1
_SIGMAS: Final = 2.0
_SOURCE = (
    "mean-square stability along the top eigenvector: Jastrzebski et al. 2020, arXiv:2002.09572, "
    "after Wu et al. 2018; limits derived"
)

Remedy = Literal["momentum", "batch_size", "learning_rate"]


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseInstability:
    """A run of SGD beyond `2 (1+b) l/(l² + k s² (1+b)/(1-b))` whose loss rises.

    `l` is the sharpness, `s²` its variance over the examples, `b` the momentum, k = 1/S for few of
    the data and 0 for all of them.

    Attributes:
        measurement: the learning rate over that limit.
        ratio: of the curvature alone, below 1.
        course: of the loss over the readings.
        learning_rate: of now [P²/L].
        momentum: of now.
        batch_size: S [sample].
        train_size: N, None if unknown.
        rise: what the loss did, in words.
    """

    measurement: Measurement
    ratio: float
    course: LossCourse
    learning_rate: float
    momentum: float
    batch_size: float
    train_size: int | None
    rise: str = ""

    @property
    def remedy(self) -> Remedy:
        """The one knob to turn: a large momentum, else too small a batch, else the step."""
        if self.momentum >= LARGE_MOMENTUM and self.stable_momentum >= LEAST_MOMENTUM:
            return "momentum"
        return "batch_size" if self.stable_batch_size is not None else "learning_rate"

    @property
    def stable_learning_rate(self) -> float:
        """0.8 of the limit [P²/L]."""
        return SAFE * self.learning_rate / self.measurement.value

    @property
    def stable_batch_size(self) -> float | None:
        """The smallest stable batch and a quarter more [sample]; None if there is none.

        Nor is one of half of the data or more recommended.
        """
        smallest = known(self.measurement.inputs, "batch_size_limit")
        if not usable(smallest):
            return None
        size = float(math.ceil(smallest / SAFE))
        fits = self.train_size is None or size * 2 < self.train_size
        larger = size > self.batch_size and differs(self.batch_size, size)
        return size if fits and larger else None

    @property
    def stable_momentum(self) -> float:
        """Largest momentum at which the same learning rate is at 0.8 of the limit; NaN if none.

        With a the ratio of the curvature and c that of the noise, both without momentum, it is the
        larger root of `a/(1+b) + c/(1-b) = 0.8`.
        """
        curvature = self.ratio * (1.0 + self.momentum)
        noise = (self.measurement.value - self.ratio) * (1.0 - self.momentum)
        middle, end = noise - curvature, curvature + noise - SAFE
        inside = middle * middle - 4.0 * SAFE * end
        if inside < 0:
            return math.nan
        root = (math.sqrt(inside) - middle) / (2.0 * SAFE)
        return root if 0 <= root < self.momentum else math.nan

    def recommend(self) -> Recommendation:
        """What to do about it, with the alternatives."""
        knob, batch_size = self.remedy, self.stable_batch_size
        now = {
            "momentum": (self.momentum, self.stable_momentum, "1"),
            "batch_size": (self.batch_size, batch_size, "sample"),
            "learning_rate": (self.learning_rate, self.stable_learning_rate, "P²/L"),
        }
        current, proposed, unit = now[knob]
        others = [
            f"{name.replace('_', ' ')} {number(value)}"
            for name, (_, value, _) in now.items()
            if name != knob and value is not None and value > 0
            and (name != "momentum" or self.momentum >= LARGE_MOMENTUM)
        ]  # fmt: skip
        return Recommendation(
            knob=knob,
            current=current,
            proposed=proposed,
            unit=unit,
            severity="warning" if self.course.above_first else "advice",
            reason=f"{self}; instead of that, " + " or ".join(others) if others else str(self),
            expected="the loss falls; noise_stability_ratio about 0.8",
            source=_SOURCE,
        )

    def __str__(self) -> str:
        inputs, course = self.measurement.inputs, self.course
        momentum = f"; momentum {number(self.momentum)} multiplies the noise by {_gain(self)}"
        return (
            f"{self.rise or _rise(course)} and the instability is caused by gradient noise: lr "
            f"{number(self.learning_rate)} is {number(self.measurement.value)} of the limit at "
            f"batch {number(self.batch_size)}, {number(self.ratio)} without noise (sharpness "
            f"{number(known(inputs, 'sharpness'))}, its variance over examples "
            f"{number(known(inputs, 'sharpness_variance'))}, which is rough"
            f"{momentum if self.momentum else ''}); this takes for granted that the examples have "
            "a minimum in common, and one direction is by far the sharpest"
        )


def noise_unstable(history: History) -> NoiseInstability | None:
    """A run that is unstable because of gradient noise, at r below 1.

    Args:
        history: the reports so far.

    Returns:
        The state; None unless the ratio was 1.2 or more in three readings, is above 1 for certain
        and of 128 examples at least, and the smoothed loss rose by more than 5 % over them: without
        a minimum in common the noise adds a stationary variance and no instability, so that a loss
        that is flat proves nothing. None as well where `gradwatch.rules.curvature.stability` is.

        Or else one earlier reading was like that and the run has failed since: after 100 steps the
        loss is above that of the beginning, or it is not finite, or it is back where it began and
        the curvature is gone. Weights that are far off have any curvature and a noise of any kind,
        so that what counts is the first such reading.
    """
    if unstable(history) is not None:
        return None
    return _rising(history) or _diverged(history)


def _rising(history: History) -> NoiseInstability | None:
    state, batch_size = stability(history), usual_batch_size(history)
    readings = steady(history, NOISE_STABILITY)
    if state is None or state.ratio >= 1 or not readings:
        return None
    newest, now = readings[0], history[-1].info
    if now.optimizer != "SGD" or newest is not curvature_readings(history, NOISE_STABILITY)[-1]:
        return None
    window = spaced(readings, READINGS)
    above = bool(window) and all(reading.value >= EDGE for reading in window)
    inputs = newest.measurement.inputs
    above = above and of_all(inputs, history)
    size, momentum = known(inputs, "batch_size"), now.momentum or 0.0
    if not above or size != batch_size or not 0 <= momentum < 1:
        return None
    course = loss_course(history, window[-1].step)
    if not known(inputs, "readings") >= READINGS or course is None or not course.rising:
        return None
    # Of a run that is lost the question is only why, and the curvature alone is no reason.
    if not _certain(newest.measurement, state.ratio, 1.0 if course.lost else _SIGMAS):
        return None
    return NoiseInstability(
        measurement=newest.measurement,
        ratio=state.ratio,
        course=course,
        learning_rate=now.lr or 0.0,
        momentum=momentum,
        batch_size=size,
        train_size=history.model.train_size,
    )


def _diverged(history: History) -> NoiseInstability | None:
    now, found = history[-1].info, curvature_readings(history, STABILITY)
    if now.optimizer != "SGD" or not found or not applies(found[-1].measurement.inputs):
        return None
    of_curvature = {reading.step: reading.measurement for reading in found}
    batch_size = usual_batch_size(history)
    for reading in reversed(steady(history, NOISE_STABILITY)):
        curvature = of_curvature.get(reading.step)
        if curvature is not None and _was_beyond(reading, curvature, batch_size, history):
            return _failed(history, reading, curvature.value)
    return None


def _was_beyond(
    reading: CurvatureReading, curvature: Measurement, batch_size: int | None, history: History
) -> bool:
    """By the noise and for certain, with the batches of now."""
    inputs = reading.measurement.inputs
    by_noise = reading.value >= EDGE and 0 < curvature.value < 1
    sure = by_noise and _certain(reading.measurement, curvature.value, _SIGMAS)
    usual = known(inputs, "batch_size") == batch_size
    return sure and usual and of_all(inputs, history) and applies(curvature.inputs)


def _failed(history: History, reading: CurvatureReading, ratio: float) -> NoiseInstability | None:
    course = loss_course(history, reading.step + 1, most=RECENT_LOSSES)
    now, momentum = history[-1].info, history[-1].info.momentum or 0.0
    late = now.step >= reading.step + PATIENCE
    if course is None or not 0 <= momentum < 1 or not (course.blown_up or late):
        return None
    died = back_where_it_began(history, reading.step)
    if not (died or (course.above_first and _is_above_the_beginning(course, history))):
        return None
    words = "the loss is back where it began" if died else loss_in_words(course)
    return NoiseInstability(
        measurement=reading.measurement,
        ratio=ratio,
        course=course,
        learning_rate=now.lr or 0.0,
        momentum=momentum,
        batch_size=known(reading.measurement.inputs, "batch_size"),
        train_size=history.model.train_size,
        rise=f"{words}, after step {reading.step},",
    )


def _is_above_the_beginning(course: LossCourse, history: History) -> bool:
    """The first batch alone may have had a low loss by chance."""
    beginning = early_loss(history)
    return course.blown_up or course.newer > beginning + RISE * abs(beginning)


def _rise(course: LossCourse) -> str:
    if course.blown_up:
        return "the loss is not finite any more"
    return f"the loss rose from {number(course.older)} to {number(course.newer)}"


def _certain(noise_ratio: Measurement, ratio: float, sigmas: float) -> bool:
    """Above 1 even if it is too high by its standard error, whose main part is the variance's."""
    error = noise_ratio.standard_error
    if error is None:
        error = VARIANCE_ERROR * (noise_ratio.value - ratio)
    return noise_ratio.value - sigmas * error > 1


def _gain(state: NoiseInstability) -> str:
    return number((1.0 + state.momentum) / (1.0 - state.momentum))

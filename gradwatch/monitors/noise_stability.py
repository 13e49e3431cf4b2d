"""The learning rate of SGD over its limit of stability under gradient noise, as measured."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from gradwatch.errors import ConfigError
from gradwatch.records import Measurement, StepInfo
from gradwatch.records.judgement import SIGNIFICANCE
from gradwatch.theory.break_even import StabilityShares, smallest_batch_size, stability_shares

UNDER_NOISE: Final = "noise_stability_ratio"
CONVERGED: Final = 0.05
"""Largest relative error of a reading that a statement may rest on."""


@dataclass(frozen=True, slots=True)
class NoiseRatio:
    """A learning rate over its limit.

    Attributes:
        ratio: of the two.
        error: its standard error; inf where it is not known.
        inputs: what it was made of.
    """

    ratio: float
    error: float
    inputs: Mapping[str, float]


def noise_stability(
    step: StepInfo,
    *,
    sharpness: float,
    variance: float,
    batch_size: float,
    train_size: int | None,
    errors: tuple[float, float],
) -> NoiseRatio | None:
    """Compares the learning rate with `stability_shares`, for SGD with heavy ball or without.

    A weight decay adds to the curvature of each example and nothing to its scatter; a dampening
    shortens the steps.

    Args:
        step: the settings.
        sharpness: of the mean loss [L/P²].
        variance: of the curvature over the examples [L²/P⁴]; below 0 counts as 0.
        batch_size: of a usual step; NaN if unknown.
        train_size: number of training examples; None for very many.
        errors: relative ones of sharpness and variance.

    Returns:
        The ratio; None for other optimizers, for one that maximises and for Nesterov's momentum,
        where the limit is not known, and without a batch size or a positive curvature.
    """
    momentum = step.momentum or 0.0
    if step.optimizer != "SGD" or step.maximize or (step.nesterov and momentum):
        return None
    # Without momentum torch's SGD leaves the dampening out of account.
    rate = step.lrs[0] * (1.0 - ((step.dampening or 0.0) if momentum else 0.0))
    curvature, scatter = sharpness + (step.weight_decay or 0.0), max(0.0, variance)
    examples = float(train_size or math.inf)
    drawn = min(batch_size, examples)
    try:
        shares = stability_shares(rate, curvature, scatter, drawn, examples, momentum)
        smallest = smallest_batch_size(rate, curvature, scatter, examples, momentum)
    except (ConfigError, ArithmeticError):
        return None
    if not 0.0 < shares.ratio < math.inf:
        return None
    error = _error(shares, *errors)
    inputs = {
        "sharpness": sharpness,
        "sharpness_variance": variance,
        "batch_size": batch_size,
        "train_size": math.nan if train_size is None else float(train_size),
        "learning_rate": step.lrs[0],
        "learning_rate_limit": step.lrs[0] / shares.ratio,
        "batch_size_limit": _rounded_up(smallest),
        "momentum": momentum,
        "relative_error": error / shares.ratio,
    }
    return NoiseRatio(shares.ratio, error, inputs)


def relative_error(reading: Measurement) -> float:
    """The standard error over the size of the value.

    Args:
        reading: of anything.

    Returns:
        The quotient; inf where the error is not known or the value is 0.
    """
    error = reading.standard_error
    if error is None or not error >= 0 or not reading.value:
        return math.inf
    return error / abs(reading.value)


def is_beyond(reading: Measurement) -> bool:
    """Whether a ratio is at its limit to 5 %, or beyond it for certain.

    Args:
        reading: of the ratio.

    Returns:
        False if its error is not known.
    """
    value, error = reading.value, reading.standard_error
    if error is None or not value >= 1.0:
        return False
    return error <= CONVERGED * value or value - SIGNIFICANCE * error >= 1.0


def _error(shares: StabilityShares, curvature: float, variance: float) -> float:
    """To first order; a larger curvature adds to one share and takes off the other one."""
    if math.isinf(curvature) or math.isinf(variance):
        return math.inf
    change = (shares.curvature - shares.noise) * curvature
    return math.hypot(change, shares.noise * variance)


def _rounded_up(batch_size: float) -> float:
    """NaN where no batch is large enough; not one more for an error of rounding."""
    return float(math.ceil(batch_size * (1.0 - 1e-9))) if math.isfinite(batch_size) else math.nan

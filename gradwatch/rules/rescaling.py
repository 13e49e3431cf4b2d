"""The learning rate that fits a batch size which was changed during the run."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Final

from gradwatch.records import History, Measurement, ModelInfo, Recommendation, StepInfo
from gradwatch.rules.convergence import was_noisy
from gradwatch.rules.curvature import reliable
from gradwatch.rules.limits import largest_raise
from gradwatch.rules.noise_scale import NoiseScale
from gradwatch.rules.recent import differs, newest_value, same_steps, usable
from gradwatch.rules.stall import has_stalled
from gradwatch.table import number
from gradwatch.theory.lr_batch_ratio import ratio_law_limit, rescaled_learning_rate

ADAMS: Final = ("Adam", "AdamW")
SETTLED: Final = 10
"""Sampled steps that a batch size must last; the odd batch at the end of an epoch does not."""
SAFETY: Final = 0.9
"""Share of the stability threshold that a proposal may reach."""
_EXACT, _ROUGH = 0.1, 0.5  # tolerances of the ratio law
_SECANT = 0.5  # over L, which secants give roughly
_LARGEST_SHARE_OF_DATA = 0.1


@dataclass(frozen=True, slots=True)
class BatchChange:
    """A batch size that was replaced while the learning rate stayed.

    Attributes:
        before: the last step of the old batch size S.
        since: the first step of the new batch size S'.
        old: S [sample].
        new: S' [sample].
    """

    before: StepInfo
    since: StepInfo
    old: int
    new: int


def batch_change(history: History) -> BatchChange | None:
    """The newest lasting change of the batch size, if the learning rate did not follow.

    Args:
        history: the reports so far.

    Returns:
        The change, None if there was none.
    """
    steps = [step for report in history for step in report.steps if step.batch_size]
    lasting = [step for run in _runs(steps) if len(run) > 1 for step in run]
    runs = _runs(lasting)[-2:]
    if min(map(len, runs), default=0) < SETTLED or len(runs) < 2:  # noqa: PLR2004 - old and new
        return None
    before, since, now = runs[0][-1], runs[1][0], runs[1][-1]
    if not (same_steps(before, since) and same_steps(since, now)):
        return None
    return BatchChange(before, since, before.batch_size or 0, since.batch_size or 0)


def _runs(steps: Sequence[StepInfo]) -> list[list[StepInfo]]:
    """The steps, cut where the batch size changes."""
    return [list(run) for _, run in groupby(steps, key=lambda step: step.batch_size)]


def rescaled(history: History, scale: NoiseScale) -> Recommendation | None:
    """Follows a changed batch size with the learning rate: `eta (1 + B_n/S) / (1 + B_n/S')`.

    The factor is linear in S while both batches are far below the noise scale `B_n`, and flat far
    above. For Adam its square root is taken, a heuristic. Where L is known, it is not lowered to
    more than 0.9 of the stability threshold `2 (1 + beta)/L`, nor raised beyond
    `2 (1 + beta) tau/((1 + tau) L)` with tau = 0.5, where the ratio rule ends, or 0.5/L if L is
    from secants. It is not raised beyond 0.8 of a limit of the curvature that is known, which
    serves Adam as well, nor for batches of more than a tenth of the data, and not spoken of
    in a training in which noise is or was most of the bound, or which stalled: there a larger
    batch is a remedy that a larger learning rate would undo.

    Args:
        history: the reports so far.
        scale: the noise scale.

    Returns:
        The recommendation, None if there is nothing to follow.
    """
    change, now = batch_change(history), history[-1].info
    lr, adam = now.lr or 0.0, now.optimizer in ADAMS
    if change is None or not (adam or now.optimizer == "SGD") or not usable(lr):
        return None
    curvature = newest_value(history, "noise_scale_curvature")
    noise = curvature.value if curvature and usable(curvature.value) else scale.value
    wanted = rescaled_learning_rate(lr, change.old, change.new, noise, 0.5 if adam else 1.0)
    raised, smoothness = wanted > lr, None if adam else _smoothness(history)
    proposed = min(wanted, _limit(smoothness, now, raised=raised))
    proposed = min(proposed, largest_raise(history)) if raised else proposed
    if not differs(lr, proposed) or (proposed > lr) != raised:
        return None
    if (raised and _too_much_of_the_data(change, history.model)) or _noise_was_the_trouble(history):
        return None
    caveat = _guard(proposed, smoothness, now) if raised else ""
    return Recommendation(
        knob="learning_rate",
        current=lr,
        proposed=proposed,
        unit="P²/L",
        severity="info",
        reason=(
            f"the batch size went from {change.old} to {change.new} at step {change.since.step} "
            f"and the learning rate stayed; {scale}; lr x ((1 + {number(noise)}/{change.old}) / "
            f"(1 + {number(noise)}/{change.new}))"
            + ("^(1/2), a heuristic for Adam" if adam else caveat)
        ),
        expected="the same progress per sample, as far as the noise scale allows",
        source=(
            "derived from a quadratic model; same form as McCandlish et al. 2018, arXiv:1812.06162"
        ),
    )


def _noise_was_the_trouble(history: History) -> bool:
    return has_stalled(history) or was_noisy(history)


def _too_much_of_the_data(change: BatchChange, model: ModelInfo) -> bool:
    return change.new > _LARGEST_SHARE_OF_DATA * (model.train_size or math.inf)


def _smoothness(history: History) -> Measurement | None:
    """L: the sharpness if it has converged, or else the largest secant; None without both."""
    sharpness = newest_value(history, "sharpness")
    if sharpness is not None and reliable(sharpness):
        return sharpness
    found = newest_value(history, "smoothness")
    return found if found is not None and usable(found.value) else None


def _limit(smoothness: Measurement | None, now: StepInfo, *, raised: bool) -> float:
    """Largest learning rate that may be proposed [P²/L]; inf if L is not known."""
    momentum = now.momentum or 0.0
    if smoothness is None or not 0 <= momentum < 1:
        return math.inf
    product = ratio_law_limit(momentum, _ROUGH) if raised else SAFETY * 2.0 * (1.0 + momentum)
    if smoothness.metric == "smoothness":
        product = min(product, _SECANT)
    return product / smoothness.value


def _guard(proposed: float, smoothness: Measurement | None, now: StepInfo) -> str:
    """How far a larger learning rate can be trusted to act like the smaller batch did."""
    momentum = now.momentum or 0.0
    if smoothness is None or not 0 <= momentum < 1:
        return "; the curvature is not measured: use warm-up"
    product = proposed * smoothness.value
    shown = f"lr x L would be {number(product)}"
    if product <= ratio_law_limit(momentum, _EXACT):
        return f"; {shown}, where the ratio rule is exact to 10 %"
    return f"; {shown}: expect small deviations from the ratio rule"

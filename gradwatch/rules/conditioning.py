"""Gradients of which one direction has nearly all the variance, at a small learning rate."""

from typing import Final

from gradwatch.records import History, ModelInfo, Recommendation, StepInfo
from gradwatch.rules.convergence import converging
from gradwatch.rules.curvature import evidence, stability
from gradwatch.rules.instability import READINGS
from gradwatch.rules.loss_course import loss_course
from gradwatch.rules.recent import known, newest_value, usable
from gradwatch.rules.stall import has_stalled
from gradwatch.table import number

SMALLEST_RATIO: Final = 3.0
"""tr K over its top eigenvalue, below which one direction has over a third of the variance."""
FAR_BELOW: Final = 0.1
"""r."""
FIRST_EPOCHS: Final = 3.0
FIRST_STEPS: Final = 0.1
"""Share of the planned steps, where the epoch is not known."""
_SOURCE = "conjecture 2 of Jastrzebski et al. 2020, arXiv:2002.09572"


def ill_conditioned(history: History) -> Recommendation | None:
    """Tells of a conjecture: a larger initial learning rate would condition the gradients better.

    tr K/lambda_K < 3, K the covariance of the gradient over examples, and r < 0.1 in three readings
    of the first epochs. Information only, without a number: the conjecture is about trainings
    that reach the edge of stability.

    Args:
        history: the reports so far.

    Returns:
        The recommendation; None where the ratio is not resolved, beyond the first 3 epochs or 10 %
        of the planned steps, and where noise is over half of the bound or a training stalled.
    """
    ratio, state, now = newest_value(history, "covariance_ratio"), stability(history), history[-1]
    if ratio is None or state is None or known(ratio.inputs, "resolved") != 1:
        return None
    window = state.window(READINGS)
    far = bool(window) and all(reading.value < FAR_BELOW for reading in window)
    if not far or not _first_epochs(now.info, history.model):
        return None
    course, floor = loss_course(history, window[-1].step), converging(history)
    rising = course is not None and course.rising
    noisy = (floor is not None and floor.noisy) or has_stalled(history)
    if rising or noisy or not (usable(ratio.value) and ratio.value < SMALLEST_RATIO):
        return None
    return Recommendation(
        knob="learning_rate",
        current=now.info.lr,
        unit="P²/L" if now.info.optimizer == "SGD" else "P",
        severity="info",
        reason=(
            f"ill-conditioned early phase: tr K/lambda_K of the gradient's covariance is "
            f"{number(ratio.value)}, with {state}; by a conjecture, a larger initial learning rate "
            "likely improves the conditioning, if it comes near the threshold" + _norms(history)
        ),
        expected="covariance_ratio rises in the first epochs of the next run",
        evidence=evidence(history),
        source=_SOURCE,
    )


def _norms(history: History) -> str:
    if not any("BatchNorm" in layer.kind for layer in history.model.layers):
        return ""
    return "; batch normalisation alone does not make it smooth at a small learning rate"


def _first_epochs(step: StepInfo, model: ModelInfo) -> bool:
    if step.epoch is not None:
        return step.epoch < FIRST_EPOCHS
    if model.train_size and step.batch_size:
        return step.step * step.batch_size < FIRST_EPOCHS * model.train_size
    return step.step < FIRST_STEPS * (model.planned_steps or 0)

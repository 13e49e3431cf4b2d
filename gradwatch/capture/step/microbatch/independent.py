"""The gradient of a step as the sum of independent ones, with the reason where it is not known."""

from typing import TYPE_CHECKING, Final

from gradwatch.capture.step_tensors import StepTensors
from gradwatch.capture.view import IndependentGradients

if TYPE_CHECKING:
    from gradwatch.capture.session import Session

ALONE: Final = "the gradients of the other processes are not told to this one"
ONE_GRADIENT: Final = (
    "the gradient of the step is not an average over several micro-batches or ranks"
)
NOT_RAW: Final = (
    "the gradient of the whole step before clipping is not known: {why}; pass track_clipping=True "
    "to the watch"
)
MAY_BE_CHANGED: Final = "it was or may have been changed after the last backward()"
SOME_WEIGHTS: Final = "the weights of the micro-batches in their average are not known"


def independent_gradients(
    session: "Session", tensors: StepTensors
) -> tuple[IndependentGradients | None, str | None]:
    """The parts of a step's gradient.

    Every rank averages, or has its wrapper average, over R ranks, so that its micro-batch i adds
    `c_i = g_i / R` to the gradient of the step.

    Args:
        session: at the end of the sampled step.
        tensors: what was gathered in it, on this rank or on all.

    Returns:
        The parts and None, or None and the reason; None twice if nobody asked for them.
    """
    tap = session.microbatches
    if not tap.wants_parts:
        return None, None
    weights, squares = tensors.weights, tensors.weight_squares
    reason = _obstacle(session, tensors)
    if reason or tensors.microbatch_squares is None or weights is None or squares is None:
        return None, reason
    whole = tensors.used if tensors.raw is None else tensors.raw
    ranks = tap.expectation.replicas
    found = IndependentGradients(
        total_square=whole.total().square(),
        part_squares=tensors.microbatch_squares / ranks**2,
        share_squares=squares / weights.square(),
        source=_source(ranks, tap.count),
    )
    return found, None


def _obstacle(session: "Session", tensors: StepTensors) -> str | None:
    tap = session.microbatches
    if tap.expectation.alone:
        return ALONE
    if tap.unavailable is not None:
        return tap.unavailable
    if tap.count * tap.expectation.replicas <= 1:
        return ONE_GRADIENT
    if tensors.raw is None and not tap.untouched:
        return NOT_RAW.format(why=session.clipping.hidden or MAY_BE_CHANGED)
    return SOME_WEIGHTS if tensors.weights is None else None


def _source(ranks: int, microbatches: int) -> str:
    named = [(ranks, "ranks"), (microbatches, "micro-batches")]
    return " x ".join(f"{number} {what}" for number, what in named if number > 1)

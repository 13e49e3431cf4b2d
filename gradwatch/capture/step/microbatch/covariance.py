"""The covariance of gradients from the micro-batches of a step, of this process alone."""

from typing import TYPE_CHECKING

from torch import Tensor

from gradwatch.capture.step.microbatch.record import MicrobatchNorms
from gradwatch.capture.step_tensors import StepTensors
from gradwatch.capture.view import MicrobatchCovariance
from gradwatch.numerics.gram import FEWEST, MOST, covariance_estimate

if TYPE_CHECKING:
    from gradwatch.capture.session import Session


def covariance_of(microbatches: MicrobatchNorms | None, samples: int) -> Tensor | None:
    """Estimates it on this rank.

    Args:
        microbatches: of the step, or None if they are not known.
        samples: of the step on this rank, 0 if they are not known.

    Returns:
        (4,) as `covariance_estimate` gives it, or None if nobody asked for it, there are fewer
        than four micro-batches, or their weights or samples are not known.
    """
    if microbatches is None or not samples:
        return None
    rows, weights = microbatches.projections, microbatches.weights
    if rows is None or weights is None or len(rows) < FEWEST:
        return None
    return covariance_estimate(rows, weights, float(samples))


def microbatch_covariance(session: "Session", tensors: StepTensors) -> MicrobatchCovariance | None:
    """What monitors see of it.

    Args:
        session: at the end of the sampled step.
        tensors: what was gathered in it, on this rank or on all.

    Returns:
        The estimate, or None.
    """
    if tensors.covariance is None:
        return None
    tap = session.microbatches
    gradients = min(tap.count, MOST)
    ranks = tap.expectation.replicas
    return MicrobatchCovariance(
        values=tensors.covariance,
        gradients=gradients,
        examples=(session.told.batch_size or session.gate.samples) / gradients,
        source=f"{tap.count} micro-batches" + (f", mean of {ranks} ranks" if ranks > 1 else ""),
    )

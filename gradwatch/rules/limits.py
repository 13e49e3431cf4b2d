"""How far the curvature lets a proposal go."""

import math

from gradwatch.records import History
from gradwatch.rules.curvature import ROOM, SAFE, stability, steady
from gradwatch.rules.readings import NOISE_STABILITY
from gradwatch.rules.recent import newest_value, usable


def near_the_edge(history: History) -> bool:
    """Whether the curvature is known to limit the learning rate.

    Args:
        history: the reports so far.

    Returns:
        True from r = 0.3 on; False if r is not known.
    """
    state = stability(history)
    return state is not None and state.ratio >= ROOM


def largest_raise(history: History) -> float:
    """The learning rate up to which a proposal may raise it, as far as the curvature is known.

    0.8 of the smallest limit: that of r; that of the noise along the top eigenvector; and
    2/(batch sharpness), up to which plain SGD of small batches was seen to go.

    Args:
        history: the reports so far.

    Returns:
        The learning rate [P²/L, Adam: P]; inf if nothing is known.
    """
    now, state = history[-1].info, stability(history)
    limits = [] if state is None else [state.limit]
    limits += [
        (reading.info.lr or 0.0) / reading.value for reading in steady(history, NOISE_STABILITY)[:1]
    ]
    batch = newest_value(history, "batch_sharpness")
    if batch is not None and usable(batch.value) and now.optimizer == "SGD" and not now.momentum:
        limits.append(2.0 / batch.value)
    return SAFE * min(limits, default=math.inf)

"""Batches of which most samples are redundant, and when a smaller one may be recommended."""

from typing import Final

from gradwatch.records import History, Recommendation
from gradwatch.rules.convergence import EDGE_SHARE, FALLING, converging
from gradwatch.rules.headroom import headroom
from gradwatch.rules.instability import unstable
from gradwatch.rules.limits import near_the_edge
from gradwatch.rules.noise_scale import NoiseScale
from gradwatch.rules.recent import differs, known, newest_value
from gradwatch.rules.rescaling import batch_change
from gradwatch.rules.warm_up import warm_up
from gradwatch.theory.lr_batch_ratio import step_efficiency

FAR: Final = 10.0
"""Factor between batch size and noise scale from which one of them is wasted."""
ENOUGH_ESTIMATES: Final = 200
"""The noise scale is smallest at the start, where nothing is decided yet."""
LARGEST_DRIFT: Final = 2.0
"""Factor between the halves of the window within which the noise scale counts as settled."""


def reduced(history: History, scale: NoiseScale | None) -> Recommendation | None:
    """Proposes the noise scale where the batch is above ten times that.

    A smaller batch is more noise, so it is recommended to a training that is known to go well only.

    Args:
        history: the reports so far.
        scale: the noise scale.

    Returns:
        The recommendation; None if the factor ten is not certain, the noise scale rests on fewer
        than 200 readings or drifts, the loss is not known to be below the first one and not to
        rise, a step was beyond 2/L, noise is more than half of the bound, the last stall ratio is
        1 or more, the learning rate has not followed a new batch size yet, the curvature is known
        to be near the stability threshold, or it is the learning rate that is to be changed for it.
    """
    if scale is None or (scale.value + scale.error) * FAR >= scale.batch_size:
        return None
    size = float(max(1, round(scale.value)))
    if size >= scale.batch_size or not differs(scale.batch_size, size):
        return None
    if not (_settled(scale) and _goes_well(history)) or _wants_less_noise(history):
        return None
    if near_the_edge(history) or _learning_rate_comes_first(history):
        return None
    return _recommend(scale, size)


def _settled(scale: NoiseScale) -> bool:
    inputs = scale.measurement.inputs
    drift = known(inputs, "halves_ratio")
    enough = known(inputs, "estimates") >= ENOUGH_ESTIMATES
    return enough and 1.0 / LARGEST_DRIFT <= drift <= LARGEST_DRIFT


def _goes_well(history: History) -> bool:
    """Whether the loss is known to have come down, by steps that are known to be stable."""
    window = newest_value(history, "stationarity_recent")
    if window is None:
        return False
    inputs = window.inputs
    # Secants included: too cautious is right for advice that saves samples and nothing else.
    stable = known(inputs, "beyond_edge") == 0 and not known(inputs, "edge_share") > EDGE_SHARE
    lower = known(inputs, "loss_recent") < known(inputs, "first_loss")
    return stable and lower and known(inputs, "loss_trend") <= -FALLING


def _learning_rate_comes_first(history: History) -> bool:
    """Whether the curvature asks for smaller steps, or leaves room for larger ones."""
    return any(rule(history) is not None for rule in (unstable, warm_up, headroom))


def _wants_less_noise(history: History) -> bool:
    state, stall = converging(history), newest_value(history, "stall_ratio")
    noisy = state is not None and state.noisy
    return noisy or (stall is not None and stall.value >= 1) or batch_change(history) is not None


def _recommend(scale: NoiseScale, size: float) -> Recommendation:
    redundant = step_efficiency(scale.value, scale.batch_size)
    return Recommendation(
        knob="batch_size",
        current=scale.batch_size,
        proposed=size,
        unit="sample",
        severity="info",
        reason=(
            f"{redundant:.0%} of the samples in a batch are redundant, since it is above ten times "
            f"the noise scale ({scale})"
        ),
        expected="fewer samples to the same loss; the noise scale grows in training, so look again",
        source="McCandlish et al. 2018, arXiv:1812.06162; efficiencies derived",
    )

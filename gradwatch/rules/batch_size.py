"""The knob `batch_size`: batches too small for the noise, or larger than they need be."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from typing_extensions import override

from gradwatch.interfaces import Rule
from gradwatch.records import History, Recommendation
from gradwatch.rules.convergence import Convergence, at_the_edge, check_target, converging
from gradwatch.rules.noise_scale import NoiseScale, noise_scale
from gradwatch.rules.recent import differs
from gradwatch.rules.stall import stalled
from gradwatch.table import number
from gradwatch.theory.gradient_convergence import batch_size_for_floor
from gradwatch.theory.lr_batch_ratio import sample_efficiency, step_efficiency

FAR: Final = 10.0
"""Factor between batch size and noise scale from which one of them is wasted."""


@dataclass(frozen=True)
class BatchSize(Rule):
    """Recommends one batch size, by the first of these that applies.

    - The noise floor is what limits the gradient: the batch whose floor is the target,
      `L g sigma²/(eps (2 - L g))`, rounded up.
    - The batch is below a tenth of the noise scale `tr(Sigma)/|G|²`: up to it a larger batch costs
      few extra samples; at the noise scale a sample does half of what it does in a tiny batch.
    - The batch is above ten times the noise scale: 91 % of the samples are redundant. Not said
      while noise limits or stalls the run, or at the edge of stability.

    Silent in the first case where `NoiseFloor` is undecided or violated; in the others where the
    noise scale is not significant, its window too short, its tail heavy, in the warm-up, and when
    gradients are clipped in more than 20 % of the steps. No batch of half of the data or more is
    recommended.

    Args:
        target: wanted mean of `||grad f||²` [L²/P²]; a quarter of what is measured if None.

    Raises:
        ConfigError: if `target` is not a positive number.

    References:
        derived from the descent lemma, as Ghadimi and Lan 2013, SIAM J. Optim. 23; noise scale of
        McCandlish et al. 2018, arXiv:1812.06162.
    """

    target: float | None = None

    def __post_init__(self) -> None:
        check_target(self.target)

    @override
    def advise(self, history: History) -> Iterable[Recommendation]:
        state, scale = converging(history), noise_scale(history)
        noisy = state is not None and state.noise_limited
        unstable = at_the_edge(history) is not None or stalled(history, scale) is not None
        candidates = (
            _for_the_floor(state, self.target, history),
            _enlarged(scale, history),
            None if noisy or unstable else _reduced(scale),
        )
        return [item for item in candidates if item is not None][:1]


def _for_the_floor(
    state: Convergence | None, wanted: float | None, history: History
) -> Recommendation | None:
    target = state.target(wanted) if state is not None else None
    if state is None or target is None or not state.noise_limited:
        return None
    size = batch_size_for_floor(state.smoothness, state.variance, state.step_size, target)
    if size <= state.batch_size or not differs(state.batch_size, size) or _too_large(size, history):
        return None
    return Recommendation(
        knob="batch_size",
        current=state.batch_size,
        proposed=size,
        unit="sample",
        severity="advice" if state.flat else "info",
        reason=(
            f"{state.split.noise_share:.0%} of the bound on |grad|² is noise, so more steps cannot "
            f"help; for |grad|² <= {number(target)} enlarge the batch, or lower the learning rate "
            f"({state})"
        ),
        expected=f"stationarity_recent down to {number(target)} or below",
        evidence=(state.verdict,),
        source=state.verdict.source,
    )


def _enlarged(scale: NoiseScale | None, history: History) -> Recommendation | None:
    if scale is None or scale.value - scale.error <= FAR * scale.batch_size:
        return None
    size = float(round(scale.value))
    if _too_large(size, history):
        size = float((history.model.train_size or 0) // 10)
    if size <= scale.batch_size or not differs(scale.batch_size, size):
        return None
    now = sample_efficiency(scale.value, scale.batch_size)
    then = sample_efficiency(scale.value, size)
    reason = (
        f"the batch is below a tenth of the noise scale: up to about that size a larger one costs "
        f"few extra samples; a sample does {then:.0%} of what it does in a tiny batch, instead of "
        f"{now:.0%} now ({scale})"
    )
    expected = "fewer steps to the same loss; re-tune the learning rate after the change"
    return _recommend(scale, size, reason, expected)


def _reduced(scale: NoiseScale | None) -> Recommendation | None:
    if scale is None or (scale.value + scale.error) * FAR >= scale.batch_size:
        return None
    size = float(max(1, round(scale.value)))
    if size >= scale.batch_size or not differs(scale.batch_size, size):
        return None
    redundant = step_efficiency(scale.value, scale.batch_size)
    reason = (
        f"{redundant:.0%} of the samples in a batch are redundant, since it is above ten times "
        f"the noise scale; reduce it, or raise the learning rate if it allows ({scale})"
    )
    expected = "fewer samples to the same loss; the noise scale grows in training, so look again"
    return _recommend(scale, size, reason, expected)


def _recommend(scale: NoiseScale, size: float, reason: str, expected: str) -> Recommendation:
    return Recommendation(
        knob="batch_size",
        current=scale.batch_size,
        proposed=size,
        unit="sample",
        severity="info",
        reason=reason,
        expected=expected,
        source="McCandlish et al. 2018, arXiv:1812.06162; efficiencies derived",
    )


def _too_large(size: float, history: History) -> bool:
    train_size = history.model.train_size
    return train_size is not None and size * 2 >= train_size

"""The knob `batch_size`: batches too small for the noise, or larger than they need be."""

from collections.abc import Iterable
from dataclasses import dataclass

from typing_extensions import override

from gradwatch.interfaces import Rule
from gradwatch.records import History, Recommendation
from gradwatch.rules.convergence import Convergence, check_target, converging, floor_at
from gradwatch.rules.limits import near_the_edge
from gradwatch.rules.noise_instability import noise_unstable
from gradwatch.rules.noise_scale import NoiseScale, noise_scale
from gradwatch.rules.recent import differs
from gradwatch.rules.redundancy import FAR, reduced
from gradwatch.table import number
from gradwatch.theory.gradient_convergence import batch_size_for_floor
from gradwatch.theory.lr_batch_ratio import sample_efficiency


@dataclass(frozen=True)
class BatchSize(Rule):
    """Recommends one batch size, by the first of these that applies.

    - The loss rose, and gradient noise makes a training of little momentum unstable although the
      curvature alone would not: the smallest stable batch and a quarter more. See `Momentum`, which
      has the rest of such trainings; nothing else is said of the batch while one of them speaks.
    - The loss is flat, or a target is given, and the noise floor is what limits the gradient: the
      batch whose floor is the target, `L g sigma²/(eps (2 - L g))`, rounded up.
    - The batch is below a tenth of the noise scale `tr(Sigma)/|G|²`: at the noise scale the same
      progress takes twice the samples of a tiny batch; fewer steps only if the learning rate is
      re-tuned. Silent where the curvature is known to leave no room for that.
    - The batch is above ten times the noise scale: 91 % of the samples are redundant. Said only of
      a training that is known to go well, see `gradwatch.rules.redundancy`.

    Silent in the second case where `NoiseFloor` is undecided or violated; in the others where the
    noise scale is not significant, its window too short, its tail heavy, it comes from the state
    of Adam, in the warm-up, and when gradients are clipped in more than 20 % of the steps. No
    batch of half of the data or more is recommended.

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
        noisy = noise_unstable(history)
        if noisy is not None:
            return [noisy.recommend()] if noisy.remedy == "batch_size" else []
        state, scale = converging(history), noise_scale(history)
        candidates = (
            _for_the_floor(state, self.target, history),
            None if near_the_edge(history) else _enlarged(scale, history),
            reduced(history, scale),
        )
        return [item for item in candidates if item is not None][:1]


def _for_the_floor(
    state: Convergence | None, wanted: float | None, history: History
) -> Recommendation | None:
    target = state.target(wanted) if state is not None else None
    if state is None or target is None or not state.needs_less_noise(wanted):
        return None
    size = batch_size_for_floor(state.smoothness, state.variance, state.step_size, target)
    if size <= state.batch_size or not differs(state.batch_size, size) or _too_large(size, history):
        return None
    return Recommendation(
        knob="batch_size",
        current=state.batch_size,
        proposed=size,
        unit="sample",
        severity=state.harm,
        reason=(
            f"{state.no_way_down}; for |grad|² <= {number(target)} enlarge the batch, or lower the "
            f"learning rate ({state})"
        ),
        expected=floor_at(target),
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
        f"the batch is below a tenth of the noise scale; at {number(size)} a sample does "
        f"{then:.0%} of what it does in a tiny batch, {now:.0%} now, so the same progress takes "
        f"{number(now / then)} times the samples; it takes fewer steps only if the learning rate "
        f"is re-tuned ({scale})"
    )
    return Recommendation(
        knob="batch_size",
        current=scale.batch_size,
        proposed=size,
        unit="sample",
        severity="info",
        reason=reason,
        expected="fewer steps to the same loss if the learning rate is re-tuned, but more samples",
        source="McCandlish et al. 2018, arXiv:1812.06162; efficiencies derived",
    )


def _too_large(size: float, history: History) -> bool:
    train_size = history.model.train_size
    return train_size is not None and size * 2 >= train_size

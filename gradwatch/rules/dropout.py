"""The knob `dropout`: masks whose noise keeps the gradient up."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from typing_extensions import override

from gradwatch.interfaces import Rule
from gradwatch.records import History, Measurement, Recommendation
from gradwatch.rules.convergence import Convergence, check_target, converging
from gradwatch.rules.recent import differs, known, newest_value, usable
from gradwatch.table import number
from gradwatch.theory.gradient_convergence import keep_rate_for_target

LEAST_MASK_SHARE: Final = 0.3
LARGEST_MOVE: Final = 0.2
"""Of the keep rate, at a time: the law of the masks is of first order."""
_SIGMAS: Final = 2.0


@dataclass(frozen=True)
class Dropout(Rule):
    """Recommends the dropout probability whose noise lets the gradient come down to the target.

    Where the loss is flat, more than half of the bound is noise and significantly more than 0.3 of
    the variance comes from the masks: keep rate `v/(v + M)`,
    `M = B eps (2 - L g)/(L g) - sigma²_data`, moved by at most 0.2. Settings are PyTorch's
    probabilities of dropping, 1 minus the keep rate.

    Silent where `NoiseFloor` is undecided or violated, where the dropout modules have different
    rates, and where the masks alone cannot reach the target. The regularising effect of dropout is
    not modelled.

    Args:
        target: wanted mean of `||grad f||²` [L²/P²]; a quarter of what is measured if None.

    Raises:
        ConfigError: if `target` is not a positive number.

    References:
        derived; that dropout acts on convergence is the subject of Ithapu, Ravi and Singh 2017,
        arXiv:1702.08670.
    """

    target: float | None = None

    def __post_init__(self) -> None:
        check_target(self.target)

    @override
    def advise(self, history: History) -> Iterable[Recommendation]:
        state, share = converging(history), newest_value(history, "dropout_variance_share")
        target = state.target(self.target) if state is not None else None
        if state is None or share is None or target is None:
            return
        keep = known(share.inputs, "keep")
        wanted = _keep_rate(state, share, target)
        if wanted is None or wanted <= keep:
            return
        proposed = 1.0 - min(wanted, keep + LARGEST_MOVE)
        if differs(1.0 - keep, proposed):
            yield _recommend(state, share, proposed, wanted, target)


def _keep_rate(state: Convergence, share: Measurement, target: float) -> float | None:
    """The keep rate that meets the target, if the masks are what to turn."""
    inputs = share.inputs
    law, data, keep = (known(inputs, name) for name in ("law", "data_variance", "keep"))
    masks = share.value - _SIGMAS * (share.standard_error or 0.0) > LEAST_MASK_SHARE
    if not (masks and state.noisy and state.flat and known(inputs, "rates") == 1 and 0 < keep < 1):
        return None
    if not (usable(law) and (data == 0 or usable(data))):
        return None
    return keep_rate_for_target(
        law, data, state.smoothness, state.batch_size, state.step_size, target
    )


def _recommend(
    state: Convergence, share: Measurement, proposed: float, wanted: float, target: float
) -> Recommendation:
    law, data, keep = (known(share.inputs, name) for name in ("law", "data_variance", "keep"))
    capped = f"; the move is capped at {LARGEST_MOVE:g}" if wanted > keep + LARGEST_MOVE else ""
    return Recommendation(
        knob="dropout",
        current=1.0 - keep,
        proposed=proposed,
        unit="probability",
        severity="info",
        reason=(
            f"{share.value:.0%} of the gradient's variance comes from the dropout masks; at the "
            f"present L and sigma², |grad|² <= {number(target)} needs a keep rate "
            f"of {number(wanted)}{capped} (v = {number(law)}, variance of the data {number(data)}; "
            f"{state}); the regularising effect of dropout is not modelled"
        ),
        expected="noise_floor falls; a smaller gradient need not mean a lower loss, so watch the "
        "validation loss",
        evidence=(state.verdict,),
        source="derived; Ithapu, Ravi & Singh 2017, arXiv:1702.08670 (subject)",
    )

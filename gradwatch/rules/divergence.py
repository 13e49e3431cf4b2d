"""Training that diverges: steps beyond 2/L, and a loss above the one at the start."""

from collections.abc import Mapping
from typing import Final

from gradwatch.records import History, Recommendation, StepInfo, Verdict
from gradwatch.rules.convergence import BOUND, FALLING
from gradwatch.rules.curvature import sound, stability
from gradwatch.rules.recent import known, newest_verdict, usable
from gradwatch.table import number

EDGE: Final = 2.0
"""Learning rate times L from which plain SGD on a quadratic diverges."""
MOST: Final = 0.5
"""Share of the newest readings beyond 2/L."""
LARGEST_CLIPPED_SHARE: Final = 0.05
_SAFE = 0.5  # over L, so at most a quarter of a learning rate beyond 2/L


def diverging(history: History) -> Recommendation | None:
    """Lowers the learning rate where the loss is above the first one and `lr L > 2` says why.

    Beyond 2/L plain SGD on a quadratic moves away from the minimum. A secant can be far above the
    curvature of the loss, so that alone would be no alarm; here the loss confirms it. It is for
    runs whose stability ratio is not known; that has the last word, and knows about momentum.

    Args:
        history: the reports so far.

    Returns:
        The recommendation, None if the training is not known to diverge, or not for that reason.
    """
    verdict, now = newest_verdict(history, BOUND), history[-1].info
    if verdict is None or not _plain(verdict.measurement.inputs, now):
        return None
    if stability(history) is not None or not sound(verdict.measurement.inputs, history):
        return None
    inputs, lr = verdict.measurement.inputs, now.lr or 0.0
    smoothness, recent, first = (
        known(inputs, name) for name in ("smoothness", "loss_recent", "first_loss")
    )
    # A window of readings remembers a learning rate that was lowered since.
    beyond = (
        known(inputs, "beyond_edge") > MOST and usable(lr, smoothness) and lr * smoothness > EDGE
    )
    if not (beyond and recent > first and known(inputs, "loss_trend") > FALLING):
        return None
    return _recommend(verdict, lr, _SAFE / smoothness)


def _plain(inputs: Mapping[str, float], step: StepInfo) -> bool:
    """Whether the learning rate is the size of a step, as far as is known."""
    momentum = max(step.momentum or 0.0, inputs.get("momentum", 0.0))
    clipped = known(inputs, "clipped_share") > LARGEST_CLIPPED_SHARE
    one_rate = known(inputs, "groups_differ") == 0
    return step.optimizer == "SGD" and momentum == 0 and one_rate and not clipped


def _recommend(verdict: Verdict, lr: float, proposed: float) -> Recommendation:
    inputs = verdict.measurement.inputs
    secants = known(inputs, "smoothness_is_secant") != 0
    return Recommendation(
        knob="learning_rate",
        current=lr,
        proposed=proposed,
        unit="P²/L",
        severity="warning",
        reason=(
            f"the loss is higher than at the start ({number(known(inputs, 'loss_recent'))} against "
            f"{number(known(inputs, 'first_loss'))}) and does not fall, and lr x L was 2 or more "
            f"in {known(inputs, 'beyond_edge'):.0%} of the newest readings, where steps move away "
            f"from a minimum; L = {number(known(inputs, 'smoothness'))}"
            + (", from secants, which is rough" if secants else "")
            + "; weights that are far off by now need a restart"
        ),
        expected="the loss falls below the first one",
        evidence=(verdict,),
        source="stability of gradient descent on a quadratic; derived",
    )

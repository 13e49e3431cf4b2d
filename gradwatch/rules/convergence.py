"""What rules know of a run's convergence: the numbers behind the newest verdict of `NoiseFloor`."""

import math
from dataclasses import dataclass
from typing import Final

from gradwatch.errors import ConfigError
from gradwatch.records import History, Severity, StepInfo, Verdict
from gradwatch.rules.curvature import sound
from gradwatch.rules.recent import known, newest_verdict, usable
from gradwatch.table import number
from gradwatch.theory.gradient_convergence import Split, stationarity_bound

BOUND: Final = "NoiseFloor"
NOISE_LIMITED: Final = 0.7
"""Share of the noise in the bound above which more steps cannot help."""
NOISY: Final = 0.5
"""Share of the noise in the bound above which nothing that adds noise is recommended."""
STEP_LIMITED: Final = 0.3
"""Share of the noise in the bound below which the steps are what is missing."""
LARGEST_FACTOR: Final = 10.0
"""By which a proposal may raise a setting: the constants change with the way."""
NEAR_FLOOR: Final = 4.0
"""Factor within which a measured value counts as being at the floor."""
FALLING: Final = -2.0
"""Trend of the loss over its standard error, below which it falls."""
EDGE_SHARE: Final = 0.1
"""Share of the steps with lr x L > 1.8 that counts as training at the edge of stability."""
_SHARE_OF_MEASURED: Final = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Convergence:
    """The state of a run of plain SGD at constant settings.

    Attributes:
        verdict: what the numbers were read from.
        measured: mean of `||grad f||²` over the window [L²/P²].
        smoothness: L [L/P²].
        variance: sigma², of the gradient of one sample [L²/P²].
        batch_size: B [sample].
        step_size: g, lr/(1-momentum) [P²/L].
        learning_rate: as the optimizer has it [P²/L].
        momentum: of heavy ball, 0 for plain SGD.
        loss_gap: D, loss at the start above the lowest loss [L].
        steps: N, steps so far.
    """

    verdict: Verdict
    measured: float
    smoothness: float
    variance: float
    batch_size: float
    step_size: float
    learning_rate: float
    momentum: float
    loss_gap: float
    steps: float

    @property
    def split(self) -> Split:
        """The bound by what it is due to."""
        return self.split_after(self.steps)

    @property
    def noisy(self) -> bool:
        """More than half of the bound is noise."""
        return self.split.noise_share > NOISY

    @property
    def noise_limited(self) -> bool:
        """More steps cannot help: the bound is mostly floor, and the measured value is near it."""
        floor = self.split.noise_term
        near = floor <= self.measured * NEAR_FLOOR and self.measured <= floor * NEAR_FLOOR
        return self.split.noise_share > NOISE_LIMITED and near

    def needs_less_noise(self, wanted: float | None) -> bool:
        """Noise-limited, and the loss does not fall any more: this is where the run stays.

        While it falls, the noise mostly falls with it, and the run may come down by itself; whoever
        names a target hears all the same how to get there.

        Args:
            wanted: the target of the user, or None.
        """
        return self.noise_limited and (self.flat or wanted is not None)

    @property
    def harm(self) -> Severity:
        """How much the noise hurts: nothing, as long as the loss falls."""
        return "advice" if self.flat else "info"

    @property
    def edge_share(self) -> float:
        """Share of the newest steps with a step size above 1.8/L; NaN if unknown."""
        return known(self.verdict.measurement.inputs, "edge_share")

    @property
    def from_secants(self) -> bool:
        """L is the largest secant of batches along the steps, or nobody said what it is."""
        return known(self.verdict.measurement.inputs, "smoothness_is_secant") != 0

    @property
    def flat(self) -> bool:
        """The loss is known not to fall any more."""
        return known(self.verdict.measurement.inputs, "loss_trend") > FALLING

    @property
    def caveats(self) -> str:
        """What makes the statements heuristic, as the end of a sentence."""
        momentum = f"; momentum {number(self.momentum)}: step size lr/(1-momentum), a heuristic"
        parts = (momentum if self.momentum else "", "; L from secants, which is rough")
        return "".join(parts if self.from_secants else parts[:1])

    @property
    def no_way_down(self) -> str:
        """What more steps can do for a run at rest, as the start of a sentence."""
        split = self.split
        return (
            f"{split.noise_share:.0%} of the bound on |grad|² is noise: at the present L and "
            f"sigma², more steps cannot bring it below {number(split.noise_term)} (sigma² usually "
            "falls with the loss)"
        )

    def split_after(self, steps: float) -> Split:
        """The bound by what it is due to, after another number of steps.

        Args:
            steps: N, at least 1.

        Returns:
            The two terms [L²/P²].
        """
        return stationarity_bound(
            self.loss_gap, self.smoothness, self.variance, self.batch_size, self.step_size, steps
        )

    def as_learning_rate(self, step_size: float) -> float:
        """The learning rate that the optimizer needs for a step size [P²/L]."""
        return step_size * (self.learning_rate / self.step_size)

    def target(self, wanted: float | None) -> float | None:
        """What `||grad f||²` should come down to [L²/P²].

        Args:
            wanted: by the user; None for a quarter of what is measured.

        Returns:
            The target, None if it is reached already.
        """
        target = self.measured * _SHARE_OF_MEASURED if wanted is None else wanted
        return target if target < self.measured else None

    def __str__(self) -> str:
        split = self.split
        return (
            f"|grad|² = {number(self.measured)}, bound = {number(split.step_term)} from the steps "
            f"+ {number(split.noise_term)} from the noise; L = {number(self.smoothness)}, sigma² = "
            f"{number(self.variance)} a sample, batch {number(self.batch_size)}, lr "
            f"{number(self.learning_rate)}, D = {number(self.loss_gap)}, {number(self.steps)} "
            f"steps{self.caveats}"
        )


def converging(history: History) -> Convergence | None:
    """The state of the run, where `NoiseFloor` holds.

    A violated verdict means that an assumption broke, and then so did every formula that rests
    on it.

    Args:
        history: the reports so far.

    Returns:
        The state; None where the verdict is missing, undecided or violated.
    """
    verdict = newest_verdict(history, BOUND)
    decided = verdict is not None and verdict.status == "holds"
    if verdict is None or not decided or not usable(verdict.measurement.value):
        return None
    if not sound(verdict.measurement.inputs, history):
        return None
    return _read(verdict, history[-1].info)


def was_noisy(history: History) -> bool:
    """Whether more than half of the bound was noise at any time.

    Args:
        history: the reports so far.

    Returns:
        True if any verdict of `NoiseFloor` that held says so.
    """
    seen = (
        _read(verdict, report.info)
        for report in history
        for verdict in report.verdicts
        if verdict.bound == BOUND and verdict.status == "holds"
    )
    return any(state is not None and state.noisy for state in seen)


def at_the_edge(history: History) -> Convergence | None:
    """The state of a run of which more than a tenth of the newest steps are above 1.8/L.

    That is usual and no reason for another learning rate; but the bound is about to lose its
    meaning there, and the number of steps that it asks for with it. The largest secant of small
    batches can be many times the curvature of the loss, and with momentum the edge is elsewhere.

    Args:
        history: the reports so far.

    Returns:
        The state, whose `measured` and `split` may mean nothing; None unless `NoiseFloor` holds,
        or is undecided for nothing but steps beyond 2/L, and None if L is from secants or there
        is momentum.
    """
    verdict = newest_verdict(history, BOUND)
    if verdict is None or not (verdict.status == "holds" or "beyond 2/L" in verdict.because):
        return None
    state = _read(verdict, history[-1].info)
    if state is None or state.from_secants or state.momentum:
        return None
    return state if state.edge_share > EDGE_SHARE else None


def floor_at(target: float) -> str:
    """What to expect of a proposal whose noise floor is the target.

    Args:
        target: the wanted `||grad f||²` [L²/P²].

    Returns:
        The words.
    """
    return (
        f"noise_floor at {number(target)} or below, at the present L and sigma²; a smaller "
        "gradient need not mean a lower loss"
    )


def check_target(target: float | None) -> None:
    """Refuses a target that no gradient can have.

    Args:
        target: wanted `||grad f||²`, or None.

    Raises:
        ConfigError: if it is not a positive number.
    """
    if target is None:
        return
    number_given = isinstance(target, (int, float)) and not isinstance(target, bool)
    if not number_given or not usable(target):
        raise ConfigError(
            "target must be the mean square of the gradient to come down to, a positive number, "
            f"or None for a quarter of what is measured; got {target!r}"
        )


def _read(verdict: Verdict, step: StepInfo) -> Convergence | None:
    inputs, measured = verdict.measurement.inputs, verdict.measurement.value
    needed = ("smoothness", "variance", "batch_size", "step_size", "steps")
    smoothness, variance, batch_size, step_size, steps = (known(inputs, name) for name in needed)
    loss_gap = known(inputs, "first_loss") - known(inputs, "lowest_loss")
    momentum = known(inputs, "momentum")
    momentum = 0.0 if math.isnan(momentum) else momentum
    learning_rate = step.lr or 0.0
    sizes = (smoothness, variance, batch_size, step_size, steps, loss_gap, learning_rate)
    if not usable(*sizes) or min(batch_size, steps) < 1 or not 0 <= momentum < 1:
        return None
    return Convergence(
        verdict=verdict,
        measured=measured,
        smoothness=smoothness,
        variance=variance,
        batch_size=batch_size,
        step_size=step_size,
        learning_rate=learning_rate,
        momentum=momentum,
        loss_gap=loss_gap,
        steps=steps,
    )

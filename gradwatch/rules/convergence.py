"""What rules know of a run's convergence: the numbers behind the newest verdict of `NoiseFloor`."""

from dataclasses import dataclass
from typing import Final

from gradwatch.errors import ConfigError
from gradwatch.records import History, Verdict
from gradwatch.rules.recent import known, newest_verdict, usable
from gradwatch.table import number
from gradwatch.theory.gradient_convergence import Split, stationarity_bound

BOUND: Final = "NoiseFloor"
NOISE_LIMITED: Final = 0.7
"""Share of the noise in the bound above which more steps cannot help."""
STEP_LIMITED: Final = 0.3
"""Share of the noise in the bound below which the steps are what is missing."""
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
    momentum: float
    loss_gap: float
    steps: float

    @property
    def split(self) -> Split:
        """The bound by what it is due to."""
        return stationarity_bound(
            self.loss_gap,
            self.smoothness,
            self.variance,
            self.batch_size,
            self.step_size,
            self.steps,
        )

    @property
    def noise_limited(self) -> bool:
        """More steps cannot help: the bound is mostly floor, and the measured value is near it."""
        floor = self.split.noise_term
        near = floor <= self.measured * NEAR_FLOOR and self.measured <= floor * NEAR_FLOOR
        return self.split.noise_share > NOISE_LIMITED and near

    @property
    def step_limited(self) -> bool:
        """The steps are what is missing."""
        return self.split.noise_share < STEP_LIMITED

    @property
    def edge_share(self) -> float:
        """Share of the newest steps with a step size above 1.8/L; NaN if unknown."""
        return known(self.verdict.measurement.inputs, "edge_share")

    @property
    def from_secants(self) -> bool:
        """L is the largest secant of batches along the steps, or nobody said what it is."""
        return known(self.verdict.measurement.inputs, "smoothness_is_secant") != 0

    @property
    def learning_rate(self) -> float:
        """As the optimizer has it [P²/L]."""
        return self.as_learning_rate(self.step_size)

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

    def as_learning_rate(self, step_size: float) -> float:
        """The learning rate that the optimizer needs for a step size [P²/L]."""
        return step_size * (1.0 - self.momentum)

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
    return _read(verdict) if verdict and decided and usable(verdict.measurement.value) else None


def at_the_edge(history: History) -> Convergence | None:
    """The state of a run of which more than a tenth of the newest steps are above 1.8/L.

    The largest secant of small batches can be many times the curvature of the loss, which leaves
    a bound true and an alarm false.

    Args:
        history: the reports so far.

    Returns:
        The state, whose `measured` and `split` may mean nothing; None unless `NoiseFloor` holds,
        or is undecided for nothing but steps beyond 2/L, and None if L is from secants.
    """
    verdict = newest_verdict(history, BOUND)
    if verdict is None or not (verdict.status == "holds" or "beyond 2/L" in verdict.because):
        return None
    state = _read(verdict)
    edge = state is not None and state.edge_share > EDGE_SHARE and not state.from_secants
    return state if edge else None


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


def _read(verdict: Verdict) -> Convergence | None:
    inputs, measured = verdict.measurement.inputs, verdict.measurement.value
    needed = ("smoothness", "variance", "batch_size", "step_size", "steps")
    smoothness, variance, batch_size, step_size, steps = (known(inputs, name) for name in needed)
    loss_gap = known(inputs, "first_loss") - known(inputs, "lowest_loss")
    momentum = known(inputs, "momentum")
    momentum = momentum if momentum == momentum else 0.0  # noqa: PLR0124 - NaN: it has none
    sizes = (smoothness, variance, batch_size, step_size, steps, loss_gap)
    if not usable(*sizes) or min(batch_size, steps) < 1 or not 0 <= momentum < 1:
        return None
    return Convergence(
        verdict=verdict,
        measured=measured,
        smoothness=smoothness,
        variance=variance,
        batch_size=batch_size,
        step_size=step_size,
        momentum=momentum,
        loss_gap=loss_gap,
        steps=steps,
    )

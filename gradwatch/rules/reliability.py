"""How many independent trainings make it likely that one of them converges as the bound says."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from typing_extensions import override

from gradwatch.errors import ConfigError
from gradwatch.interfaces import Rule
from gradwatch.records import History, Recommendation
from gradwatch.rules.recent import newest_verdict
from gradwatch.table import number
from gradwatch.theory.gradient_convergence import trainings_for_reliability

FACTOR: Final = 2.0


@dataclass(frozen=True)
class Reliability(Rule):
    """Recommends a number of independent trainings: `T = ln(1/delta)/ln 2`, rounded up.

    One training exceeds twice the bound of `RandomlyStoppedSgd` with a probability of at most 1/2
    (Markov), so all of T do with at most `2^-T`. Not among the default rules: it is an answer to a
    user who asks for a reliability. Silent until the bound is decided and holds.

    Args:
        delta: allowed probability that no training is below twice the bound, in (0, 1).

    Raises:
        ConfigError: if `delta` is outside (0, 1).

    References:
        derived from Markov's inequality and the descent lemma.
    """

    delta: float

    def __post_init__(self) -> None:
        given = isinstance(self.delta, (int, float)) and not isinstance(self.delta, bool)
        if not given or not 0 < self.delta < 1:
            raise ConfigError(
                f"delta must be a probability between 0 and 1, got {self.delta!r}; 0.05 asks for "
                "95 % reliability"
            )

    @override
    def advise(self, history: History) -> Iterable[Recommendation]:
        verdict = newest_verdict(history, "RandomlyStoppedSgd")
        trainings = trainings_for_reliability(self.delta, FACTOR)
        if verdict is None or verdict.status != "holds" or trainings == 1:
            return
        limit = FACTOR * verdict.interval.upper
        yield Recommendation(
            knob="training_length",
            scope="independent trainings",
            current=1.0,
            proposed=float(trainings),
            unit="training",
            severity="info",
            reason=(
                f"with delta = {number(self.delta)}, {trainings} independent trainings leave at "
                f"most that probability that none has a mean |grad|² below {number(limit)}, twice "
                "the bound; measure the gradient of each on fresh data to pick one"
            ),
            expected=f"one training with |grad|² below {number(limit)}",
            evidence=(verdict,),
            source="derived from Markov's inequality; " + verdict.source,
        )

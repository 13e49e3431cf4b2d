"""Tells the user of new recommendations in the way they chose."""

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, Literal

from gradwatch.errors import AdviceError, ConfigError, GradwatchWarning
from gradwatch.isolation import Isolation
from gradwatch.records import SEVERITIES, Recommendation

OnRecommendation = Literal["collect", "warn", "raise"] | Callable[[Recommendation], object]
MODES: Final = ("collect", "warn", "raise")


class Announcer:
    """Speaks once of each recommendation, and again if it becomes more severe.

    Args:
        mode: `collect` says nothing, `warn` issues a `GradwatchWarning`, `raise` raises an
            `AdviceError`, both from `advice` on; a callable is called with every recommendation.
        isolation: what to do when the callable fails.
        speaks: issue warnings; of several ranks only one does. What may change the training,
            an error or a callable, happens on all of them alike.

    Raises:
        ConfigError: if `mode` is something else.
    """

    def __init__(
        self, mode: OnRecommendation, isolation: Isolation, *, speaks: bool = True
    ) -> None:
        if mode not in MODES and not callable(mode):
            raise ConfigError(
                f"on_recommendation must be one of {', '.join(MODES)} or a callable, got {mode!r}"
            )
        self._mode = mode
        self._isolation = isolation
        self._speaks = speaks
        self._announced: dict[tuple[str, str], int] = {}

    def announce(self, recommendations: Iterable[Recommendation]) -> None:
        """Speaks of those that are new.

        Args:
            recommendations: all that stand now.

        Raises:
            AdviceError: in the mode `raise`, for the first new one from `advice` on.
        """
        for item in recommendations:
            level = SEVERITIES.index(item.severity)
            if level > self._announced.get((item.knob, item.scope), -1):
                self._announced[item.knob, item.scope] = level
                self._speak(item)

    def state_dict(self) -> list[list[Any]]:
        """What has been spoken of, as plain values."""
        return [[knob, scope, level] for (knob, scope), level in self._announced.items()]

    def load_state_dict(self, state: Iterable[Sequence[Any]]) -> None:
        """Takes back what `state_dict` returned."""
        self._announced = {(knob, scope): level for knob, scope, level in state}

    def _speak(self, item: Recommendation) -> None:
        mode = self._mode
        if callable(mode):
            self._isolation.run("on_recommendation", mode, item)
        elif item.severity != "info" and mode != "collect":
            text = f"{item.knob} of {item.scope}: {item.reason} [{item.source}]"
            if mode == "raise":
                raise AdviceError(text)
            if self._speaks:
                warnings.warn(text, GradwatchWarning, stacklevel=2)

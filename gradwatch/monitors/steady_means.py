"""Running means of the curvature that begin anew where the settings of the optimizer change."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

SAME: Final = 1.05
"""Factor between the settings of two readings up to which they are those of one schedule."""


@dataclass(slots=True)
class Mean:
    """A running mean in which the newest value weighs as much as all before it.

    Attributes:
        value: the mean; NaN without values.
        count: how many values there were.
    """

    value: float = math.nan
    count: float = 0.0

    def add(self, value: float) -> None:
        """Takes a value.

        Args:
            value: finite.
        """
        self.value = value / 2.0 + self.value / 2.0 if self.count else value
        self.count += 1.0


class SteadyMeans:
    """The means of the sharpness and of its variance over the examples.

    The threshold of stability and the gain `1/(1 - momentum)` are compared from reading to reading:
    a slow schedule passes, a jump of more than 5 % does not. The curvature itself does not depend
    on them, but needs time to follow. The variance depends on the batch size as well, through what
    it is compared with.

    Attributes:
        sharpness: its mean [L/P² or 1/P].
        variance: its mean [L²/P⁴].
    """

    def __init__(self) -> None:
        self.sharpness = Mean()
        self.variance = Mean()
        self._settings: dict[str, float] = {}

    @property
    def batch_size(self) -> float:
        """The usual batch size at the newest reading; NaN if unknown."""
        return self._settings.get("batch_size", math.nan)

    def add(
        self,
        sharpness: float,
        variance: float | None,
        *,
        threshold: float,
        momentum: float,
        batch_size: float,
    ) -> None:
        """Takes a reading, after forgetting what was read at other settings.

        Args:
            sharpness: of now.
            variance: over the examples; None if it was not measured.
            threshold: of stability, above 0.
            momentum: or beta1, below 1.
            batch_size: the usual one; NaN if unknown.
        """
        settings = {"threshold": threshold, "kept": 1.0 - momentum}
        if not all(_same(value, self._settings.get(name)) for name, value in settings.items()):
            self.sharpness, self.variance = Mean(), Mean()
        if batch_size != self.batch_size:
            self.variance = Mean()
        self._settings = {**settings, "batch_size": batch_size}
        self.sharpness.add(sharpness)
        if variance is not None:
            self.variance.add(variance)

    def state_dict(self) -> dict[str, Any]:
        """All of it as plain values."""
        return {
            "sharpness": asdict(self.sharpness),
            "variance": asdict(self.variance),
            "settings": dict(self._settings),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` returned.

        Args:
            state: plain values.
        """
        sharpness, variance, settings = (
            {str(name): float(value) for name, value in state[part].items()}
            for part in ("sharpness", "variance", "settings")
        )
        self.sharpness, self.variance = Mean(**sharpness), Mean(**variance)
        self._settings = settings


def _same(value: float, before: float | None) -> bool:
    if before is None:
        return False
    low, high = sorted((value, before))
    return high <= SAME * low

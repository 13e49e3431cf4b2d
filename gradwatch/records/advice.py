"""A recommendation: which knob to turn, from what to what, and why."""

from dataclasses import dataclass
from typing import Final, Literal, get_args

from gradwatch.errors import ConfigError
from gradwatch.records.judgement import Verdict
from gradwatch.table import number

Severity = Literal["info", "advice", "warning"]
Knob = Literal[
    "learning_rate",
    "batch_size",
    "momentum",
    "weight_decay",
    "dropout",
    "input_noise",
    "width",
    "depth_skip",
    "residual_scale",
    "init",
    "bias_init",
    "recurrent_init",
    "data_scale",
    "clip",
    "training_length",
    "wiring",
    "numerics",
]
Direction = Literal["up", "down", "fix"]

KNOBS: Final[tuple[str, ...]] = get_args(Knob)
SEVERITIES: Final[tuple[str, ...]] = get_args(Severity)
"""From harmless to harmful."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recommendation:
    """One concrete change, with its reason and its evidence.

    Attributes:
        knob: what to turn, one of `KNOBS`.
        scope: the parameter, layers or block it is about in words, or "model".
        targets: their names, for programs; empty for the whole model.
        current: present setting, None where it is not a number.
        proposed: recommended setting, None where it is not a number.
        unit: of both.
        severity: `info` (worth knowing), `advice` (this hurts the training), `warning` (this
            training will not succeed as it is).
        reason: one sentence that a user understands.
        expected: what should change when the advice is followed.
        evidence: the verdicts it rests on.
        source: the paper and the statement.
        since_step: the step at which the evidence first spoke.

    Raises:
        ConfigError: if `knob` or `severity` is unknown.
    """

    knob: Knob
    reason: str
    scope: str = "model"
    targets: tuple[str, ...] = ()
    current: float | None = None
    proposed: float | None = None
    unit: str = "1"
    severity: Severity = "advice"
    expected: str = ""
    evidence: tuple[Verdict, ...] = ()
    source: str = ""
    since_step: int = 0

    def __post_init__(self) -> None:
        if self.knob not in KNOBS:
            raise ConfigError(f"knob must be one of {', '.join(KNOBS)}, got {self.knob!r}")
        if self.severity not in SEVERITIES:
            raise ConfigError(
                f"severity must be one of {', '.join(SEVERITIES)}, got {self.severity!r}"
            )

    @property
    def direction(self) -> Direction:
        """`up` or `down` where both settings are numbers that differ, else `fix`."""
        if self.current is None or self.proposed is None or self.current == self.proposed:
            return "fix"
        return "up" if self.proposed > self.current else "down"

    @property
    def change(self) -> str:
        """The change as people read it, such as `0.1 -> 0.05 P²/L`; `fix` without a number."""
        if self.proposed is None:
            return self.direction
        current = "?" if self.current is None else number(self.current)
        unit = "" if self.unit == "1" else f" {self.unit}"
        return f"{current} -> {number(self.proposed)}{unit}"

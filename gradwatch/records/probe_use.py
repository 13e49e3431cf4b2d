"""What probes have cost a training, and when the next ones are due."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from gradwatch.table import number


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeUse:
    """How the budget of the probes is used.

    Attributes:
        share: of the training time so far that went into probes.
        budget: the largest share that they may take; None if there is no limit.
        next_steps: the step in which each probe will run next, by the name of its monitor, the
            soonest first. An estimate: it rests on what steps and probes took so far.
    """

    share: float
    budget: float | None = None
    next_steps: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        """One line.

        Example:
            >>> print(ProbeUse(share=0.019, budget=0.02, next_steps={"Sharpness": 4200}))
            probes: 1.9 % of the time (budget 2 %); next: Sharpness about step 4200
        """
        limit = "no budget" if self.budget is None else f"budget {_percent(self.budget)}"
        spent = f"probes: {_percent(self.share)} of the time ({limit})"
        due = ", ".join(f"{name} about step {step}" for name, step in self.next_steps.items())
        return f"{spent}; next: {due}" if due else spent


def _percent(share: float) -> str:
    return f"{number(float(f'{100 * share:.2g}'))} %"

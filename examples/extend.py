"""Each of the four extension points, written by a user and used together in one training.

python examples/extend.py
"""

from collections.abc import Iterable

import torch
from torch import nn

import gradwatch
from gradwatch import (
    Bound,
    History,
    Interval,
    Measurement,
    ModelInfo,
    Monitor,
    Reading,
    Recommendation,
    Report,
    Rule,
    Sink,
    StepInfo,
    StepView,
)


class GradientSpread(Monitor):
    """What is the value now? Largest over smallest gradient norm of any parameter."""

    metrics = ("gradient_spread",)

    def read(self, view: StepView) -> Iterable[Reading]:
        norms = view.gradient_norms.values
        if norms.numel() == 0:
            view.note("gradient_spread: no parameter had a gradient")
            return
        yield Reading("gradient_spread", norms.max() / norms.min())


class EvenGradients(Bound):
    """What should it be? All parameters learn, none of them a thousand times faster."""

    metric = "gradient_spread"
    source = "rule of thumb"

    def interval(self, measurement: Measurement, step: StepInfo, model: ModelInfo) -> Interval:
        few = "" if model.depth > 1 else "one layer has nothing to be compared with"
        return Interval(lower=1.0, upper=1000.0, kind="heuristic", undecided=few)


class AddSkips(Rule):
    """What should the user do? A spread that is too wide asks for skip connections."""

    def advise(self, history: History) -> Iterable[Recommendation]:
        for verdict in history[-1].verdicts:
            if verdict.bound == "EvenGradients" and verdict.status == "violated":
                spread = verdict.measurement.value
                yield Recommendation(
                    knob="depth_skip",
                    reason=f"gradients differ {spread:.0f}-fold between parameters",
                    expected="gradient_spread below 1000",
                    evidence=(verdict,),
                )


class Diary(Sink):
    """Who is told? Whoever reads this list."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def write(self, report: Report) -> None:
        knobs = [item.knob for item in report.recommendations]
        self.lines.append(f"step {report.step}: {', '.join(knobs) or 'all is well'}")


def main() -> None:
    """Trains a deep network of sigmoids, whose gradients vanish on the way down."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Sequential(nn.Linear(32, 32), nn.Sigmoid()) for _ in range(8)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    diary = Diary()
    with gradwatch.watch(
        model,
        optimizer,
        monitors=[*gradwatch.presets.standard(), GradientSpread()],
        bounds=[*gradwatch.presets.bounds(), EvenGradients()],
        rules=[*gradwatch.presets.rules(), AddSkips()],
        sinks=[diary],
    ) as watch:
        for _ in range(200):
            inputs = torch.randn(64, 32)
            loss = nn.functional.mse_loss(model(inputs), inputs.sigmoid())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    print(watch.summary())
    print("\n".join(["", "The diary:", *diary.lines]))


if __name__ == "__main__":
    main()

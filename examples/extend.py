"""Each of the four extension points, and a probe, written by a user and used in one training.

python examples/extend.py
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

import gradwatch
from gradwatch import (
    Bound,
    History,
    Interval,
    Measurement,
    ModelInfo,
    Monitor,
    ProbeView,
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


class HalvesAgree(Monitor):
    """The same by a probe: cosine between the gradients of the two halves of a batch."""

    metrics = probed = ("halves_cosine",)

    def probe(self, view: ProbeView) -> dict[str, Tensor]:
        half = view.last.examples // 2
        found = [view.gradient(view.last, rows=rows) for rows in (slice(half), slice(half, None))]
        first, second = (torch.cat([item.flatten() for item in g.values()]) for g in found)
        return {"halves_cosine": torch.cosine_similarity(first, second, dim=0)}

    def read(self, view: StepView) -> Iterable[Reading]:
        cosine = view.probed.get("halves_cosine")  # not in every sampled step
        return [] if cosine is None else [Reading("halves_cosine", cosine)]


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


def loss_fn(model: nn.Module, inputs: Tensor) -> Tensor:
    """The loss of the training."""
    return nn.functional.mse_loss(model(inputs), inputs.sigmoid())


def main() -> None:
    """Trains a deep network of sigmoids, whose gradients vanish on the way down."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Sequential(nn.Linear(32, 32), nn.Sigmoid()) for _ in range(8)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    diary = Diary()
    with gradwatch.watch(
        model,
        optimizer,
        monitors=[*gradwatch.presets.standard(), GradientSpread(), HalvesAgree()],
        bounds=[*gradwatch.presets.bounds(), EvenGradients()],
        rules=[*gradwatch.presets.rules(), AddSkips()],
        sinks=[diary],
        loss_fn=loss_fn,
        budget=None,  # probes in every sampled step
    ) as watch:
        for _ in range(200):
            inputs = torch.randn(64, 32)
            loss_fn(model, inputs).backward()
            optimizer.step()
            optimizer.zero_grad()
    print(watch.summary())
    print("\n".join(["", "The diary:", *diary.lines]))


if __name__ == "__main__":
    main()

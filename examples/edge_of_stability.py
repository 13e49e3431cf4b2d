"""At the edge of stability: a loss that goes up and down and is healthy, and one that is not.

python examples/edge_of_stability.py
"""

from collections.abc import Iterable
from itertools import pairwise
from textwrap import fill

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import gradwatch

STEPS, EVERY, SHOWN = 3000, 50, 500
Batch = tuple[Tensor, Tensor]

pixels, labels = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
digits: Batch = (pixels[:500].float() / 16, nn.functional.one_hot(labels[:500], 10).float())


def network() -> nn.Sequential:
    """Two hidden layers, always the same."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 10))
    )


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    """The loss of the training, a mean over the batch."""
    loss: Tensor = (model(batch[0]) - batch[1]).square().sum(1).mean() / 2
    return loss


def train(lr: float, steps: int = STEPS) -> list[gradwatch.Report]:
    """Gradient descent on all data at once; prints what the watch sees of its curvature."""
    model, told = network(), gradwatch.MemorySink()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    with gradwatch.watch(
        model,
        optimizer,
        every_n_steps=EVERY,
        log_every_n_steps=EVERY,
        monitors=[gradwatch.monitors.LossValue(), *gradwatch.presets.curvature()],
        sinks=[told],
        track_loss=True,
        track_clipping=True,  # so that it knows that nothing is clipped
        loss_fn=loss_fn,  # for products with the Hessian, which evaluate the loss again
        probe_batch=digits,
        budget=None,  # in every sampled step, so that two runs say the same
    ):
        for _ in range(steps):
            optimizer.zero_grad()
            loss_fn(model, digits).backward()
            optimizer.step()
    print(f"lr {lr:.3g}, so steps are stable up to a sharpness of 2/lr = {2 / lr:.3g}")
    for report in told.reports:
        ratio = report.value("stability_ratio")
        if ratio is not None and report.step % SHOWN == 0:
            print(
                f"  step {report.step:4}: loss {report.value('loss'):.4f}, sharpness "
                f"{report.value('sharpness'):5.2f}, stability ratio {ratio:.2f}"
            )
    return told.reports


def main() -> None:
    """One training that comes to the edge, one that begins beyond it, one that is mended."""
    torch.set_num_threads(1)  # layers this small lose more by sharing than they gain

    reports = train(lr=0.2)
    reached = [report.value("break_even_step") for report in reports]
    print(f"  break-even at step {max(step or 0 for step in reached):.0f}")
    rose = sum(after > before for before, after in pairwise(losses(reports)))
    print(f"  the loss rose from one report to the next {rose} times of {len(reports) - 1}")
    print(f"  advice in {sum(bool(report.recommendations) for report in reports)} reports\n")

    reports = train(lr=2.0, steps=400)
    advice = next(item for item in reports[-1].recommendations if item.knob == "learning_rate")
    print(f"  {advice.severity}: {advice.knob} {advice.change}, because")
    print(fill(advice.reason, 95, initial_indent="    ", subsequent_indent="    ") + "\n")

    train(lr=advice.proposed or 2.0)


def losses(reports: Iterable[gradwatch.Report]) -> list[float]:
    """The loss of each report."""
    return [loss for report in reports if (loss := report.value("loss")) is not None]


if __name__ == "__main__":
    main()

"""A training that more steps cannot help: what the watch says, and what following it does.

python examples/noise_or_steps.py
"""

import copy
from textwrap import fill

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import gradwatch
from gradwatch.rules import LearningRate

STEPS, MICROBATCHES, TARGET = 1000, 4, 0.2
Batch = tuple[Tensor, Tensor]

pixels, labels = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
generator = torch.Generator().manual_seed(0)
wrong = torch.rand(len(labels), generator=generator) < 0.4  # noise that no training takes away
labels[wrong] = torch.randint(10, (int(wrong.sum()),), generator=generator)
digits: Batch = (pixels.float() / 16, labels)


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    """The loss of the training, a mean over the batch."""
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def true_square(model: nn.Module) -> float:
    """Square of the norm of the gradient of all data, which a single batch does not show."""
    gradients = torch.autograd.grad(loss_fn(model, digits), list(model.parameters()))
    return float(sum(item.square().sum() for item in gradients))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> float:
    """1000 steps of 4 x 2 examples; gives the mean of `true_square` over the last 500."""
    draws, squares = torch.Generator().manual_seed(seed), list[float]()
    for step in range(STEPS):
        for _ in range(MICROBATCHES):
            some = torch.randint(len(labels), (2,), generator=draws)
            loss = loss_fn(model, (digits[0][some], digits[1][some])) / MICROBATCHES
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step >= STEPS - 500 and step % 10 == 0:
            squares.append(true_square(model))
    return sum(squares) / len(squares)


def main() -> None:
    """Trains with a learning rate that is too large for the batch, then goes on in two ways."""
    torch.set_num_threads(1)  # layers this small lose more by sharing than they gain
    torch.manual_seed(0)
    model = nn.Linear(64, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with gradwatch.watch(
        model,
        optimizer,
        every_n_steps=3,
        log_every_n_steps=75,
        monitors=[gradwatch.monitors.LossValue(), *gradwatch.presets.noise()],
        rules=[LearningRate(TARGET)],  # what the square of the gradient should come down to
        track_loss=True,
        track_clipping=True,  # so that it knows that nothing is clipped
        loss_fn=loss_fn,  # for L, which is measured by evaluating the loss again
        probe_batch=digits,
        budget=None,  # in every sampled step, so that two runs say the same
    ) as watch:
        square = train(model, optimizer, seed=1)

    advice = next(item for item in watch.recommendations if item.knob == "learning_rate")
    print(f"after {STEPS} steps at lr 1: |gradient|² = {square:.3f}")
    print(f"the watch: {advice.knob} {advice.change}, because")
    print(fill(advice.reason, 95, initial_indent="    ", subsequent_indent="    "))
    for lr in (1.0, advice.proposed or 1.0):
        copied = copy.deepcopy(model)
        square = train(copied, torch.optim.SGD(copied.parameters(), lr=lr), seed=2)
        print(f"after {STEPS} steps more at lr {lr:.3g}: |gradient|² = {square:.3f}")


if __name__ == "__main__":
    main()

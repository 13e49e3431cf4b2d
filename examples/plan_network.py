"""Which width, and which dropout: networks compared before one of them is trained.

python examples/plan_network.py
"""

from collections.abc import Callable

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from gradwatch import plan

pixels, labels = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
batches = [(pixels[some].float() / 16, labels[some]) for some in order.split(250)[:6]]


def classifier(width: int, dropout: float = 0.0) -> Callable[[], nn.Module]:
    """A candidate is a function without arguments, so that each is built from the same seed."""
    return lambda: nn.Sequential(
        nn.Linear(64, width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, 10)
    )


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The loss of the training, a mean over the batch."""
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


widths = {f"width {width}": classifier(width) for width in (32, 64, 128, 256)}
print(plan.network(widths, batches, loss_fn, target=0.05, batch_size=32))
print()

dropouts = {f"dropout {p}": classifier(64, p) for p in (0.0, 0.2, 0.5)}
answer = plan.network(dropouts, batches, loss_fn, relative_target=0.5, batch_size=32)
print(answer)
print("between these the cost does not decide:", ", ".join(answer.equivalent))

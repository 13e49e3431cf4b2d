"""How the eigenvalues of the Hessian are distributed, before and after a training.

python examples/hessian_spectrum.py
"""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import gradwatch

pixels, labels = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
pixels = (pixels.float() - 4.9) / 6.0  # mean 0, variance 1 over all pixels

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The loss of the training, a mean over the batch."""
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def show(when: str) -> None:
    """Prints the ends, the trace, and how many eigenvalues are not near 0."""
    found = gradwatch.spectral_density(model, loss_fn, (pixels[:512], labels[:512]), products=30)
    print(f"{when}:\n{found}\n")


show("before")
for _ in range(20):
    for batch in torch.randperm(len(pixels)).split(64):
        optimizer.zero_grad()
        loss_fn(model, (pixels[batch], labels[batch])).backward()
        optimizer.step()
show("after 20 epochs")

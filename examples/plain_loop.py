"""The shortest watched training: two lines more than the loop alone.

python examples/plain_loop.py
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

import gradwatch

pixels, labels = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
pixels = (pixels.float() - 4.9) / 6.0  # mean 0, variance 1 over all pixels

torch.manual_seed(0)
model = nn.Sequential(
    nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
)
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

with gradwatch.watch(model, optimizer, track_loss=True, track_clipping=True) as watch:  # this line
    for _ in range(5):
        for index in torch.randperm(len(pixels)).split(64):
            loss = nn.functional.cross_entropy(model(pixels[index]), labels[index])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

print(watch.summary())  # and this one

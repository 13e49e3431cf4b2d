"""Two processes train together, each on half of every batch; rank 0 tells of both.

torchrun --nproc-per-node 2 examples/ddp_digits.py
"""

import torch
from sklearn.datasets import load_digits
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

import gradwatch

distributed.init_process_group("gloo")
rank, world = distributed.get_rank(), distributed.get_world_size()
torch.set_num_threads(1)

pixels, labels = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
pixels = (pixels.float() - 4.9) / 6.0  # mean 0, variance 1 over all pixels

torch.manual_seed(0)
inner = nn.Sequential(
    nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
)
model = DistributedDataParallel(inner)
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

with gradwatch.watch(model, optimizer, track_loss=True, track_clipping=True) as watch:  # every rank
    for _ in range(5):
        for batch in torch.randperm(len(pixels)).split(64):  # the same on every rank
            mine = batch.chunk(world)[rank]
            loss = nn.functional.cross_entropy(model(pixels[mine]), labels[mine])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

if rank == 0:
    print(watch.summary())
distributed.destroy_process_group()

"""The handwritten digits that come with scikit-learn: 1797 images of 8 x 8 pixels."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

TEST_SIZE = 360
SPLIT_SEED = 0


@dataclass(frozen=True, slots=True)
class Digits:
    """A training set and a test set of images with their labels.

    Attributes:
        train_images: (1437, 64) float32; each pixel has mean 0 and variance 1.
        train_labels: (1437,) int64, 0 to 9.
        test_images: (360, 64) float32, standardised as the training images are.
        test_labels: (360,) int64.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def batches(self, *, steps: int, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Goes through the shuffled training set as often as it takes.

        Args:
            steps: how many batches.
            size: images in a batch; what is left over at the end of an epoch is not used in it.
            seed: of the order, which nothing else influences.

        Yields:
            Images and labels.
        """
        generator = torch.Generator().manual_seed(seed)
        count = len(self.train_images)
        whole = count // size * size
        left = steps
        while left > 0:
            order = torch.randperm(count, generator=generator)[:whole]
            for index in order.split(size)[:left]:
                yield self.train_images[index], self.train_labels[index]
                left -= 1


def load(device: torch.device) -> Digits:
    """Reads, splits and standardises the digits; always in the same way.

    Args:
        device: where to put them.

    Returns:
        The data.
    """
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(
        images, labels, test_size=TEST_SIZE, random_state=SPLIT_SEED, stratify=labels
    )
    train_images, test_images = (torch.as_tensor(part, dtype=torch.float32) for part in parts[:2])
    train_labels, test_labels = (torch.as_tensor(part, dtype=torch.int64) for part in parts[2:])
    mean, spread = train_images.mean(0), train_images.std(0)
    # A pixel at the rim that is always blank has no spread to divide by.
    spread = torch.where(spread > 0, spread, 1.0)
    return Digits(
        train_images=((train_images - mean) / spread).to(device),
        train_labels=train_labels.to(device),
        test_images=((test_images - mean) / spread).to(device),
        test_labels=test_labels.to(device),
    )

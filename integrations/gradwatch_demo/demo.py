"""The demo from its arguments to its last sentence."""

import os
from pathlib import Path

import tensorboard  # noqa: F401 - the demo ends with its page, so it must not be missing
import torch
from torch import nn

from gradwatch import ConfigError, JsonlSink
from gradwatch_demo import conclusion, data
from gradwatch_demo.model import deep_classifier, follow_advice
from gradwatch_demo.training import Settings, one_thread, train

AS_IS, ADVISED = "as_is", "advised"
LARGEST_SEED = 2**63 - 1


def run_demo(
    *, steps: int = 600, seed: int = 0, logdir: str | os.PathLike[str], device: str = "cpu"
) -> tuple[float, float]:
    """Trains on handwritten digits, prints the advice, and trains again with it followed.

    Args:
        steps: optimizer steps of each of the two trainings.
        seed: of the initialisation and of the order of the data, the same for both.
        logdir: folder for both runs, in its subfolders `as_is` and `advised`.
        device: where to train, as torch names it.

    Returns:
        The test accuracies without and with the advice.

    Raises:
        ConfigError: if an argument cannot work.
        RecordError: if `logdir` cannot be written.
    """
    _check(steps, seed)
    place = _device(device)
    folder = Path(logdir)
    for run in (AS_IS, ADVISED):
        JsonlSink(folder / run)  # tries to write there: both fail now or never
    digits = data.load(place)
    settings = Settings(steps=steps, seed=seed)
    with one_thread():
        print(f"1. Ten ReLU layers, initialised as PyTorch does it, {steps} steps of SGD\n")
        first = train(_fresh(seed, place), digits, settings, folder / AS_IS)
        print(f"{first.summary}\n")

        model = _fresh(seed, place)
        factors = follow_advice(model, first.summary.recommendations)
        print(f"2. The same once more, {conclusion.followed(factors)}\n")
        second = train(model, digits, settings, folder / ADVISED)
    images = len(digits.test_labels)
    print(conclusion.comparison(first, second, images=images))
    print(f"\nBoth runs are in {folder}. To look at them:\n\n    {conclusion.command(folder)}")
    return first.accuracy, second.accuracy


def _check(steps: int, seed: int) -> None:
    if steps < 1:
        raise ConfigError(f"steps must be at least 1, got {steps}; 600 show what there is to see")
    if not 0 <= seed <= LARGEST_SEED:
        raise ConfigError(f"seed must be from 0 to {LARGEST_SEED}, got {seed}; 0 is as good as any")


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()  # only a device that is there can compute
    # What torch raises depends on the device and on how torch was built.
    except (RuntimeError, AssertionError) as error:
        usable = "cpu or cuda" if torch.cuda.is_available() else "cpu"
        raise ConfigError(
            f"device must be one that torch can compute on here, got {name!r}; give {usable}"
        ) from error
    return device


def _fresh(seed: int, device: torch.device) -> nn.Module:
    torch.manual_seed(seed)
    return deep_classifier().to(device)

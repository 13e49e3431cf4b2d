"""The random streams that a forward may draw from, put back after a probe."""

import random
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch import nn


def devices_of(modules: Iterable[nn.Module]) -> set[torch.device]:
    """Where modules compute.

    Args:
        modules: each with what it holds itself, not what its children hold.

    Returns:
        The devices of their parameters and buffers.
    """
    return {
        tensor.device
        for module in modules
        for kind in (module.parameters(recurse=False), module.buffers(recurse=False))
        for tensor in kind
    }


@contextmanager
def kept_random_states(devices: Iterable[torch.device]) -> Iterator[None]:
    """Puts back the random streams of Python, NumPy and PyTorch when the block ends.

    Args:
        devices: those whose streams are put back besides that of the CPU.

    Yields:
        None.
    """
    python, numpy = random.getstate(), np.random.get_state()
    given = list(devices)
    with ExitStack() as forks:
        forks.enter_context(torch.random.fork_rng(devices=()))
        for kind in {device.type for device in given} - {"cpu", "meta"}:
            places = [device.index or 0 for device in given if device.type == kind]
            forks.enter_context(torch.random.fork_rng(devices=places, device_type=kind))
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)

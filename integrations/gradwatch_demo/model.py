"""A classifier deep enough that its initialisation matters, and the advice put into practice."""

from collections import OrderedDict
from collections.abc import Iterable

import torch
from torch import nn

from gradwatch import Recommendation

PIXELS = 64
CLASSES = 10
DEPTH = 10
WIDTH = 256


def deep_classifier() -> nn.Sequential:
    """Ten hidden layers of 256 ReLU units, initialised as PyTorch does by default.

    Returns:
        The model, from (batch, 64) pixels to (batch, 10) logits.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for index in range(1, DEPTH + 1):
        layers[f"hidden{index}"] = nn.Linear(PIXELS if index == 1 else WIDTH, WIDTH)
        layers[f"relu{index}"] = nn.ReLU()
    layers["logits"] = nn.Linear(WIDTH, CLASSES)
    return nn.Sequential(layers)


@torch.no_grad()
def follow_advice(model: nn.Module, advice: Iterable[Recommendation]) -> dict[str, float]:
    """Rescales the weights as the recommendations about `init` say.

    Args:
        model: the model, freshly initialised.
        advice: the recommendations.

    Returns:
        The factor that each layer's weights were multiplied by.
    """
    factors = {
        name: item.proposed / item.current
        for item in advice
        if item.knob == "init" and item.current and item.proposed
        for name in item.targets
    }
    for name, factor in factors.items():
        weight = model.get_submodule(name).get_parameter("weight")
        weight.mul_(factor)
    return factors

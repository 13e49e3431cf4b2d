"""Facts about the weights of one layer and its first input, as tensors on the device."""

from typing import Final

import torch
from torch import Tensor, nn

from gradwatch.capture.model.facts import CONVOLUTIONS
from gradwatch.numerics.norms import norm
from gradwatch.theory.norm_preservation import padding_factor

WEIGHT_FACTS: Final = (
    "weight_variance",
    "weight_kurtosis",
    "alignment",
    "bias_share",
    "input_mean_square",
    "one_hot_input",
)
"""Order of the numbers in `weight_facts`; all but the last are fields of `LayerInfo`."""

_SAMPLE: Final = 2**18


def plain_weight(module: nn.Module) -> nn.Parameter | None:
    """The weight of a layer whose pre-activation is `W h + b` and nothing else.

    A parametrised weight is left alone: looking at it may recompute it, and spectral
    normalisation would advance its power iteration.

    Args:
        module: any module.

    Returns:
        The weight, or None for any other kind of layer.
    """
    known = isinstance(module, (nn.Linear, *CONVOLUTIONS)) or type(module).__name__ == "Conv1D"
    if not known or hasattr(module, "parametrizations"):
        return None
    weight = module._parameters.get("weight")
    return weight if isinstance(weight, nn.Parameter) and weight.dim() > 1 else None


def response(module: nn.Module, output: Tensor) -> Tensor:
    """The pre-activation without the bias, `W h`.

    Args:
        module: a layer with a plain weight.
        output: some examples of its output, (examples, ...).

    Returns:
        A new float32 tensor of the shape of `output`.
    """
    bias = module._parameters.get("bias")
    values = output.float()
    if bias is None:
        return values.clone()
    if isinstance(module, CONVOLUTIONS):
        spatial = values.dim() - 2
        return values - bias.float().reshape(-1, *[1] * spatial)
    return values - bias.float()


def mean_square(values: Tensor) -> Tensor:
    """Mean square of each example.

    Args:
        values: (examples, ...).

    Returns:
        (examples,) float32.
    """
    return values.float().flatten(1).square().mean(1)


def spatial_padding(module: nn.Module, given: Tensor) -> float:
    """Mean share of a convolution's taps that fall inside its map; 1 for other layers.

    Args:
        module: the layer.
        given: its input, (examples, channels, *sizes).

    Returns:
        The product over the spatial dimensions.
    """
    if not isinstance(module, CONVOLUTIONS) or module.padding_mode != "zeros":
        return 1.0
    factor = 1.0
    for axis, kernel in enumerate(module.kernel_size):
        size, stride, dilation = given.shape[2 + axis], module.stride[axis], module.dilation[axis]
        if module.padding == "same":
            factor *= _same_padding_factor(size, kernel, dilation)
        elif not isinstance(module.padding, str):
            factor *= padding_factor(size, kernel, module.padding[axis], stride, dilation)
    return factor


def _same_padding_factor(size: int, kernel: int, dilation: int) -> float:
    """As `padding_factor`, for an output as large as the input: an odd zero goes to the right."""
    left = dilation * (kernel - 1) // 2
    inside = [max(0, size - abs(dilation * tap - left)) for tap in range(kernel)]
    return sum(inside) / (size * kernel)


def weight_facts(
    module: nn.Module, weight: Tensor, given: Tensor, answer: Tensor, fan_in: int, padding: float
) -> Tensor:
    """What the verdicts about the initialisation need to know of a layer.

    Args:
        module: the layer.
        weight: its plain weight.
        given: the first examples of its input, (examples, ...).
        answer: their `response`.
        fan_in: inputs of one unit.
        padding: its `spatial_padding`.

    Returns:
        (6,) float32, in the order of `WEIGHT_FACTS`.
    """
    variance = norm(weight).square() / weight.numel()
    sample = weight.detach().reshape(-1)[:_SAMPLE].float()
    kurtosis = sample.pow(4).mean() / sample.square().mean().square()
    arriving, leaving = mean_square(given).mean(), mean_square(answer).mean()
    alignment = torch.log(leaving / (arriving * variance * fan_in * padding))
    bias = module._parameters.get("bias")
    bias_power = torch.zeros_like(leaving) if bias is None else bias.float().square().mean()
    one_hot = ((given != 0).sum(-1) == 1).all().float()
    if isinstance(module, CONVOLUTIONS):
        one_hot = torch.zeros_like(one_hot)
    return torch.stack(
        [variance, kurtosis, alignment, bias_power / (bias_power + leaving), arriving, one_hot]
    )

"""What can be known about a model by looking at it, without running it."""

from collections.abc import Iterable
from typing import Any, Final

from torch import Tensor, nn

from gradwatch.capture.model.names import canonical, named_modules
from gradwatch.records import DropoutInfo, LayerInfo, ModelInfo

ROOT: Final = "root"
"""Scope of a model that is a single layer: unlike "model", it is about that layer's output."""

CONVOLUTIONS: Final = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
RECURRENT: Final = (nn.RNNBase, nn.RNNCellBase)
DROPOUTS: Final = (
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)
NORMALISATIONS: Final = (
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.LocalResponseNorm,
)


def describe_model(model: nn.Module, optimized: Iterable[Tensor], **facts: Any) -> ModelInfo:
    """Collects the facts about a model.

    Args:
        model: the unwrapped model.
        optimized: the parameters that the watched optimizers hold.
        **facts: fields of `ModelInfo` that the caller knows.

    Returns:
        The facts; what only a forward pass shows is still missing.
    """
    parameters = list(optimized)
    held = {id(parameter) for parameter in parameters}
    modules = list(named_modules(model))
    named = [(canonical(name), parameter) for name, parameter in model.named_parameters()]
    return ModelInfo(
        layers=tuple(describe_layer(name, module) for name, module in layers_of(model)),
        activations=tuple(name for name, module in modules if _is_activation(module)),
        normalisations=tuple(name for name, module in modules if is_normalisation(module)),
        dropouts=tuple(
            DropoutInfo(name=name, probability=float(module.p))
            for name, module in modules
            if isinstance(module, DROPOUTS)
        ),
        recurrent=tuple(name for name, module in modules if isinstance(module, RECURRENT)),
        frozen=tuple(name for name, item in named if not item.requires_grad),
        not_optimized=tuple(
            name for name, item in named if item.requires_grad and id(item) not in held
        ),
        parameter_count=sum(parameter.numel() for parameter in parameters),
        **facts,
    )


def layers_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules that own parameters themselves, in module order, each once.

    A parametrised layer counts, the modules that compute its weight do not. A model that is a
    layer itself is called `ROOT`.

    Args:
        model: the unwrapped model.

    Returns:
        Pairs of canonical name and module.
    """
    return [
        (name or ROOT, module)
        for name, module in named_modules(model)
        if "parametrizations" not in name.split(".")
        and (any(True for _ in module.parameters(recurse=False)) or _is_parametrized(module))
    ]


def describe_layer(name: str, module: nn.Module) -> LayerInfo:
    """The shape of one layer.

    Args:
        name: its canonical name.
        module: a module that owns parameters.

    Returns:
        Its record; fans and width are 0 where they do not apply.
    """
    fan_in, fan_out, width = fans(module)
    return LayerInfo(
        name=name,
        kind=type(module).__name__,
        fan_in=fan_in,
        fan_out=fan_out,
        width=width,
        has_bias=isinstance(getattr(module, "bias", None), nn.Parameter),
    )


def is_normalisation(module: nn.Module) -> bool:
    """Whether a module fixes the norm of its output, judged by class or by its class name.

    Args:
        module: any module.

    Returns:
        True for batch, layer, group, instance and RMS normalisation, also of other libraries.
    """
    return isinstance(module, NORMALISATIONS) or type(module).__name__.endswith("Norm")


def _is_parametrized(module: nn.Module) -> bool:
    return hasattr(module, "parametrizations")


def _is_activation(module: nn.Module) -> bool:
    defined_in: str = type(module).__module__
    return defined_in in {"torch.nn.modules.activation", "transformers.activations"} and not any(
        True for _ in module.children()
    )


def fans(module: nn.Module) -> tuple[int, int, int]:
    """Inputs of one output unit, outputs of one input unit, and number of output units.

    Args:
        module: a module that owns parameters.

    Returns:
        Fan-in, fan-out and width; 0 where the notion does not apply.
    """
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features, module.out_features
    if isinstance(module, CONVOLUTIONS):
        taps = 1
        for size in module.kernel_size:
            taps *= size
        fan_in = module.in_channels // module.groups * taps
        return fan_in, module.out_channels // module.groups * taps, module.out_channels
    if isinstance(module, RECURRENT):
        return module.input_size, module.hidden_size, module.hidden_size
    if isinstance(module, nn.Embedding):
        return 0, 0, module.embedding_dim
    weight = getattr(module, "weight", None) if type(module).__name__ == "Conv1D" else None
    if weight is not None and weight.dim() == 2:  # noqa: PLR2004 - GPT-2's transposed linear layer
        return weight.shape[0], weight.shape[1], weight.shape[1]
    return 0, 0, 0

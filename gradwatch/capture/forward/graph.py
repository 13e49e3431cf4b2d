"""Reading the autograd graph: what stands between two tensors, without touching a value."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

# Nodes that pass the mean square of a tensor on unchanged.
_PASSING: Final = frozenset(
    {"View", "UnsafeView", "ReshapeAlias", "Permute", "Transpose", "T", "Unsqueeze", "Squeeze"}
    | {"Clone", "Alias", "ToCopy", "Contiguous", "RegisterPostBackwardFunction"}  # last: FSDP2
)
_ACTIVATIONS: Final = {
    "Relu": "relu",
    "LeakyRelu": "leaky_relu",
    "Gelu": "gelu",
    "Silu": "silu",
    "Tanh": "tanh",
    "Elu": "elu",
}
_ADDITIVE: Final = frozenset({"Add", *_PASSING})
_AROUND_A_SUM: Final = frozenset({*_ACTIVATIONS, *_PASSING, "NativeLayerNorm", "NativeDropout"})
_LONGEST_PATH: Final = 16
_LARGEST_SEARCH: Final = 256


@dataclass(frozen=True, slots=True)
class Link:
    """How a layer's output becomes another tensor.

    Attributes:
        origin: name of the layer.
        activation: what was applied, "identity" for nothing.
        negative_slope: of a leaky ReLU.
        dropout: probability of the dropout on the way.
    """

    origin: str
    activation: str
    negative_slope: float = 0.0
    dropout: float = 0.0


def operation(node: Any) -> str:
    """The name of an autograd node without its suffix, as in "Relu" for ReluBackward0."""
    return str(node.name()).rpartition(":")[2].rstrip("0123456789").removesuffix("Backward")


def trace_link(
    node: Any, outputs: Mapping[Any, str], dropouts: Mapping[Any, tuple[float, Any]]
) -> Link | None:
    """Follows a tensor back to the layer that it comes from by elementwise steps alone.

    Args:
        node: the `grad_fn` of the tensor.
        outputs: for the `grad_fn` of each layer's output, the name of the layer.
        dropouts: for the `grad_fn` of each dropout module's output, its probability and the
            `grad_fn` of its input.

    Returns:
        The link, or None if anything else than one activation, reshaping and dropout modules
        stands in between.
    """
    activation, slope, dropout = "identity", 0.0, 0.0
    for _ in range(_LONGEST_PATH):
        if node is None:
            return None
        if node in outputs:
            return Link(outputs[node], activation, slope, dropout)
        if node in dropouts:
            dropout, node = dropouts[node]
            continue
        name = operation(node)
        if name in _ACTIVATIONS:
            if activation != "identity":
                return None
            found = _recognise(name, node)
            if found is None:
                return None
            activation, slope = found
        elif name not in _PASSING:
            return None
        node = node.next_functions[0][0]
    return None


def adds_its_input(output: Any, inputs: Any) -> bool:
    """Whether a module's output is its input plus something: a residual block.

    Args:
        output: the `grad_fn` of its output.
        inputs: the `grad_fn` of its input.

    Returns:
        True if a path of additions, after at most a norm or an activation on top of them, leads
        from the output to the input.
    """
    for _ in range(_LONGEST_PATH):
        if output is None or operation(output) == "Add":
            break
        if operation(output) not in _AROUND_A_SUM:
            return False
        output = output.next_functions[0][0]
    pending: list[Any] = [output]
    seen: set[Any] = set()
    while pending and len(seen) < _LARGEST_SEARCH:
        node = pending.pop()
        if node is None or node in seen:
            continue
        if node is inputs:
            return bool(seen)
        seen.add(node)
        if operation(node) in _ADDITIVE:
            pending.extend(parent for parent, _ in node.next_functions)
    return False


def _recognise(name: str, node: Any) -> tuple[str, float] | None:
    """Name and slope of an activation; None for a variant that theory has no law for."""
    if name == "LeakyRelu":
        return "leaky_relu", float(node._saved_negative_slope)
    if name == "Gelu":
        return ("gelu_tanh" if node._saved_approximate == "tanh" else "gelu"), 0.0
    if name == "Elu":
        parts = (node._saved_alpha, node._saved_scale, node._saved_input_scale)
        return ("elu", 0.0) if all(float(part) == 1.0 for part in parts) else None
    return _ACTIVATIONS[name], 0.0

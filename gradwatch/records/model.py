"""What is known about the model that is watched."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerInfo:
    """One layer: fixed facts, then what its first training forward pass showed.

    Attributes:
        name: canonical module name.
        kind: class name of the module.
        fan_in: inputs that one output unit sees; 0 where the notion does not apply.
        fan_out: outputs that one input unit feeds; 0 where it does not apply.
        width: output units or channels; 0 where the notion does not apply.
        has_bias: the layer adds a bias.
        activation: what stands between this layer and the next one, named as in
            `gradwatch.theory.norm_preservation`; None where it was not recognised.
        negative_slope: of a leaky ReLU.
        kappa: relative variance of one unit's squared output behind that activation.
        dropout: probability of the dropout between this layer and the next.
        padding_factor: mean share of kernel taps that fall inside the map; 1 without padding.
        segment: number of the chain of layers, linked by activations alone, it belongs to.
        position: its place in that chain, from 0.
        weight_variance: mean square of the weights [P²].
        weight_kurtosis: fourth over squared second moment of the weights.
        alignment: log of the pre-activation power over what these weights would give on
            average for an input they know nothing of; near 0 until the weights are trained.
        bias_share: share of the bias in the mean square of the pre-activation.
        input_mean_square: of the layer's first input [A²].
        one_hot_input: every input row has a single non-zero entry.
    """

    name: str
    kind: str
    fan_in: int = 0
    fan_out: int = 0
    width: int = 0
    has_bias: bool = False
    activation: str | None = None
    negative_slope: float = 0.0
    kappa: float | None = None
    dropout: float = 0.0
    padding_factor: float = 1.0
    segment: int | None = None
    position: int = 0
    weight_variance: float | None = None
    weight_kurtosis: float | None = None
    alignment: float | None = None
    bias_share: float | None = None
    input_mean_square: float | None = None
    one_hot_input: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class DropoutInfo:
    """One dropout module.

    Attributes:
        name: canonical module name.
        probability: of dropping a unit.
    """

    name: str
    probability: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """The facts about a model that bounds and rules need.

    Attributes:
        parameters: canonical names of the watched parameters, tied ones once.
        layers: the modules that own parameters, in module order.
        activations: names of the activation modules.
        normalisations: names of the normalisation modules.
        dropouts: the dropout modules.
        residual_blocks: modules whose output is their input plus something, as the first
            forward pass showed.
        recurrent: names of the recurrent modules.
        frozen: parameters with `requires_grad=False`.
        not_optimized: trainable parameters that no watched optimizer holds.
        untouched_optimizer: the optimizer had no state when the watch began, so the first
            step seen is the first of the training.
        parameter_count: number of entries of all watched parameters.
        train_size: number of training samples, if the user said so.
        planned_steps: planned number of optimizer steps, if the user said so.
    """

    parameters: tuple[str, ...] = ()
    layers: tuple[LayerInfo, ...] = ()
    activations: tuple[str, ...] = ()
    normalisations: tuple[str, ...] = ()
    dropouts: tuple[DropoutInfo, ...] = ()
    residual_blocks: tuple[str, ...] = ()
    recurrent: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()
    not_optimized: tuple[str, ...] = ()
    untouched_optimizer: bool = True
    parameter_count: int = 0
    train_size: int | None = None
    planned_steps: int | None = None

    @property
    def depth(self) -> int:
        """Number of layers with weights that map units to units (fan-in above 0)."""
        return sum(1 for layer in self.layers if layer.fan_in > 0)

    def layer(self, name: str) -> LayerInfo | None:
        """The layer of that name, or None."""
        return next((layer for layer in self.layers if layer.name == name), None)

    def chain(self, name: str) -> tuple[LayerInfo, ...]:
        """The chain that a layer belongs to, from its first layer on; empty if to none."""
        layer = self.layer(name)
        segment = None if layer is None else layer.segment
        return next((chain for chain in self.chains if chain[0].segment == segment), ())

    @property
    def chains(self) -> tuple[tuple[LayerInfo, ...], ...]:
        """The layers linked by activations alone, each chain from its first layer on."""
        found: dict[int, list[LayerInfo]] = {}
        for layer in self.layers:
            if layer.segment is not None:
                found.setdefault(layer.segment, []).append(layer)
        ordered = (sorted(chain, key=lambda layer: layer.position) for chain in found.values())
        return tuple(map(tuple, ordered))

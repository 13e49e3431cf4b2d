"""Norm preservation at initialisation: what a layer, a chain and a width should do.

All three speak at step 0 only, of chains of at least two layers (a single layer between two
normalisations, or in a residual branch, need not preserve anything). They are undecided where
the law does not apply: an optimizer that already has state, weights that are no fresh random
draw (pretrained, zero-initialised, sparse), one-hot inputs, layers of fewer than 16 units, a
curved activation far from the pre-activation of unit variance, its only fixed point. Biases play
no part, since the gain that is judged is measured without them.

References:
    Arpit and Bengio 2019, "The Benefits of Over-parameterization at Initialization in Deep ReLU
    Networks", arXiv:1901.03611. The one-layer law, its variance 5/m and the values for other
    activations are derived in `gradwatch.theory.norm_preservation`.
"""

import math
from typing import ClassVar, Final

from typing_extensions import override

from gradwatch.interfaces import Bound
from gradwatch.records import Interval, LayerInfo, Measurement, ModelInfo, StepInfo
from gradwatch.theory.norm_preservation import (
    NARROWEST,
    ActivationLaw,
    activation_law,
    activation_second_moment,
    norm_variance,
)

SIGMAS: Final = 4.0
"""Standard deviations of the law that one random draw may be off."""
SMALLEST_TOLERANCE: Final = 0.1
"""Smaller deviations of the log gain hurt nobody, however significant."""
SHORTEST_CHAIN: Final = 2
SPREAD_TOLERANCE: Final = 0.5
"""Wanted standard deviation of the log squared norm between initialisations."""

_KURTOSIS: Final = (1.5, 3.6)
"""Uniform weights have 1.8, normal ones 3; trained, sparse or constant ones lie outside."""
_UNIT_RANGE: Final = (0.5, 2.0)
"""Pre-activation variances at which a curved activation is near its fixed point."""


class NormPreservation(Bound):
    """One layer and its activation keep the mean square of the signal.

    For weights of variance `1/(m2 n)`, `m2 = E phi(z)²`, the gain has mean 1 and its logarithm a
    standard deviation of `sqrt(kappa/m)`; 2/n and 5 for ReLU. Allowed is
    `max(0.1, 4 sqrt(kappa/m))` on either side. Weights scaled for the fan-out preserve the norm
    instead of the mean square; where a whole chain is scaled like that, it is judged by that.
    """

    metric = "activation_gain"
    source: ClassVar[str] = (
        "Arpit & Bengio 2019, arXiv:1901.03611 (norm preservation); variance kappa/m derived"
    )

    @override
    def interval(
        self, measurement: Measurement, step: StepInfo, model: ModelInfo
    ) -> Interval | None:
        chain = initial_chain(measurement, step, model)
        if not chain:
            return None
        layer = next(item for item in chain if item.name == measurement.scope)
        expected = expected_log_gain(layer, by_fan_out(chain))
        tolerance = max(SMALLEST_TOLERANCE, SIGMAS * math.sqrt((layer.kappa or 0.0) / layer.width))
        because = doubt(layer, model) or too_narrow(layer)
        return _around(expected, tolerance, because)


class ChainNormPreservation(Bound):
    """A chain of layers keeps the mean square of the signal.

    At a norm-preserving initialisation the log of the product of the gains is close to normal
    with mean `-V/2` and variance `V = sum_l kappa/m_l`; allowed are 4 standard deviations.
    """

    metric = "activation_gain_cumulative"
    source: ClassVar[str] = (
        "Arpit & Bengio 2019, arXiv:1901.03611; log-normal law derived, with the 1/width sum of "
        "Hanin & Rolnick 2018, arXiv:1803.01719"
    )

    @override
    def interval(
        self, measurement: Measurement, step: StepInfo, model: ModelInfo
    ) -> Interval | None:
        chain = initial_chain(measurement, step, model)
        if not chain:
            return None
        names = [layer.name for layer in chain]
        upstream = chain[: names.index(measurement.scope) + 1]
        fan_out = by_fan_out(chain)
        kappas = [layer.kappa or 0.0 for layer in upstream]
        variance = norm_variance([layer.width for layer in upstream], kappas)
        expected = sum(expected_log_gain(layer, fan_out) for layer in upstream) - variance / 2
        tolerance = max(SMALLEST_TOLERANCE, SIGMAS * math.sqrt(variance))
        reasons = (doubt(layer, model) or too_narrow(layer) for layer in upstream)
        return _around(expected, tolerance, next(filter(None, reasons), ""))


class StableWidth(Bound):
    """The signal's norm varies little between random initialisations of the same chain.

    `V = sum_l kappa/m_l <= tau²` with `tau = 0.5`: beyond it, the norm differs by more than
    `exp(tau/2)` between seeds. This needs no minimal width: a narrow layer is what it is about.
    """

    metric = "gain_log_variance"
    source: ClassVar[str] = (
        "derived from the one-layer law of Arpit & Bengio 2019, arXiv:1901.03611; the 1/width "
        "sum as in Hanin & Rolnick 2018, arXiv:1803.01719"
    )

    @override
    def interval(
        self, measurement: Measurement, step: StepInfo, model: ModelInfo
    ) -> Interval | None:
        chain = initial_chain(measurement, step, model)
        if not chain:
            return None
        because = next(filter(None, (doubt(layer, model) for layer in chain)), "")
        if any(layer.kind.startswith("Conv") and layer.fan_in > layer.width for layer in chain):
            because = because or "V is only an upper bound where positions share weights"
        return Interval(lower=0.0, upper=SPREAD_TOLERANCE**2, kind="law", undecided=because)


def initial_chain(
    measurement: Measurement, step: StepInfo, model: ModelInfo
) -> tuple[LayerInfo, ...]:
    """The chain that these statements are about.

    Args:
        measurement: of one of its layers.
        step: the settings of its step.
        model: facts about the model.

    Returns:
        Its layers, or none at a later step and where there are fewer than two.
    """
    chain = model.chain(measurement.scope)
    return chain if step.step == 0 and len(chain) >= SHORTEST_CHAIN else ()


def law_of(layer: LayerInfo) -> ActivationLaw:
    """The law of the activation behind a layer.

    Args:
        layer: a layer of a chain.

    Returns:
        Its moments and the gain that preserves the norm.
    """
    return activation_law(layer.activation or "identity", negative_slope=layer.negative_slope)


def expected_log_gain(layer: LayerInfo, fan_out: bool) -> float:
    """Log of the gain that norm-preserving weights would have, for the input as it is.

    Args:
        layer: a layer of a chain.
        fan_out: its weights are scaled for the fan-out.

    Returns:
        0 for a positively homogeneous activation and fan-in scaling without padding.
    """
    law = law_of(layer)
    convention = math.log(layer.fan_in / layer.fan_out) if fan_out else 0.0
    arriving = layer.input_mean_square
    if law.homogeneous or not arriving or not math.isfinite(arriving):
        return math.log(layer.padding_factor) + convention
    leaving = activation_second_moment(law.name, preserved_variance(layer))
    return math.log(leaving / arriving) + convention


def preserved_variance(layer: LayerInfo) -> float:
    """Variance of the pre-activation that norm-preserving weights would give, `q/E phi(z)²`.

    Args:
        layer: a layer of a chain, with its weight facts.

    Returns:
        1 at the fixed point, where the input has the mean square `E phi(z)²`.
    """
    law = law_of(layer)
    return (layer.input_mean_square or 0.0) * layer.padding_factor / law.second_moment


def by_fan_out(chain: tuple[LayerInfo, ...]) -> bool:
    """Whether all weights of a chain are scaled for the fan-out and not for the fan-in.

    Args:
        chain: the layers, with their weight facts.

    Returns:
        True only if each layer fits; square layers fit both.
    """
    return all(_fits(layer, layer.fan_out) for layer in chain) and not all(
        _fits(layer, layer.fan_in) for layer in chain
    )


def doubt(layer: LayerInfo, model: ModelInfo) -> str:
    """Why the law may not apply to a layer; empty if it does.

    Args:
        layer: a layer of a chain, with its weight facts.
        model: facts about the model.

    Returns:
        The reason in words.
    """
    if not model.untouched_optimizer:
        return "the optimizer already has state, so this is not the initialisation"
    if not layer.weight_variance or not math.isfinite(layer.weight_variance):
        return f"the weights of {layer.name} are all zero or not finite"
    if layer.one_hot_input:
        return f"the input of {layer.name} is one-hot"
    if not _is_random_draw(layer):
        return f"the weights of {layer.name} are no fresh random draw (trained or special)"
    law = law_of(layer)
    low, high = _UNIT_RANGE
    if not law.homogeneous and not low <= preserved_variance(layer) <= high:
        return f"{law.name} keeps norms near unit variance only; {layer.name} is far from it"
    return ""


def too_narrow(layer: LayerInfo) -> str:
    """Why a layer has too few units for the normal approximation; empty if it has enough.

    Args:
        layer: any layer.

    Returns:
        The reason in words.
    """
    few = layer.width < NARROWEST
    return f"{layer.name} has only {layer.width} units" if few else ""


def _around(expected: float, tolerance: float, because: str) -> Interval:
    return Interval(
        lower=math.exp(expected - tolerance),
        upper=math.exp(expected + tolerance),
        kind="law",
        undecided=because,
    )


def _fits(layer: LayerInfo, fan: int) -> bool:
    law = law_of(layer)
    product = (layer.weight_variance or 0.0) * fan * law.second_moment
    return product > 0 and abs(math.log(product)) <= SMALLEST_TOLERANCE


def _is_random_draw(layer: LayerInfo) -> bool:
    """Independent weights have a known kurtosis and know nothing of the input."""
    if layer.weight_kurtosis is None or layer.alignment is None:
        return False
    entries = max(1, layer.fan_in * layer.width)
    low, high = _KURTOSIS
    kurtosis_fits = low <= layer.weight_kurtosis <= high + 5 * math.sqrt(24 / entries)
    slack = 3 * SMALLEST_TOLERANCE + SIGMAS * math.sqrt(2 / max(1, layer.width))
    return kurtosis_fits and abs(layer.alignment) <= slack

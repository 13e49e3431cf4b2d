"""The knob `init`: weights that shrink or blow up the signal from layer to layer."""

import math
from collections.abc import Iterable, Iterator, Sequence

from typing_extensions import override

from gradwatch.interfaces import Rule
from gradwatch.records import History, LayerInfo, Recommendation, Report, Verdict
from gradwatch.rules.chain import severity_of_factor, span
from gradwatch.theory.norm_preservation import NARROWEST

LAYER_BOUND = "NormPreservation"
CHAIN_BOUND = "ChainNormPreservation"


class Initialisation(Rule):
    """Recommends the gain that preserves the norm, for layers whose own gain does not.

    It speaks of chains of at least two layers without normalisation, residual sum or pooling
    inside, from the verdicts of step 0, and is silent where one of those is undecided. It fires for
    a layer outside `NormPreservation` and for a chain outside `ChainNormPreservation`. The
    weights should be multiplied by `exp(-e/2)`, where `e` is the log gain less the expected one:
    exact for ReLU and its relatives. The severity follows what is left of the signal's norm at
    the end of the chain: `info` within [0.1, 10], `advice` within [0.01, 100], else `warning`.

    References:
        Arpit and Bengio 2019, arXiv:1901.03611.
    """

    @override
    def advise(self, history: History) -> Iterable[Recommendation]:
        first = history[0]
        if first.step > 0:
            return
        for chain in history.model.chains:
            names = {layer.name for layer in chain}
            layers = _verdicts(first, LAYER_BOUND, names)
            whole = _verdicts(first, CHAIN_BOUND, names)
            wrong = [verdict for verdict in layers if verdict.status == "violated"]
            if _in_doubt(chain, layers):
                continue
            if wrong:
                yield from _advise_layers(chain, wrong, whole)
            elif whole and whole[-1].status == "violated":
                yield _recommend(chain, whole[-1:], whole, _excess(whole[-1]) / len(chain))


def _verdicts(report: Report, bound: str, names: set[str]) -> list[Verdict]:
    return [
        verdict
        for verdict in report.verdicts
        if verdict.bound == bound and verdict.measurement.scope in names
    ]


def _in_doubt(chain: Sequence[LayerInfo], layers: Sequence[Verdict]) -> bool:
    """Whether the law fails for a layer for another reason than that it is narrow.

    A single doubtful layer means that the chain as a whole is no fresh random draw, or that a
    curved activation is far from its fixed point; half an advice would be a wrong one.
    """
    wide = {layer.name for layer in chain if layer.width >= NARROWEST}
    return any(item.status == "undecided" and item.measurement.scope in wide for item in layers)


def _advise_layers(
    chain: Sequence[LayerInfo], wrong: Sequence[Verdict], whole: Sequence[Verdict]
) -> Iterator[Recommendation]:
    """One recommendation for all layers that are off alike, another one for the next kind.

    Yields:
        The recommendations.
    """
    position = {layer.name: index for index, layer in enumerate(chain)}
    groups: list[list[Verdict]] = []
    for verdict in wrong:
        alike = [
            group
            for group in groups
            if abs(_excess(group[0]) - _excess(verdict)) < _tolerance(verdict)
        ]
        if alike:
            alike[0].append(verdict)
        else:
            groups.append([verdict])
    for group in groups:
        members = [chain[position[verdict.measurement.scope]] for verdict in group]
        excess = sum(map(_excess, group)) / len(group)
        yield _recommend(members, group, whole, excess)


def _excess(verdict: Verdict) -> float:
    """Log of the measured gain over the expected one, the middle of the interval in logs."""
    middle = (math.log(verdict.interval.lower) + math.log(verdict.interval.upper)) / 2
    value = verdict.measurement.value
    return math.log(value) - middle if value > 0 else -math.inf


def _tolerance(verdict: Verdict) -> float:
    return (math.log(verdict.interval.upper) - math.log(verdict.interval.lower)) / 2


def _recommend(
    layers: Sequence[LayerInfo],
    evidence: Sequence[Verdict],
    whole: Sequence[Verdict],
    excess: float,
) -> Recommendation:
    damage = math.exp(_worst(whole) / 2) if whole else math.exp(excess * len(layers) / 2)
    gains = [math.sqrt((layer.weight_variance or 0.0) * layer.fan_in) for layer in layers]
    current = sum(gains) / len(gains)
    factor = math.exp(-excess / 2)
    verb = "shrinks" if excess < 0 else "amplifies"
    each = "each layer" if len(layers) > 1 else "this layer"
    return Recommendation(
        knob="init",
        scope=span(layers),
        targets=tuple(layer.name for layer in layers),
        current=current,
        proposed=current * factor,
        unit="gain",
        severity=severity_of_factor(damage),
        reason=(
            f"{each} {verb} the mean square of the signal to {math.exp(excess):.3g} of what "
            f"norm-preserving weights give, which changes its norm by a factor {damage:.2g} along "
            f"the chain{_crossing(whole)}; multiply the weights by {factor:.3g}, that is use a "
            f"standard deviation of {current * factor:.3g}/sqrt(fan_in)"
        ),
        expected="activation_gain near 1 in every layer; gradients of one size in all layers",
        evidence=tuple(evidence),
        source=evidence[0].source,
    )


def _worst(whole: Sequence[Verdict]) -> float:
    return max((_excess(verdict) for verdict in whole), key=abs)


def _crossing(whole: Sequence[Verdict]) -> str:
    """The layer where the signal has first changed by more than a factor of two."""
    for verdict in whole:
        if abs(_excess(verdict)) > math.log(2):
            return f" (beyond a factor 2 from {verdict.measurement.scope} on)"
    return ""

"""Completes the facts about a model with what its first training forward showed."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from gradwatch.capture.forward.graph import Link
from gradwatch.capture.forward.weights import WEIGHT_FACTS
from gradwatch.records import LayerInfo, ModelInfo
from gradwatch.theory.norm_preservation import activation_law


def link_layers(
    model: ModelInfo,
    *,
    links: Mapping[str, Link | None],
    chained: Mapping[str, Link],
    padding: Mapping[str, float],
    residual_blocks: set[str],
) -> ModelInfo:
    """Adds links, chains and residual blocks.

    Args:
        model: the facts known before.
        links: for each layer, where its input comes from, in the order of execution.
        chained: for each layer of a chain, what stands between it and the next one.
        padding: `spatial_padding` of each of them.
        residual_blocks: modules that add their input to their output.

    Returns:
        The facts with what the first forward showed.
    """
    places = _segments(chained, links)
    layers = [
        _linked(layer, chained[layer.name], places[layer.name], padding[layer.name])
        if layer.name in chained
        else layer
        for layer in model.layers
    ]
    innermost = [
        name
        for name in residual_blocks
        if not any(other.startswith(f"{name}.") for other in residual_blocks)
    ]
    return replace(model, layers=tuple(layers), residual_blocks=tuple(sorted(innermost)))


def add_weight_facts(model: ModelInfo, facts: Mapping[str, Sequence[float]]) -> ModelInfo:
    """Adds the statistics of the initial weights.

    Args:
        model: the facts known before.
        facts: for each layer, the numbers of `weight_facts` on the host.

    Returns:
        The completed facts.
    """
    layers = [
        replace(layer, **_named(facts[layer.name])) if layer.name in facts else layer
        for layer in model.layers
    ]
    return replace(model, layers=tuple(layers))


def _named(numbers: Sequence[float]) -> dict[str, Any]:
    known: dict[str, Any] = dict(zip(WEIGHT_FACTS, numbers, strict=True))
    known["one_hot_input"] = known["one_hot_input"] > 0
    return known


def _segments(
    chained: Mapping[str, Link], links: Mapping[str, Link | None]
) -> dict[str, tuple[int, int]]:
    """Number of the segment and place in it; a fork starts new segments."""
    origins = {
        name: link.origin
        for name in chained
        if (link := links.get(name)) is not None and link.origin in chained
    }
    forks = Counter(origins.values())
    places: dict[str, tuple[int, int]] = {}
    count = 0
    for name in links:  # in the order of execution, so an origin comes before what it feeds
        if name not in chained:
            continue
        origin = origins.get(name)
        if origin is not None and forks[origin] == 1:
            segment, position = places[origin]
            places[name] = (segment, position + 1)
        else:
            places[name] = (count, 0)
            count += 1
    return places


def _linked(layer: LayerInfo, link: Link, place: tuple[int, int], padding: float) -> LayerInfo:
    law = activation_law(link.activation, negative_slope=link.negative_slope)
    return replace(
        layer,
        activation=link.activation,
        negative_slope=link.negative_slope,
        kappa=law.kappa,
        dropout=link.dropout,
        padding_factor=padding,
        segment=place[0],
        position=place[1],
    )

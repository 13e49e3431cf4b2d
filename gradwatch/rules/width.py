"""The knob `width`: layers too narrow for the depth."""

import math
from collections.abc import Iterable, Sequence

from typing_extensions import override

from gradwatch.interfaces import Rule
from gradwatch.records import History, LayerInfo, Recommendation, Verdict
from gradwatch.rules.chain import severity_of_factor, span
from gradwatch.theory.norm_preservation import width_for_stability


class Width(Rule):
    """Recommends a width at which the signal's norm varies little between initialisations.

    From `StableWidth` at step 0, for chains of at least two layers: `width >= kappa L/tau²` with
    `tau²` the upper edge of the verdict. The severity follows the range in which 95 % of random
    initialisations fall: their norm at the end of the chain is off by a factor of up to
    `exp(V/4 + sqrt(V))`. The uniform PAC widths are vacuous at realistic sizes and are never
    recommended.

    References:
        derived from Arpit and Bengio 2019, arXiv:1901.03611; the 1/width sum as in Hanin and
        Rolnick 2018, arXiv:1803.01719.
    """

    @override
    def advise(self, history: History) -> Iterable[Recommendation]:
        first = history[0]
        for verdict in first.verdicts:
            chain = history.model.chain(verdict.measurement.scope)
            concerned = verdict.bound == "StableWidth" and verdict.status == "violated"
            if first.step == 0 and concerned and len(chain) > 1:
                yield _recommend(verdict, chain)


def _recommend(verdict: Verdict, chain: Sequence[LayerInfo]) -> Recommendation:
    variance, depth = verdict.measurement.value, len(chain)
    kappa = sum(layer.kappa or 0.0 for layer in chain) / depth
    spread = math.exp(variance / 4 + math.sqrt(variance))
    return Recommendation(
        knob="width",
        scope=span(chain),
        targets=tuple(layer.name for layer in chain),
        current=round(kappa * depth / variance),
        proposed=width_for_stability(depth, math.sqrt(verdict.interval.upper), kappa),
        unit="units",
        severity=severity_of_factor(spread),
        reason=(
            f"{depth} layers as narrow as these change the signal's norm by a factor of up to "
            f"{spread:.2g} from one random initialisation to the next; make them wider, or put "
            "normalisation or skip connections in"
        ),
        expected="gain_log_variance below 0.25",
        evidence=(verdict,),
        source=verdict.source,
    )

"""Several reasons for one change of one knob, as one recommendation."""

from collections.abc import Sequence
from dataclasses import replace

from gradwatch.records import SEVERITIES, History, Recommendation
from gradwatch.rules.curvature import evidence, stability
from gradwatch.table import number


def combined(recommendations: Sequence[Recommendation]) -> Recommendation | None:
    """One recommendation that respects all of them, with all their reasons and evidence.

    Args:
        recommendations: of one knob and scope and one direction; one without a number adds its
            reason.

    Returns:
        The recommendation with the smallest of the proposed settings, and the highest severity;
        None if there are none.
    """
    if not recommendations:
        return None
    first, *others = recommendations
    settings = [item.proposed for item in recommendations if item.proposed is not None]
    evidence = [verdict for item in recommendations for verdict in item.evidence]
    if not others:
        return first
    return Recommendation(
        knob=first.knob,
        scope=first.scope,
        targets=first.targets,
        current=first.current,
        proposed=min(settings, default=None),
        unit=first.unit,
        severity=max((item.severity for item in recommendations), key=SEVERITIES.index),
        reason="; and ".join(_distinct([item.reason for item in recommendations])),
        expected="; ".join(_distinct([item.expected for item in recommendations])),
        evidence=tuple(
            verdict for place, verdict in enumerate(evidence) if verdict not in evidence[:place]
        ),
        source="; ".join(_distinct([item.source for item in recommendations])),
    )


def with_curvature(
    recommendation: Recommendation | None, history: History
) -> Recommendation | None:
    """Adds to a recommendation on the noise or the steps what the curvature says.

    Args:
        recommendation: on the learning rate, or None.
        history: the reports so far.

    Returns:
        The same proposal with both pieces of evidence; as it is where the curvature is not known.
    """
    state = stability(history)
    if recommendation is None or state is None:
        return recommendation
    return replace(
        recommendation,
        reason=(
            f"{recommendation.reason}; as for the curvature, {state}, lr is stable up to "
            f"{number(state.limit)}"
        ),
        evidence=(*recommendation.evidence, *evidence(history)),
    )


def _distinct(texts: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(text for text in texts if text))

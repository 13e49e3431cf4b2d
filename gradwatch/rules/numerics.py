"""The knob `numerics`: values that are not finite."""

from collections.abc import Iterable

from typing_extensions import override

from gradwatch.interfaces import Rule
from gradwatch.records import MODEL, History, Recommendation, Report, Verdict

# Where the trouble is seen first: forward, then backward, then in the weights.
FAMILIES = {
    "nonfinite_activation": "the output of layer",
    "nonfinite_gradient": "the gradient of",
    "nonfinite_parameter": "the parameter",
}


class Numerics(Rule):
    """Warns of infinite or undefined values and names where they were first seen.

    It speaks from the verdicts of `AllFinite` on the newest report. A step that a loss scaler
    skipped is routine and brings no warning.
    """

    @override
    def advise(self, history: History) -> Iterable[Recommendation]:
        report = history[-1]
        wrong = {
            verdict.measurement.metric: verdict
            for verdict in report.verdicts
            if verdict.bound == "AllFinite" and verdict.status == "violated"
        }
        for metric, where in FAMILIES.items():
            if metric in wrong:
                yield _recommend(report, wrong[metric], where)
                return


def _recommend(report: Report, verdict: Verdict, where: str) -> Recommendation:
    metric = verdict.measurement.metric
    named = (item for item in report.measurements if item.metric == metric)
    first = next((item for item in named if item.scope != MODEL), verdict.measurement)
    return Recommendation(
        knob="numerics",
        scope=first.scope,
        targets=() if first.scope == MODEL else (first.scope,),
        severity="warning",
        reason=(
            f"{where} {first.scope} is not finite at step {first.step}, first of "
            f"{verdict.measurement.value:.0f}; look at the batch of that step, lower the learning "
            "rate, or clip gradients"
        ),
        expected="all values finite",
        evidence=(verdict,),
        source=verdict.source,
        since_step=first.step,
    )

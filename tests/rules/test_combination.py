"""Several reasons for one change."""

import math

from gradwatch.records import Interval, Measurement, Recommendation, Verdict
from gradwatch.rules.combination import combined

VALUE = Measurement(metric="sharpness", scope="model", step=1, value=math.nan)
ONE, OTHER = (
    Verdict.of(VALUE, Interval(upper=2.0), bound=bound, source="here") for bound in ("A", "B")
)
LOWER = Recommendation(
    knob="learning_rate", current=0.1, proposed=0.05, unit="P²/L", severity="advice",
    reason="one", expected="less", evidence=(ONE,), source="here",
)  # fmt: skip
LOWEST = Recommendation(
    knob="learning_rate", current=0.1, proposed=0.02, unit="P²/L", severity="warning",
    reason="two", expected="less", evidence=(ONE, OTHER), source="there",
)  # fmt: skip
NUMBERLESS = Recommendation(knob="learning_rate", current=0.1, severity="info", reason="three")


def test_the_smallest_setting_with_all_reasons_and_all_evidence() -> None:
    for order in ((LOWER, LOWEST), (LOWEST, LOWER)):
        found = combined(order)
        assert found is not None
        assert (found.proposed, found.severity, found.unit) == (0.02, "warning", "P²/L")
        assert "one" in found.reason
        assert "two" in found.reason
        assert found.expected == "less"
        assert {verdict.bound for verdict in found.evidence} == {"A", "B"}
        assert {"here", "there"} == set(found.source.split("; "))


def test_one_alone_stays_as_it_is() -> None:
    assert combined([LOWER]) is LOWER
    assert combined([]) is None


def test_a_reason_without_a_number_adds_itself() -> None:
    found = combined([NUMBERLESS, LOWER])
    assert found is not None
    assert (found.proposed, found.severity) == (0.05, "advice")
    assert "three" in found.reason
    alone = combined([NUMBERLESS, NUMBERLESS])
    assert alone is not None
    assert alone.proposed is None

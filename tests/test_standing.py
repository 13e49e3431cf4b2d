"""What stands at a moment of a training."""

from gradwatch.records import Interval, Measurement, ProbeUse, Recommendation, Report, Verdict
from gradwatch.standing import Standing


def measured(metric: str, step: int, value: float = 1.0) -> Measurement:
    return Measurement(metric=metric, scope="model", step=step, value=value)


def judged(item: Measurement) -> Verdict:
    return Verdict.of(item, Interval(upper=2.0), bound="Small", source="here")


def test_nothing_stands_before_the_first_report() -> None:
    assert Standing().summary() == Report(step=0, notes=("nothing has been measured yet",))


def test_a_verdict_that_is_given_once_stands_for_the_whole_run() -> None:
    standing = Standing()
    start = measured("gain", 0)
    standing.add(Report(step=0, measurements=(start,), verdicts=(judged(start),)))
    standing.add(Report(step=50, measurements=(measured("gain", 50, 3.0),)))
    summary = standing.summary()
    assert summary.step == 50
    assert summary.verdicts == (judged(start),)
    assert summary.value("gain") == 3.0


def test_the_newest_value_takes_the_place_of_an_older_one() -> None:
    standing = Standing()
    for step in range(100):
        item = measured("loss", step)
        standing.add(Report(step=step, measurements=(item,), verdicts=(judged(item),)))
    assert len(standing.summary().measurements) == 1
    assert len(standing.summary().verdicts) == 1


def test_advice_and_notes_are_those_of_the_newest_report() -> None:
    advice = Recommendation(knob="clip", reason="because")
    standing = Standing()
    for step in range(100):
        standing.add(Report(step=step, recommendations=(advice,), notes=(f"note {step}",)))
    standing.add(Report(step=100, notes=("the last",)))
    assert standing.summary().recommendations == ()
    assert standing.summary().notes == ("the last",)


def test_what_probes_cost_is_that_of_the_newest_report() -> None:
    standing = Standing()
    for share in (0.0, 0.01):
        standing.add(Report(step=1, probes=ProbeUse(share=share)))
    assert standing.summary().probes == ProbeUse(share=0.01)

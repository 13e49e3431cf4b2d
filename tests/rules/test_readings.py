"""Readings of the curvature, which may be many reports apart."""

from collections.abc import Callable
from dataclasses import replace

from gradwatch.records import History, ModelInfo, Recommendation, Report, StepInfo
from gradwatch.rules import LearningRate
from gradwatch.rules.readings import KEPT, curvature_readings

Histories = Callable[..., History]


def steps(history: History) -> list[int]:
    return [reading.step for reading in curvature_readings(history, "stability_ratio")]


def test_all_readings_in_order_each_once(curved_run: Histories) -> None:
    full, history = curved_run([0.5] * 5), History(ModelInfo())
    for report in full:
        history.append(report)
        steps(history)
        # as a watch does once it has the advice
        advised = (Recommendation(knob="clip", reason="because"),)
        history.replace_newest(replace(report, recommendations=advised))
        steps(history)
    assert steps(history) == [1000, 1050, 1100, 1150, 1200]
    assert steps(full) == steps(history)


def test_what_was_seen_before_the_first_look_counts(curved_run: Histories) -> None:
    assert steps(curved_run([0.5] * (KEPT + 6)))[0] == 1000 + 6 * 50


def test_a_reading_is_of_the_settings_of_its_own_step(curvature_of: Callable[..., object]) -> None:
    early, late = (StepInfo(step=at, optimizer="SGD", lrs=(lr,)) for at, lr in ((5, 0.1), (9, 0.2)))
    history = History(ModelInfo())
    measured = (*curvature_of(early, 0.5), *curvature_of(late, 0.5))  # type: ignore[misc]
    history.append(Report(step=9, steps=(early, late), measurements=measured))
    found = curvature_readings(history, "stability_ratio")
    assert [reading.info.lr for reading in found] == [0.1, 0.2]


def test_readings_of_a_layer_are_not_those_of_the_model(curved_run: Histories) -> None:
    history = curved_run([0.5])
    newest = history[-1]
    of_a_layer = tuple(replace(item, scope="layer") for item in newest.measurements)
    history.replace_newest(replace(newest, measurements=of_a_layer))
    assert steps(history) == []


def test_advice_stands_between_the_rare_readings(curved_run: Histories) -> None:
    gap = float("nan")

    def rising(step: int) -> float:
        return 0.2 * 1.0001 ** (step - 1000)

    ratios = ([1.5] + [gap] * 40) * 3
    assert list(LearningRate().advise(curved_run(ratios, rising)))

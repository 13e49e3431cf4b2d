"""Two rules that disagree never speak at once."""

import math
from collections.abc import Callable
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from gradwatch import presets
from gradwatch.interfaces import Rule
from gradwatch.records import History, Measurement, ModelInfo, Recommendation, StepInfo
from gradwatch.rules import Momentum

Values = Callable[..., Measurement]

LESS = {"learning_rate": "down", "batch_size": "up", "momentum": "down", "dropout": "down"}
"""Directions that take noise out of the steps."""
SHAPES: dict[str, Callable[[float], float]] = {
    "flat": lambda t: 0.2,
    "falls": lambda t: 0.2 * (1 - t / 2),
    "rises": lambda t: 0.2 * (1 + t),
    "explodes": lambda t: 2.3 * 10 ** (t * 8),
    "ends": lambda t: 0.2 if t < 0.8 else math.inf,
    "stuck": lambda t: 9.0,
}


def rules() -> list[Rule]:
    preset = presets.rules()
    known = [rule for rule in preset if isinstance(rule, Momentum)]
    return [*preset, *([] if known else [Momentum()])]


def contradictions(advice: list[Recommendation]) -> list[str]:
    """What two recommendations say against each other, in words."""
    knobs = [(item.knob, item.scope) for item in advice]
    found = [f"{knob} twice" for knob in set(knobs) if knobs.count(knob) > 1]
    direction: dict[str, str] = {item.knob: item.direction for item in advice}
    about_noise = {
        item.knob
        for item in advice
        if LESS.get(item.knob) == item.direction and "tenth of the noise scale" not in item.reason
    }
    more = {
        knob for knob in LESS if direction.get(knob) not in {None, "fix", LESS[knob]}
    }  # fmt: skip
    found += [f"less noise by {about_noise}, more by {more}"] if about_noise and more else []
    raised = direction.get("learning_rate") == "up"
    found += ["a larger step and a smaller batch"] * (
        raised and direction.get("batch_size") == "down" and _by_curvature(advice)
    )
    smaller = direction.get("learning_rate") == "down" or "momentum" in direction
    found += ["smaller steps, and more of the same"] * (smaller and "training_length" in direction)
    conjecture = any("conjecture" in item.reason for item in advice)
    found += ["a conjecture against the noise"] * (conjecture and bool(about_noise))
    return found


def _by_curvature(advice: list[Recommendation]) -> bool:
    return any("neither curvature nor noise" in item.reason for item in advice)


RATIO = st.sampled_from([0.05, 0.2, 0.5, 1.0, 1.3, 3.0]) | st.floats(0.01, 4.0)
NOISE = st.sampled_from([math.nan, 0.3, 1.8, 2.7]) | st.floats(0.01, 5.0)
SPREAD = st.floats(-1, 1)


@settings(max_examples=500)
@given(
    ratio=RATIO,
    growth=st.sampled_from([1.0, 1.0, 1.1, 0.9]),
    noise=NOISE,
    shape=st.sampled_from([*sorted(SHAPES), "flat", "rises"]),
    momentum=st.sampled_from([0.0, 0.9, 0.9, 0.5]),
    optimizer=st.sampled_from(["SGD", "SGD", "SGD", "Adam"]),
    stall=st.sampled_from([math.nan, 0.01, 0.05, 0.5, 1.5]),
    scale=st.sampled_from([math.nan, 0.1, 8.0, 900.0]),
    spreads=st.tuples(SPREAD, SPREAD, SPREAD),
    floor=st.sampled_from(["unknown", "noise", "anything"]),
    trend=st.sampled_from([-5.0, 0.0]),
    first=st.sampled_from([1.0, 10.0, 22.0, 60.0]),
    planned=st.sampled_from([None, 1400, 3000, 10**5]),
    covariance=st.sampled_from([math.nan, 2.0, 8.0]),
    begin=st.sampled_from([0, 1000]),
    size=st.sampled_from([8, 1000]),
)
def test_no_two_recommendations_contradict_each_other(
    ratio: float, growth: float, noise: float, shape: str, momentum: float, optimizer: str,
    stall: float, scale: float, spreads: tuple[float, float, float], trend: float, first: float,
    planned: int | None, covariance: float, begin: int, size: int, floor: str,
    curved_run: Callable[..., History], stationarity: Values, noise_scale: Values,
    value_of: Values,
) -> None:  # fmt: skip
    lr, count = 0.1, 8

    def others(step: StepInfo) -> list[Measurement]:
        found: list[Measurement] = []
        if floor != "unknown":
            usual = (0.0, 1.0, 0.5) if floor == "noise" else spreads
            smoothness, variance, square = (10**spread for spread in usual)
            inputs: dict[str, float] = {
                "smoothness": 0.7 * smoothness, "variance": 1.5 * variance, "step_size": lr,
                "loss_trend": trend, "smoothness_is_secant": 1.0, "momentum": momentum,
                "batch_size": 8.0,
            }  # fmt: skip
            found.append(stationarity(0.02 * square, **inputs))
        if not math.isnan(scale):
            found.append(noise_scale(scale, batch_size=float(size)))
        if not math.isnan(stall):
            found.append(value_of("stall_ratio", stall, 0.1 * stall))
        if not math.isnan(covariance):
            found.append(value_of("covariance_ratio", covariance, resolved=1.0))
        return found

    readings = [ratio * growth**place for place in range(count)]
    span = float(begin + 50 * count)
    settings: dict[str, Any] = {
        "optimizer": optimizer, "momentum": None if optimizer == "Adam" else momentum,
        "betas": (0.9, 0.999) if optimizer == "Adam" else None, "batch_size": size, "epoch": 1.0,
    }  # fmt: skip
    history = curved_run(
        readings,
        lambda step: SHAPES[shape]((step - begin) / (span - begin)) * (1.01 if step % 3 else 1.0),
        noise=[] if math.isnan(noise) or optimizer == "Adam" else [noise] * count,
        inputs={"first_sharpness": first},
        others=others,
        model=ModelInfo(planned_steps=planned),
        begin=begin,
        **settings,
    )
    advice = [item for rule in rules() for item in rule.advise(history)]
    assert contradictions(advice) == []
    for item in advice:
        assert "nan" not in item.reason
        assert item.proposed is None or (math.isfinite(item.proposed) and item.proposed > 0)

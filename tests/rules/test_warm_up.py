"""First steps that are too large for the first weights."""

import math
from collections.abc import Callable
from typing import Any

import pytest

from gradwatch.records import History, ModelInfo, Recommendation
from gradwatch.rules import LearningRate

Histories = Callable[..., History]
GAP = math.nan
START = {"first_sharpness": 22.0, "readings": 1.0}  # 1.1 of the threshold at lr 0.1


def above(step: int) -> float:
    return 2.3 if step == 0 else 2.35 + 0.1 * math.sin(step)


def advice(history: History) -> list[Recommendation]:
    return list(LearningRate().advise(history))


def test_a_start_above_the_threshold_needs_a_warm_up(curved_run: Histories) -> None:
    assert advice(curved_run([1.1], above, begin=0, inputs=START)) == []  # of one loss
    (found,) = advice(curved_run([1.1, GAP], above, begin=0, inputs=START))
    assert (found.knob, found.severity, found.direction) == ("learning_rate", "info", "down")
    assert found.proposed == pytest.approx(1 / 22)
    assert "warm-up" in found.reason
    assert "22 = 1.1 of the stability threshold" in found.reason


def test_with_momentum_from_1_plus_beta_over_the_sharpness(curved_run: Histories) -> None:
    heavy = {"first_sharpness": 40.0, "threshold": 38.0}
    history = curved_run([1.1, GAP], above, begin=0, inputs={**START, **heavy}, momentum=0.9)
    assert advice(history)[0].proposed == pytest.approx(1.9 / 40)


SILENCES: dict[str, dict[str, Any]] = {
    "a start below the threshold": {"inputs": {**START, "first_sharpness": 19.9}},
    "a loss below the first one": {"losses": lambda step: 2.3 - 0.002 * step},
    "a catapult": {"losses": lambda step: 2.3 if step == 0 else 40.0 * 0.8**step + 0.5},
    "an unknown loss": {"losses": lambda step: None},
    "late": {"ratios": [1.1] + [GAP] * 10},
    "a start that nobody saw": {"model": ModelInfo(untouched_optimizer=False)},
    "an unconverged start": {"inputs": {**START, "relative_error": 0.06}},
    "clipping": {"inputs": {**START, "clipped_share": 0.21}},
    "several learning rates": {"inputs": {**START, "groups_differ": 1.0}},
    "a warm-up that there is already": {"inputs": {**START, "first_learning_rate": 0.01}},
    "a first step that was a little smaller": {
        "inputs": {**START, "first_sharpness": 20.4, "first_learning_rate": 0.096}
    },
    "few examples": {"inputs": {**START, "examples": 127.0}},
    "another gradient": {"inputs": {**START, "gradient_scale": 16.0}},
    "Adam": {"optimizer": "Adam", "betas": (0.9, 0.999)},
    "another optimizer": {"optimizer": "Lion"},
}


@pytest.mark.parametrize("why", SILENCES)
def test_no_warm_up_for(why: str, curved_run: Histories) -> None:
    changes = {"ratios": [1.1, GAP], "losses": above, "inputs": START, **SILENCES[why]}
    ratios, losses = changes.pop("ratios"), changes.pop("losses")
    assert advice(curved_run(ratios, losses, begin=0, **changes)) == []


def test_in_a_long_training_the_start_lasts_longer(curved_run: Histories) -> None:
    def build(planned: int) -> History:
        model, ratios = ModelInfo(planned_steps=planned), [1.1] + [GAP] * 10
        return curved_run(ratios, above, begin=0, inputs=START, model=model)

    assert advice(build(10_001)) != []
    assert advice(build(10_000)) == []


def test_few_examples_that_are_all_of_them_speak(curved_run: Histories) -> None:
    all_of_them = {**START, "examples": 32.0}
    model = ModelInfo(train_size=32)
    assert advice(curved_run([1.1, GAP], above, begin=0, inputs=all_of_them, model=model)) != []

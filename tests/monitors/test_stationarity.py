"""Stationarity: its sums against the theory of whole runs, and what it tells about them."""

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from gradwatch.errors import ConfigError
from gradwatch.interfaces import Monitor
from gradwatch.monitors import Stationarity
from gradwatch.records import Measurement, ModelInfo, StepInfo
from gradwatch.serialise import to_json
from gradwatch.theory.gradient_convergence import noise_floor, path_bound, stationarity_bound

METRICS = (
    "gradient_square",
    "gradient_variance",
    "smoothness",
    "smoothness_secant",
    "sharpness",
    "gradient_scale",
)
ADAM = "the state of Adam"

Step = Callable[..., StepInfo]
Measured = Callable[..., list[Measurement]]
Check = Callable[[Callable[[], Monitor], Sequence[str]], None]
Found = dict[str, Measurement]


def after(
    monitor: Stationarity, steps: Sequence[StepInfo], values: Sequence[list[Measurement]]
) -> Found:
    """What is derived from the last of several steps."""
    found: list[Measurement] = []
    for info, measurements in zip(steps, values, strict=True):
        found = list(monitor.derive(info, measurements, ModelInfo()))
    return {item.metric: item for item in found}


def constant(measured: Measured, count: int, **changes: float) -> list[list[Measurement]]:
    values = {"gradient_square": 0.5, "gradient_variance": 16.0, "sharpness": 2.0, **changes}
    return [measured(**values) for _ in range(count)]


def run(step: Step, measured: Measured, count: int = 40, **settings: Any) -> Found:
    steps = [step(number, **settings) for number in range(count)]
    return after(Stationarity(), steps, constant(measured, count))


def test_the_terms_are_those_of_the_path_bound(step: Step, measured: Measured) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.rand(60, 4, generator=generator, dtype=torch.float64).tolist()
    steps = [step(k, lrs=(0.1 + row[0] / 10,), loss=3.0 - row[3]) for k, row in enumerate(rows)]
    values = [
        measured(gradient_square=row[1] - 0.2, gradient_variance=20 * row[2], sharpness=1 + row[3])
        for row in rows
    ]
    found = after(Stationarity(lowest_loss=0.5), steps, values)
    rates = [info.lrs[0] for info in steps]
    curvatures = [1 + row[3] for row in rows]
    bound = path_bound(
        loss_gap=3.0 - rows[0][3] - 0.5,
        smoothness=curvatures,
        step_variances=[20 * row[2] / 32 for row in rows],
        learning_rates=rates,
    )
    assert found["stationarity_step_term"].value == pytest.approx(bound.step_term, rel=1e-9)
    assert found["stationarity_noise_term"].value == pytest.approx(bound.noise_term, rel=1e-9)
    weights = [2 * g - L * g * g for g, L in zip(rates, curvatures, strict=True)]
    mean = sum(w * (row[1] - 0.2) for w, row in zip(weights, rows, strict=True)) / sum(weights)
    assert found["stationarity"].value == pytest.approx(mean, rel=1e-9)
    inputs = found["stationarity"].inputs
    assert inputs["step_term"] == pytest.approx(bound.step_term, rel=1e-9)
    assert inputs["noise_term"] == pytest.approx(bound.noise_term, rel=1e-9)


def test_a_quadratic_attains_the_bound(step: Step, measured: Measured) -> None:
    """In one dimension the bound is sharp: the moments of SGD on `w²`, from w = 1, noise 1/2."""
    rate, noise, moment = 0.25, 0.5, 1.0
    steps, values = [], []
    for number in range(1000):
        steps.append(step(number, lrs=(rate,), batch_size=1, loss=moment))
        values.append(measured(gradient_square=4 * moment, gradient_variance=noise, sharpness=2.0))
        moment = (1 - 2 * rate) ** 2 * moment + rate**2 * noise
    found = after(Stationarity(), steps, values)
    bound = found["stationarity_step_term"].value + found["stationarity_noise_term"].value
    expected = stationarity_bound(1.0, 2.0, noise, 1, rate, 1000)
    assert bound == pytest.approx(expected.bound, rel=1e-9)
    assert 0.99 < found["stationarity"].value / bound <= 1 + 1e-9
    assert found["stationarity_recent"].value == pytest.approx(found["noise_floor"].value)


def test_a_sampled_step_stands_for_those_since_the_one_before(
    step: Step, measured: Measured
) -> None:
    numbers = [*range(20), *range(29, 230, 10)]
    values = constant(measured, 20, gradient_square=1.0) + constant(
        measured, 21, gradient_square=2.0
    )
    found = after(Stationarity(), [step(number) for number in numbers], values)
    assert found["stationarity"].value == pytest.approx((20 * 1.0 + 210 * 2.0) / 230)
    expected = stationarity_bound(1.0, 2.0, 16.0, 32, 0.1, 230)
    assert found["stationarity_step_term"].value == pytest.approx(expected.step_term)
    assert found["stationarity_noise_term"].value == pytest.approx(expected.noise_term)


def test_the_split_of_now(step: Step, measured: Measured) -> None:
    found = run(step, measured, 60)
    expected = stationarity_bound(1.0, 2.0, 16.0, 32, 0.1, 60)
    floor = noise_floor(2.0, 16.0, 32, 0.1)
    assert found["noise_floor"].value == found["noise_share"].inputs["floor"]
    assert found["noise_floor"].value == pytest.approx(floor)
    assert found["noise_share"].value == pytest.approx(expected.noise_share)
    assert found["noise_share"].unit == "1"
    for metric in set(found) - {"noise_share"}:
        assert found[metric].unit == "L²/P²"


def test_heavy_ball_takes_longer_steps(step: Step, measured: Measured) -> None:
    plain, heavy = run(step, measured, lrs=(0.2,)), run(step, measured, lrs=(0.1,), momentum=0.5)
    assert heavy["stationarity"].inputs["momentum"] == 0.5
    assert heavy["stationarity"].inputs["step_size"] == 0.2
    for metric in plain:
        assert heavy[metric].value == pytest.approx(plain[metric].value)


def test_what_it_tells_about_a_plain_run(step: Step, measured: Measured) -> None:
    found = run(step, measured, 60)
    expected = {
        "estimates": 60, "clipped_share": 0, "lr_changes": 0, "batch_changes": 0,
        "loss_scale_changes": 0, "edge_share": 0, "beyond_edge": 0, "lowest_loss": 0,
        "smallest_loss": 1, "first_loss": 1, "loss_recent": 1, "loss_trend": 0, "smoothness": 2,
        "smoothness_is_secant": 0, "step_size": 0.1, "variance": 16, "variance_error": 0,
        "batch_size": 32, "groups_differ": 0, "momentum": 0, "dampening": 0, "weight_decay": 0,
        "steps": 60,
        "from_adam": 0, "relative_error": 0,
    }  # fmt: skip
    for metric in ("stationarity", "stationarity_recent", "noise_share"):
        inputs = found[metric].inputs
        assert {name: inputs[name] for name in expected} == expected
        unknown = {"step_term", "noise_term", "floor", "gradient_scale"}
        assert {*inputs} - {*expected} == unknown


@pytest.mark.parametrize(
    ("settings", "name", "value"),
    [
        ({"lrs": (0.1, 0.2)}, "groups_differ", 1.0),
        ({"weight_decay": 0.01}, "weight_decay", 0.01),
        ({"grads_clipped": True}, "clipped_share", 1.0),
        ({"grads_clipped": None}, "clipped_share", math.nan),
        ({"loss": None}, "first_loss", math.nan),
        ({"loss": None}, "step_term", math.nan),
        ({"loss": -2.0}, "smallest_loss", -2.0),
        ({"batch_size": None}, "batch_size", math.nan),
        ({"lrs": (0.95,)}, "edge_share", 1.0),
        ({"lrs": (0.45,), "momentum": 0.5}, "edge_share", math.nan),
        ({"lrs": (0.95,), "momentum": None}, "edge_share", 1.0),
        ({"momentum": 0.9, "dampening": 0.5}, "step_size", 0.5),
        ({"momentum": 0.9, "dampening": 0.5}, "dampening", 0.5),
        ({"momentum": None}, "gradient_scale", math.nan),
    ],
)
def test_what_it_tells_about_the_settings(
    step: Step, measured: Measured, settings: dict[str, Any], name: str, value: float
) -> None:
    inputs = run(step, measured, **settings)["stationarity_recent"].inputs
    assert inputs[name] == pytest.approx(value, nan_ok=True)


def test_changes_within_the_window_are_counted(step: Step, measured: Measured) -> None:
    steps = [
        step(
            number,
            lrs=(0.1 if number < 50 else 0.05,),
            # The last batch of an epoch is smaller, which is no change; from 60 on it is one.
            batch_size=(32 if number < 60 else 64) if number % 10 else 16,
            loss_scale=1024.0 if number < 90 else 512.0,
            grads_clipped=number < 25,
        )
        for number in range(100)
    ]
    inputs = after(Stationarity(), steps, constant(measured, 100))["stationarity_recent"].inputs
    assert inputs["lr_changes"] == 1
    assert inputs["batch_changes"] == 1
    assert inputs["batch_size"] == 32
    assert inputs["loss_scale_changes"] == 1
    assert inputs["clipped_share"] == 0.25
    late = [step(number, lrs=(0.1 if number < 50 else 0.05,)) for number in range(500)]
    found = after(Stationarity(), late, constant(measured, 500))
    assert found["stationarity_recent"].inputs["lr_changes"] == 0
    assert found["stationarity"].inputs["estimates"] == 500


def test_the_trend_of_the_loss(step: Step, measured: Measured) -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(200, generator=generator).tolist()
    falling = [step(k, loss=5.0 - 0.01 * k + 0.1 * noise[k]) for k in range(200)]
    flat = [step(k, loss=5.0 + 0.1 * noise[k]) for k in range(200)]
    trends = [
        after(Stationarity(), steps, constant(measured, 200))["noise_share"].inputs["loss_trend"]
        for steps in (falling, flat)
    ]
    assert trends[0] < -20
    assert abs(trends[1]) < 3
    straight = [step(k, loss=5.0 - k) for k in range(30)]
    found = after(Stationarity(), straight, constant(measured, 30))
    assert found["noise_share"].inputs["loss_trend"] < -1e6


@pytest.mark.parametrize("place", [20, 30])
def test_the_first_step_beyond_two_over_l_is_the_last_of_the_path(
    step: Step, measured: Measured, place: int
) -> None:
    monitor = Stationarity()
    told: dict[int, Found] = {}
    for number in range(50):
        beyond = number == place
        values = constant(measured, 1, gradient_square=100.0 if beyond else 0.5)
        info = step(number, lrs=(1.0 if beyond else 0.1,))
        told[number] = after(monitor, [info], values)
        if number == 35:
            monitor = resumed(monitor)
    path = {"stationarity", "stationarity_step_term", "stationarity_noise_term"}
    with_path = [number for number, found in told.items() if path & set(found)]
    assert with_path == [*range(19, place + 1)]
    assert set(told[place]) == path | {"stationarity_recent"}  # no floor beyond 2/L
    # What is reported last has no weight of the step beyond it, and says that there was one.
    assert told[place]["stationarity"].value == pytest.approx(0.5)
    assert told[place]["stationarity"].inputs["beyond_edge"] == 1 / (place + 1)
    newest = told[49]
    assert set(newest) == {"stationarity_recent", "noise_floor", "noise_share"}
    assert newest["stationarity_recent"].inputs["beyond_edge"] == 1 / 50
    assert newest["stationarity_recent"].value == pytest.approx((49 * 0.5 + 100) / 50)


def resumed(monitor: Stationarity) -> Stationarity:
    other = Stationarity()
    other.load_state_dict(json.loads(json.dumps(to_json(monitor.state_dict()))))
    return other


def test_a_run_beyond_two_over_l_has_only_a_mean(step: Step, measured: Measured) -> None:
    found = run(step, measured, lrs=(1.0,))
    assert set(found) == {"stationarity_recent"}
    assert found["stationarity_recent"].inputs["floor"] == math.inf


def test_the_scale_of_the_gradient_is_a_median_of_the_newest(
    step: Step, measured: Measured
) -> None:
    scales = [*([math.nan, 1.0] * 60), *([16.0] * 50), 900.0]

    def found(count: int) -> float:
        steps = [step(number) for number in range(count)]
        values = [
            measured(gradient_square=0.5, gradient_variance=16.0, gradient_scale=scale)
            for scale in scales[:count]
        ]
        return after(Stationarity(), steps, values)["stationarity_recent"].inputs["gradient_scale"]

    assert math.isnan(found(39))  # of 19 known ones
    assert found(40) == 1.0
    assert found(120 + 49) == 1.0
    assert found(120 + 51) == 16.0  # 51 of the newest 100


def test_secants_stand_in_for_the_sharpness(step: Step, measured: Measured) -> None:
    values = [
        measured(gradient_square=0.5, gradient_variance=16.0, smoothness=2.0) for k in range(40)
    ]
    inputs = after(Stationarity(), [step(k) for k in range(40)], values)["stationarity"].inputs
    assert (inputs["smoothness"], inputs["smoothness_is_secant"]) == (2.0, 1.0)


def test_what_is_known_of_another_step_is_kept(step: Step, measured: Measured) -> None:
    first = measured(gradient_variance=16.0, sharpness=2.0)
    values = [first, *([measured(gradient_square=0.5)] * 40)]
    found = after(Stationarity(), [step(k) for k in range(41)], values)
    assert found["noise_floor"].value == pytest.approx(noise_floor(2.0, 16.0, 32, 0.1))


def test_without_a_smoothness_there_is_only_the_mean(step: Step, measured: Measured) -> None:
    values = [measured(gradient_square=0.5, gradient_variance=16.0)] * 40
    found = after(Stationarity(), [step(k) for k in range(40)], values)
    assert set(found) == {"stationarity_recent"}
    assert math.isnan(found["stationarity_recent"].inputs["smoothness"])


def test_it_waits_for_twenty_readings(step: Step, measured: Measured) -> None:
    assert run(step, measured, 19) == {}
    assert "stationarity" in run(step, measured, 20)


def test_the_errors_are_those_of_batch_means(step: Step, measured: Measured) -> None:
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(400, generator=generator).tolist()
    values = [
        measured(gradient_square=2.0 + item, gradient_variance=16.0, sharpness=2.0)
        for item in noise
    ]
    found = after(Stationarity(), [step(k) for k in range(400)], values)
    assert found["stationarity"].standard_error == pytest.approx(1 / 20, rel=0.4)
    assert found["stationarity_recent"].standard_error == pytest.approx(1 / 200**0.5, rel=0.4)
    for metric in ("stationarity", "stationarity_recent"):
        error, inputs = found[metric].standard_error, found[metric].inputs
        assert error is not None
        assert inputs["relative_error"] == pytest.approx(error / found[metric].value)


def test_skipped_steps_and_what_is_not_finite_do_not_enter(step: Step, measured: Measured) -> None:
    steps = [step(k, skipped=k % 3 == 1, loss=0.1 if k % 3 == 1 else 1.0) for k in range(90)]
    values = [
        constant(measured, 1, gradient_square=[0.5, 900.0, math.nan][k % 3])[0] for k in range(90)
    ]
    # The last step of each three has no gradient, so nothing is derived; look at one before.
    found = after(Stationarity(), steps[:-2], values[:-2])
    assert found["stationarity"].inputs["estimates"] == 30
    assert found["stationarity"].value == pytest.approx(0.5)
    assert found["stationarity"].inputs["smallest_loss"] == 1.0


def test_the_state_of_adam_is_marked(step: Step, measured: Measured) -> None:
    values = [measured(ADAM, gradient_square=0.5, gradient_variance=16.0, sharpness=2.0)] * 40
    found = after(Stationarity(), [step(k, optimizer="AdamW") for k in range(40)], values)
    assert found["stationarity"].inputs["from_adam"] == 1.0


@pytest.mark.parametrize("wrong", [math.nan, math.inf, "0", None, True])
def test_a_lowest_loss_must_be_a_number(wrong: Any) -> None:
    with pytest.raises(ConfigError, match="lowest_loss must be a finite number"):
        Stationarity(lowest_loss=wrong)


def test_no_values_make_it_raise(survives: Check) -> None:
    survives(Stationarity, METRICS)


def test_it_resumes(resumes: Check) -> None:
    metrics = ("gradient_square", "gradient_variance", "smoothness", "gradient_scale")
    resumes(Stationarity, metrics)


def test_a_long_run_needs_no_more_memory(step: Step, measured: Measured) -> None:
    monitor = Stationarity()
    for number, values in enumerate(constant(measured, 500)):
        list(monitor.derive(step(number), values, ModelInfo()))
    state = monitor.state_dict()
    assert len(state["rows"]) == 400
    assert len(state["path"]["means"]["blocks"]) <= 40

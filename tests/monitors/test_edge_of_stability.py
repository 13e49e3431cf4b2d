"""The sharpness against the threshold of the optimizer, from readings that are made up."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from gradwatch.capture.model.parameters import settings_of
from gradwatch.interfaces import Monitor
from gradwatch.monitors.edge_of_stability import EdgeOfStability
from gradwatch.records import Measurement, ModelInfo, StepInfo
from gradwatch.theory.break_even import largest_learning_rate

METRICS = ("sharpness", "preconditioned_sharpness", "sharpness_variance")
ADAM: dict[str, Any] = {"optimizer": "Adam", "momentum": None, "betas": (0.9, 0.999)}

Step = Callable[..., StepInfo]
Check = Callable[[Callable[[], Monitor], Sequence[str]], None]


def reading(
    metric: str,
    value: float,
    *,
    relative: float | None = 0.001,
    unit: str = "L/P²",
    examples: float = 512.0,
) -> Measurement:
    error = None if relative is None else relative * abs(value)
    return Measurement(
        metric=metric,
        scope="model",
        step=0,
        value=value,
        unit=unit,
        standard_error=error,
        inputs={"examples": examples},
    )


def sharp(value: float, **options: Any) -> list[Measurement]:
    return [reading("sharpness", value, **options)]


class Run:
    """A monitor that is told one step after the other."""

    def __init__(self, step: Step, *, train_size: int | None = None, **settings: Any) -> None:
        self.monitor = EdgeOfStability()
        self.model = ModelInfo(train_size=train_size)
        self.make, self.settings, self.number = step, settings, 0

    def __call__(self, readings: list[Measurement], **settings: Any) -> dict[str, Measurement]:
        facts = {**self.settings, **settings}
        number = facts.pop("number", self.number)
        self.number = number + 10
        found = self.monitor.derive(self.make(number, **facts), readings, self.model)
        return {item.metric: item for item in found}


@pytest.fixture
def run(step: Step) -> Callable[..., Run]:
    return lambda **settings: Run(step, **settings)


Start = Callable[..., Run]


# --- The ratio ---------------------------------------------------------------------------------


def test_the_first_reading(run: Start) -> None:
    readings = [*sharp(5.0, relative=0.02), reading("gradient_scale", 2.0)]
    square = replace(reading("gradient_square", 1.0), source="2 ranks x 4 micro-batches")
    readings.append(square)
    found = run(lrs=(0.1,))(readings, number=7)
    threshold, ratio = found["stability_threshold"], found["stability_ratio"]
    assert threshold.value == pytest.approx(20.0)
    assert (threshold.unit, threshold.step) == ("L/P²", 7)
    assert ratio.value == pytest.approx(0.25)
    assert ratio.unit == "1"
    assert ratio.standard_error == pytest.approx(0.005)
    expected = {
        "sharpness": 5.0,
        "newest": 5.0,
        "relative_error": 0.02,
        "threshold": 20.0,
        "learning_rate": 0.1,
        "momentum": 0.0,
        "preconditioned": 0.0,
        "readings": 1.0,
        "clipped_share": 0.0,
        "groups_differ": 0.0,
        "examples": 512.0,
        "gradient_scale": 2.0,
        "added_up": 1.0,
        "first_sharpness": 5.0,
        "first_step": 7.0,
        "first_learning_rate": 0.1,
    }
    assert ratio.inputs == {name: pytest.approx(value) for name, value in expected.items()}
    assert set(found) == {"stability_threshold", "stability_ratio"}


def test_each_reading_weighs_as_much_as_all_before_it(run: Start) -> None:
    told = run()
    found = [told(sharp(value))["stability_ratio"] for value in (4.0, 8.0, 2.0)]
    assert [item.value for item in found] == pytest.approx([0.2, 0.3, 0.2])
    assert [item.inputs["readings"] for item in found] == [1, 2, 3]
    assert [item.inputs["newest"] for item in found] == [4.0, 8.0, 2.0]
    assert {item.inputs["first_sharpness"] for item in found} == {4.0}


def test_without_a_new_reading_there_is_nothing(run: Start) -> None:
    told = run()
    told(sharp(5.0))
    assert told([]) == {}
    assert told([reading("smallest_eigenvalue", -1.0)]) == {}
    assert told([reading("sharpness_variance", 1.0)]) == {}
    assert told(sharp(math.nan)) == {}
    assert told([replace(sharp(5.0)[0], scope="layer")]) == {}
    assert told(sharp(5.0))["stability_ratio"].inputs["readings"] == 2


def test_skipped_steps_are_ignored(run: Start) -> None:
    told = run()
    assert told(sharp(50.0), skipped=True) == {}
    assert told(sharp(5.0))["stability_ratio"].value == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("make", "threshold"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True), 13.571428571428573),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), 38.0),
        (lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1), 378.1),
        (lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9), 38.0),
    ],
)
def test_the_threshold_is_that_of_the_running_optimizer(
    run: Start, make: Callable[..., torch.optim.Optimizer], threshold: float
) -> None:
    optimizer = make(nn.Linear(1, 1).parameters())
    told = run(optimizer=type(optimizer).__name__, **settings_of(optimizer))
    both = [*sharp(1.0), reading("preconditioned_sharpness", 2.0, unit="1/P")]
    found = told(both, number=1000)
    plain = type(optimizer) is torch.optim.SGD
    assert found["stability_threshold"].value == pytest.approx(threshold)
    assert found["stability_threshold"].unit == ("L/P²" if plain else "1/P")
    assert found["stability_ratio"].value == pytest.approx((1 if plain else 2) / threshold)
    assert found["stability_ratio"].inputs["preconditioned"] == float(not plain)


def test_the_momentum_of_adam_is_beta1(run: Start) -> None:
    found = run(**ADAM)([reading("preconditioned_sharpness", 1.0)], number=100)
    assert found["stability_ratio"].inputs["momentum"] == 0.9


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "NAdam"},
        {"optimizer": "SGD+Adam"},
        {"lrs": (0.1, 0.2)},
        {"lrs": (0.0,)},
        {"lrs": ()},
        {"momentum": 1.0},
        {**ADAM, "number": 99},
        {**ADAM, "betas": None, "number": 1000},
        {"optimizer": "RMSprop", "number": 99},
    ],
)
def test_where_no_threshold_is_known_it_is_silent(run: Start, settings: dict[str, Any]) -> None:
    readings = [*sharp(1e6), reading("preconditioned_sharpness", 1e6)]
    assert run()(readings, **settings) == {}


def test_under_adam_the_plain_sharpness_says_nothing(run: Start) -> None:
    assert run(**ADAM)(sharp(1e6), number=1000) == {}


def test_an_unknown_error_is_said(run: Start) -> None:
    told = run()
    first = told(sharp(5.0, relative=None))["stability_ratio"]
    assert first.standard_error is None
    assert first.inputs["relative_error"] == math.inf
    assert math.isnan(first.inputs["first_sharpness"])  # it may be far below
    second = told(sharp(6.0))["stability_ratio"]
    assert second.inputs["first_sharpness"] == 6.0
    assert second.inputs["first_step"] == 10.0


def test_a_curvature_below_zero_has_a_ratio_below_zero(run: Start) -> None:
    assert run()(sharp(-5.0))["stability_ratio"].value == pytest.approx(-0.25)


def test_the_share_of_clipped_steps(run: Start) -> None:
    told = run(grads_clipped=None)
    assert math.isnan(told(sharp(5.0))["stability_ratio"].inputs["clipped_share"])
    for number in range(49):
        told([], grads_clipped=number < 12)
    found = told(sharp(5.0), grads_clipped=False)["stability_ratio"]
    assert found.inputs["clipped_share"] == pytest.approx(12 / 50)
    told([], grads_clipped=False)  # the oldest one falls out
    found = told(sharp(5.0), grads_clipped=False)["stability_ratio"]
    assert found.inputs["clipped_share"] == pytest.approx(10 / 50)


# --- What begins anew --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{"lrs": (0.11,)}, {"lrs": (0.09,)}, {"momentum": 0.5}, {"momentum": 0.1}]
)
def test_other_settings_begin_anew(run: Start, settings: dict[str, Any]) -> None:
    told = run(lrs=(0.1,), momentum=0.0)
    told(sharp(4.0))
    told(sharp(4.0))
    found = told(sharp(8.0), **settings)["stability_ratio"]
    assert found.inputs["readings"] == 1
    assert found.inputs["sharpness"] == 8.0
    assert found.inputs["first_sharpness"] == 4.0  # that of the run


def test_a_momentum_that_hardly_moves_the_threshold_begins_anew(run: Start) -> None:
    told = run(momentum=0.9)
    told(sharp(4.0))
    found = told(sharp(8.0), momentum=0.95)["stability_ratio"]  # 38/eta and 39/eta
    assert found.inputs["readings"] == 1


def test_another_optimizer_is_another_run(run: Start) -> None:
    told = run()
    assert "break_even_step" in told(sharp(20.0))
    found = told([reading("preconditioned_sharpness", 8.0)], **ADAM, number=1000)
    assert found["stability_ratio"].inputs["readings"] == 1
    assert found["stability_ratio"].inputs["first_sharpness"] == 8.0
    assert "break_even_step" not in found


def test_a_slow_schedule_goes_through(run: Start) -> None:
    """From reading to reading 4 %, together by a factor of 5; each ratio with its own threshold."""
    told, found = run(), []
    for number in range(40):
        lr = 0.1 * 0.96**number
        found.append(told(sharp(4.0), lrs=(lr,))["stability_ratio"])
        assert found[-1].value == pytest.approx(4.0 * lr / 2)
    assert found[-1].inputs["readings"] == 40


# --- Gradient noise ----------------------------------------------------------------------------


def noisy(value: float, variance: float, relative: float = 0.1) -> list[Measurement]:
    return [*sharp(value), reading("sharpness_variance", variance, relative=relative)]


@pytest.mark.parametrize(
    ("settings", "limit"),
    [
        ({"batch_size": 32}, 0.17779002578006933),
        ({"batch_size": 1}, 0.04),
        ({"batch_size": 32, "momentum": 0.9}, 0.11264173874894025),
        ({"batch_size": 10**6}, 0.2),
    ],
)
def test_the_limit_under_noise(run: Start, settings: dict[str, Any], limit: float) -> None:
    found = run(train_size=50000, lrs=(0.02,), **settings)(noisy(10.0, 400.0))
    noise = found["noise_stability_ratio"]
    assert noise.value == pytest.approx(0.02 / limit, rel=1e-9)
    assert noise.inputs["learning_rate_limit"] == pytest.approx(limit, rel=1e-9)
    assert noise.inputs["batch_size"] == settings["batch_size"]
    assert noise.inputs["train_size"] == 50000
    assert noise.inputs["readings"] == 1


def test_data_of_unknown_size_are_taken_to_be_many(run: Start) -> None:
    noise = run(lrs=(0.02,), batch_size=8)(noisy(10.0, 400.0))["noise_stability_ratio"]
    assert noise.value == pytest.approx(0.02 / largest_learning_rate(10, 400, 8))
    assert math.isnan(noise.inputs["train_size"])


def test_the_smallest_stable_batch(run: Start) -> None:
    def smallest(**settings: Any) -> float:
        found = run(**settings)(noisy(10.0, 400.0))
        return found["noise_stability_ratio"].inputs["batch_size_limit"]

    assert smallest(lrs=(0.1,)) == 4.0
    assert smallest(lrs=(0.11,)) == 5.0
    assert math.isnan(smallest(lrs=(0.3,)))  # beyond 2/lambda no batch is large enough


def test_weight_decay_and_dampening_count(run: Start) -> None:
    settings = {"lrs": (0.02,), "momentum": 0.9, "batch_size": 8}
    more = run(**settings, weight_decay=2.0)(noisy(10.0, 400.0))["noise_stability_ratio"]
    assert more.value == pytest.approx(0.02 / largest_learning_rate(12, 400, 8, momentum=0.9))
    less = run(**settings, dampening=0.5)(noisy(10.0, 400.0))["noise_stability_ratio"]
    assert less.value == pytest.approx(0.01 / largest_learning_rate(10, 400, 8, momentum=0.9))
    assert less.inputs["learning_rate_limit"] == pytest.approx(0.02 / less.value)


@pytest.mark.parametrize(("of_sharpness", "of_variance"), [(0.001, 0.3), (0.04, 0.001)])
def test_the_error_of_the_limit(run: Start, of_sharpness: float, of_variance: float) -> None:
    """By moving sharpness and variance by a little."""
    settings = {"lrs": (0.02,), "batch_size": 8, "momentum": 0.5}

    def measured(value: float, variance: float) -> Measurement:
        readings = [
            *sharp(value, relative=of_sharpness),
            reading("sharpness_variance", variance, relative=of_variance),
        ]
        return run(**settings)(readings)["noise_stability_ratio"]

    def ratio(value: float, variance: float) -> float:
        return measured(value, variance).value

    by_sharpness = (ratio(10.001, 400.0) - ratio(9.999, 400.0)) / 0.002 * 10.0 * of_sharpness
    by_variance = (ratio(10.0, 400.1) - ratio(10.0, 399.9)) / 0.2 * 400.0 * of_variance
    error, found = math.hypot(by_sharpness, by_variance), measured(10.0, 400.0)
    assert found.standard_error == pytest.approx(error, rel=1e-4)
    assert found.inputs["relative_error"] == pytest.approx(error / found.value, rel=1e-4)


def test_the_batch_size_is_the_usual_one(run: Start) -> None:
    told = run(lrs=(0.02,), batch_size=32)
    told(noisy(10.0, 100.0))
    for _ in range(5):
        told([])
    odd = told(noisy(10.0, 300.0), batch_size=3)["noise_stability_ratio"]
    assert odd.inputs["batch_size"] == 32
    assert odd.inputs["sharpness_variance"] == 200.0
    assert odd.inputs["readings"] == 2


def test_another_batch_size_begins_anew_for_the_noise_alone(run: Start) -> None:
    told = run(lrs=(0.02,), batch_size=32)
    told(noisy(10.0, 100.0))
    for _ in range(30):
        told([], batch_size=64)
    found = told(noisy(20.0, 300.0), batch_size=64)
    assert found["noise_stability_ratio"].inputs["readings"] == 1
    assert found["noise_stability_ratio"].inputs["sharpness_variance"] == 300.0
    assert found["stability_ratio"].inputs["readings"] == 2


def test_a_variance_below_zero_is_no_noise(run: Start) -> None:
    noise = run(lrs=(0.02,))(noisy(10.0, -400.0))["noise_stability_ratio"]
    assert noise.value == pytest.approx(0.1)
    assert noise.inputs["sharpness_variance"] == -400.0


@pytest.mark.parametrize(
    "settings", [{"batch_size": None}, {"momentum": 0.9, "nesterov": True}, {"value": -1.0}]
)
def test_where_the_limit_is_not_known_it_is_silent(run: Start, settings: dict[str, Any]) -> None:
    value = settings.pop("value", 10.0)
    found = run(**settings)(noisy(value, 400.0))
    assert "stability_ratio" in found
    assert "noise_stability_ratio" not in found


def test_without_a_new_variance_there_is_no_limit_under_noise(run: Start) -> None:
    told = run()
    told(noisy(5.0, 1.0))
    assert "noise_stability_ratio" not in told(sharp(5.0))


# --- The break-even point ----------------------------------------------------------------------


def test_the_first_reading_at_the_threshold_is_kept(run: Start) -> None:
    told = run(lrs=(0.1,))
    assert "break_even_step" not in told(sharp(19.0), number=100)
    reached = told(sharp(19.5), number=200)["break_even_step"]
    later = told(sharp(3.0), number=300)["break_even_step"]
    assert (reached.value, reached.step) == (200.0, 200)
    assert (later.value, later.step) == (200.0, 300)
    assert reached.inputs["ratio"] == later.inputs["ratio"] == pytest.approx(0.975)
    assert math.isnan(reached.inputs["noise_ratio"])
    assert reached.source == later.source == "the sharpness reached the stability threshold"
    assert told([], number=400) == {}


def test_few_examples_are_no_break_even_unless_they_are_all(run: Start) -> None:
    few = sharp(30.0, examples=32.0)
    assert "break_even_step" not in run(lrs=(0.1,), train_size=60_000)(few)
    found = run(lrs=(0.1,), train_size=32)(few)
    assert "break_even_step" in found
    assert found["stability_ratio"].inputs["examples"] == 32.0


def test_whether_steps_are_added_up_is_that_of_the_newest_known(run: Start) -> None:
    told = run()
    found = []
    for source in ("", "4 micro-batches", "2 ranks", "two halves of the batch"):
        square = replace(reading("gradient_square", 1.0), source=source)
        told([square] if source else [])
        found.append(told(noisy(5.0, 1.0)))
    values = [item["stability_ratio"].inputs["added_up"] for item in found]
    assert values == pytest.approx([math.nan, 1.0, 0.0, 0.0], nan_ok=True)
    assert found[1]["noise_stability_ratio"].inputs["added_up"] == 1.0


def test_the_gradient_scale_is_the_median_of_all_steps(run: Start) -> None:
    told = run(lrs=(0.02,))
    assert math.isnan(told(noisy(10.0, 400.0))["stability_ratio"].inputs["gradient_scale"])
    for scale in (4.0, 4.0, 70.0, 3.0):
        told([reading("gradient_scale", scale)])
    told([reading("gradient_scale", 1e6)], skipped=True)
    found = told([*noisy(10.0, 400.0), reading("gradient_scale", 5.0)])
    assert found["stability_ratio"].inputs["gradient_scale"] == 4.0
    assert found["noise_stability_ratio"].inputs["gradient_scale"] == 4.0
    for _ in range(100):
        told([reading("gradient_scale", 1.0)])
    assert told(sharp(5.0))["stability_ratio"].inputs["gradient_scale"] == 1.0


@pytest.mark.parametrize(
    ("scale", "reached"), [(0.4, False), (0.6, True), (1.9, True), (2.1, False)]
)
def test_steps_along_another_gradient_have_no_break_even(
    run: Start, scale: float, reached: bool
) -> None:
    found = run(lrs=(0.1,))([*sharp(30.0), reading("gradient_scale", scale)])
    assert ("break_even_step" in found) == reached
    assert "stability_ratio" in found


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
def test_an_optimizer_that_maximises_has_no_threshold(
    run: Start, optimizer: Callable[..., torch.optim.Optimizer]
) -> None:
    def told(maximize: bool) -> dict[str, Measurement]:
        made = optimizer(nn.Linear(1, 1).parameters(), lr=0.1, maximize=maximize)
        settings = settings_of(made)
        readings = [*noisy(1.0, 1.0), reading("preconditioned_sharpness", 1.0)]
        return run(optimizer=type(made).__name__, **settings)(readings, number=1000)

    assert told(maximize=True) == {}
    assert "stability_ratio" in told(maximize=False)


def test_a_run_that_begins_above_says_so(run: Start) -> None:
    found = run(lrs=(0.1,))(sharp(30.0))["break_even_step"]
    assert found.value == 0.0
    assert "at the first reading or before it" in found.source


@pytest.mark.parametrize("wrong", [{"relative": 0.06}, {"relative": None}, {"grads_clipped": True}])
def test_a_reading_that_proves_nothing_is_no_break_even(run: Start, wrong: dict[str, Any]) -> None:
    told = run(lrs=(0.1,))
    told(sharp(5.0))
    options = {name: wrong[name] for name in wrong if name == "relative"}
    settings = {name: wrong[name] for name in wrong if name != "relative"}
    assert "break_even_step" not in told(sharp(30.0, **options), **settings)
    assert "break_even_step" in told(sharp(30.0))


def test_the_noise_gets_there_first(run: Start) -> None:
    told = run(lrs=(0.1,), batch_size=4)
    told(noisy(9.0, 1.0))
    found = told(noisy(10.0, 1200.0))
    assert found["stability_ratio"].value < 0.9
    reached = found["break_even_step"]
    assert reached.value == 10.0
    assert reached.inputs["noise_ratio"] == found["noise_stability_ratio"].value > 1
    assert reached.source == "the gradient noise made the learning rate reach its limit"


@pytest.mark.parametrize(
    ("relative", "reached"), [(0.02, True), (0.06, True), (0.16, False), (0.9, False)]
)
def test_a_coarse_variance_proves_nothing(run: Start, relative: float, reached: bool) -> None:
    """1.0625 of the limit, half of it by noise; an error of 5 % would be one of 0.09 of it."""
    found = run(lrs=(0.1,), batch_size=4)(noisy(10.0, 450.0, relative=relative))
    assert found["noise_stability_ratio"].value == pytest.approx(1.0625)
    assert ("break_even_step" in found) == reached


# --- For all monitors --------------------------------------------------------------------------


def test_it_measures_nothing() -> None:
    assert not EdgeOfStability.needs
    assert not EdgeOfStability.probed


def test_no_values_make_it_raise(survives: Check) -> None:
    survives(EdgeOfStability, METRICS)


def test_it_resumes(resumes: Check) -> None:
    resumes(EdgeOfStability, METRICS)


def test_a_break_even_point_and_its_source_survive_a_checkpoint(run: Start) -> None:
    told = run(lrs=(0.1,), batch_size=4)
    told(noisy(9.0, 1.0))
    told(noisy(10.0, 1200.0))
    saved = told.monitor.state_dict()
    expected = told(sharp(3.0), number=50)
    told.monitor = EdgeOfStability()
    told.monitor.load_state_dict(saved)
    assert repr(told(sharp(3.0), number=50)) == repr(expected)


def test_a_broken_state_changes_nothing(run: Start) -> None:
    told = run()
    told(sharp(5.0))
    before = told.monitor.state_dict()
    with pytest.raises(KeyError):
        told.monitor.load_state_dict({**before, "first": {}, "means": {"sharpness": {}}})
    assert repr(told.monitor.state_dict()) == repr(before)

"""The dropout probability that lets the gradient come down to the target."""

import math
from collections.abc import Callable

import pytest

from gradwatch.errors import ConfigError
from gradwatch.records import History, Measurement, Recommendation
from gradwatch.rules import Dropout
from gradwatch.theory.gradient_convergence import noise_floor, variance_at

Values = Callable[..., Measurement]


@pytest.fixture
def masked(
    history_of: Callable[..., History], stationarity: Values, value_of: Values
) -> Callable[..., History]:
    """A run at its floor under masks of keep rate `kept` with the law `v`."""

    def build(
        kept: float, v: float, data: float, smoothness: float, batch: float, lr: float,
        share_error: float = 0.02, above: float = 0.9, steps: float = 1e6, **inputs: float,
    ) -> History:  # fmt: skip
        variance = variance_at(kept, data, v)
        floor = noise_floor(smoothness, variance, batch, lr)
        window = {"smoothness": smoothness, "variance": variance, "batch_size": batch}
        window |= {"step_size": lr, "steps": steps}
        share = (variance - data) / variance
        masks = {"estimates": 200.0, "keep": kept, "rates": 1.0, "law": v, "data_variance": data}
        masks |= {"variance": variance, **inputs}
        return history_of(
            stationarity(above * floor, **window),
            value_of("dropout_variance_share", share, share_error, **masks),
            lrs=(lr,),
            batch_size=int(batch),
        )

    return build


def advice(history: History, target: float | None) -> list[Recommendation]:
    return list(Dropout(target).advise(history))


def test_the_rate_that_meets_the_target(masked: Callable[..., History]) -> None:
    (found,) = advice(masked(0.3, 8.75, 9.5, 1, 32, 0.3), 0.12)
    assert (found.knob, found.unit, found.direction) == ("dropout", "probability", "down")
    assert found.current == pytest.approx(0.7)
    assert found.proposed == pytest.approx(1 - 0.41646834840554, rel=1e-9)
    assert "not modelled" in found.reason
    assert "capped" not in found.reason
    for printed in ("0.4165", "v = 8.75", "9.5", "0.12"):
        assert printed in found.reason


def test_silent_where_the_masks_alone_cannot_reach_it(masked: Callable[..., History]) -> None:
    assert advice(masked(0.3, 8.75, 9.5, 1, 32, 0.3), 0.05) == []


def test_a_move_is_capped(masked: Callable[..., History]) -> None:
    (found,) = advice(masked(0.5, 4.59, 1.532, 0.954, 32, 0.3), 0.01)
    assert found.proposed == pytest.approx(0.3)
    assert "0.9228" in found.reason  # the rate that the target needs
    assert "capped" in found.reason


def test_what_is_close_enough_is_reached_at_once(masked: Callable[..., History]) -> None:
    (found,) = advice(masked(0.75, 4.59, 1.532, 0.954, 32, 0.3), 0.01)
    assert found.proposed == pytest.approx(1 - 0.92276173427715, rel=1e-9)


def test_silent_when_the_target_is_met(masked: Callable[..., History]) -> None:
    assert advice(masked(0.3, 8.75, 9.5, 1, 32, 0.3), 0.2) == []


def test_never_recommends_more_dropout(masked: Callable[..., History]) -> None:
    # the floor is 0.165: a little more of it would still be within the target
    run = masked(0.3, 8.75, 9.5, 1, 32, 0.3, above=1.02, steps=2000.0)
    assert run[-1].verdicts[0].status == "holds"
    assert advice(run, 0.167) == []


SILENCES = {
    "different rates": {"rates": 2.0},
    "an unknown law": {"law": math.nan},
    "an unknown keep rate": {"keep": math.nan},
    "a share that may be small": {"share_error": 0.2},
}


@pytest.mark.parametrize("why", SILENCES)
def test_silent_for(why: str, masked: Callable[..., History]) -> None:
    setting = (0.3, 8.75, 9.5, 1, 32, 0.3)
    assert advice(masked(*setting), 0.12) != []
    assert advice(masked(*setting, **SILENCES[why]), 0.12) == []


def test_silent_where_the_data_make_most_of_the_noise(masked: Callable[..., History]) -> None:
    # share of the masks 0.28
    assert advice(masked(0.7, 8.75, 9.5, 1, 32, 0.3, 0.001), 0.09) == []
    assert advice(masked(0.65, 8.75, 9.5, 1, 32, 0.3, 0.001), 0.07) != []


def test_silent_where_the_steps_are_what_is_missing(
    history_of: Callable[..., History], stationarity: Values, value_of: Values
) -> None:
    share = value_of(
        "dropout_variance_share", 0.7, 0.01, keep=0.3, rates=1.0, law=1.0, data_variance=0.1
    )
    assert advice(history_of(stationarity(), share), 0.005) != []
    assert advice(history_of(stationarity(steps=300.0), share), 0.005) == []


@pytest.mark.parametrize("trend", [-3.0, math.nan])
def test_silent_unless_the_loss_is_flat(
    trend: float, history_of: Callable[..., History], stationarity: Values, value_of: Values
) -> None:
    share = value_of(
        "dropout_variance_share", 0.7, 0.01, keep=0.3, rates=1.0, law=1.0, data_variance=0.1
    )
    assert advice(history_of(stationarity(loss_trend=0.0), share), 0.005) != []
    assert advice(history_of(stationarity(loss_trend=trend), share), 0.005) == []


def test_silent_where_the_noise_floor_is_undecided(
    history_of: Callable[..., History], stationarity: Values, value_of: Values
) -> None:
    share = value_of(
        "dropout_variance_share", 0.7, 0.01, keep=0.3, rates=1.0, law=1.0, data_variance=0.1
    )
    assert advice(history_of(stationarity(estimates=100.0), share), 0.005) == []
    assert advice(history_of(stationarity(), share, optimizer="Adam"), 0.005) == []


def test_refuses_a_target_that_no_gradient_has() -> None:
    with pytest.raises(ConfigError, match="target"):
        Dropout(0.0)

"""Where a loss goes, told from its scatter."""

import math
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradwatch.records import History, Measurement, ModelInfo, Report, StepInfo
from gradwatch.rules.loss_course import LossCourse, loss_course

Values = Callable[..., Measurement]


def course(losses: Sequence[float | None], *, first: float = 2.3, since: int = 1) -> LossCourse:
    history = History(ModelInfo())
    history.append(Report(step=0, steps=(StepInfo(step=0, loss=first),)))
    steps = [StepInfo(step=1 + place, loss=loss) for place, loss in enumerate(losses)]
    for at in range(0, len(steps), 5):
        part = tuple(steps[at : at + 5])
        history.append(Report(step=part[-1].step, steps=part))
    found = loss_course(history, since)
    assert found is not None
    return found


def line(begin: float, end: float, count: int = 30, scatter: float = 0.0) -> list[float]:
    slope = (end - begin) / (count - 1)
    return [begin + slope * at + scatter * (-1) ** at for at in range(count)]


@pytest.mark.parametrize(
    ("begin", "end", "scatter", "rising", "falling"),
    [
        (1.0, 1.5, 0.0, True, False),
        (1.0, 1.06, 0.0, False, False),  # the means of the thirds differ by 4 %
        (1.5, 1.0, 0.0, False, True),
        (1.0, 1.5, 1.0, False, False),
        (1.5, 1.0, 1.0, False, False),
        (-1.0, -0.5, 0.0, True, False),
        (-1.0, -0.96, 0.0, False, False),
        (0.0, 0.0, 0.0, False, False),
    ],
)
def test_up_or_down_by_more_than_the_scatter(
    begin: float, end: float, scatter: float, *, rising: bool, falling: bool
) -> None:
    found = course(line(begin, end, scatter=scatter))
    assert (found.rising, found.falling) == (rising, falling)


def test_few_losses_say_nothing() -> None:
    few, enough = course(line(1, 9, 8)), course(line(1, 9, 9))
    assert (few.rising, few.above_first, few.smooth) == (False, False, False)
    assert (enough.rising, enough.above_first) == (True, True)
    assert course(line(1, 1, 9)).smooth
    assert not course(line(1, 1, 8)).smooth


def test_a_loss_that_is_not_finite_needs_no_statistics() -> None:
    for end in (math.nan, math.inf, -math.inf, 1e300):
        found = course([1.0, end])
        assert found.blown_up
        assert found.rising
        assert found.above_first
        assert not found.falling
    assert not course([*line(1.5, 1.0), math.inf]).falling
    over = course([math.nan, *line(1.0, 1.0)])
    assert not over.blown_up
    assert over.smooth


def test_above_the_first_one_for_certain() -> None:
    assert course(line(2.5, 2.5)).above_first
    assert not course(line(2.4, 2.4)).above_first  # by 4 %
    assert not course(line(2.5, 2.5, scatter=1.0)).above_first
    assert not course(line(9.0, 2.6)).above_first  # on its way down
    assert not course(line(2.5, 2.5), first=math.nan).above_first


def test_a_loss_that_multiplies_rises() -> None:
    """Its largest values make its means as uncertain as they are large."""
    grown = [2.0 * 3.0**at for at in range(30)]
    assert course(grown).rising
    assert course(grown).above_first
    assert course(grown).lost
    assert not course([9.0 * 1.01**at for at in range(30)]).lost  # four times the first one
    assert not course([30.0, 900.0] * 15).rising
    assert course([30.0, 900.0] * 15).lost
    # Far below the first loss, where batches scatter over orders of magnitude, it is no news.
    assert not course([1e-9 * 3.0 ** (at + 5 * (at % 2)) for at in range(15)]).rising
    assert not course(grown, first=math.nan).lost


def test_a_spike_is_not_smooth() -> None:
    calm = line(1.0, 1.0)
    assert course(calm).smooth
    assert not course([*calm[:10], 3.1, *calm[10:]]).smooth
    assert course([*calm[:10], 2.9, *calm[10:]]).smooth


def test_only_steps_that_were_taken_since_then() -> None:
    assert course([*line(9.0, 9.0), *line(1.0, 1.5)], since=31).rising
    history = History(ModelInfo())
    skipped = [StepInfo(step=at, loss=math.inf, skipped=True) for at in range(3)]
    history.append(Report(step=2, steps=tuple(skipped)))
    assert loss_course(history, 0) is None


def test_the_newest_losses_alone() -> None:
    history = History(ModelInfo())
    losses = [*line(9.0, 9.0), *line(1.0, 1.5, 12)]
    steps = tuple(StepInfo(step=at, loss=loss) for at, loss in enumerate(losses))
    history.append(Report(step=steps[-1].step, steps=steps))
    assert (found := loss_course(history, 0, most=12)) is not None
    assert found.rising
    assert found.count == 12
    assert (everything := loss_course(history, 0)) is not None
    assert everything.falling


def test_the_trend_that_is_measured_says_that_it_falls(
    history_of: Callable[..., History], stationarity: Values
) -> None:
    for trend, falling in ((-3.0, True), (0.0, False), (math.nan, False)):
        found = loss_course(history_of(stationarity(loss_trend=trend)), 0)
        assert found is not None
        assert found.falling == falling


ANY = st.none() | st.floats(allow_nan=True, allow_infinity=True) | st.floats(0.1, 10.0)


@given(losses=st.lists(ANY, max_size=40).filter(lambda found: found != [None] * len(found)))
def test_whatever_the_losses_are_it_never_goes_both_ways(losses: list[float | None]) -> None:
    found = course(losses)
    assert not (found.rising and found.falling)
    assert not (found.above_first and found.falling)
    assert not (found.smooth and found.rising)


@given(
    losses=st.lists(st.floats(0.5, 2.0), min_size=9, max_size=40),
    factor=st.sampled_from([0.25, 4.0, 1024.0]),
)
def test_the_unit_of_the_loss_does_not_matter(losses: list[float], factor: float) -> None:
    one = course(losses, first=1.0)
    other = course([factor * loss for loss in losses], first=factor)
    for name in ("rising", "falling", "above_first", "smooth", "not_below_first"):
        assert getattr(one, name) == getattr(other, name)

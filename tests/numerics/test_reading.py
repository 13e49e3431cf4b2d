"""Readings and their trip to the host."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradwatch.numerics.reading import Reading, fetch


@given(st.lists(st.lists(st.floats(width=32, allow_nan=False), max_size=5), max_size=6))
def test_fetch_gives_back_what_each_tensor_holds(values: list[list[float]]) -> None:
    assert fetch([torch.tensor(item, dtype=torch.float32) for item in values]) == values


def test_fetch_reads_the_host_once(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    original = torch.Tensor.tolist

    def counted(tensor: torch.Tensor) -> object:
        reads.append(tensor)
        return original(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", counted)
    fetch([torch.ones(3), torch.tensor(2), torch.ones((), dtype=torch.float64)])
    assert len(reads) == 1


def test_measurements_carry_name_step_and_standard_error() -> None:
    reading = Reading("noise", torch.tensor([1.0, 2.0]), ("a", "b"), "L", torch.tensor([0.1, 0.2]))
    numbers = [number for item in fetch(reading.tensors()) for number in item]
    first, second = reading.measurements(7, numbers)
    assert (first.metric, first.scope, first.step, first.value, first.unit) == (
        "noise", "a", 7, 1.0, "L",
    )  # fmt: skip
    assert second.standard_error == pytest.approx(0.2)


def test_zeros_can_be_left_out() -> None:
    reading = Reading("count", torch.tensor([0.0, 3.0]), ("a", "b"), only_nonzero=True)
    assert [item.scope for item in reading.measurements(0, [0.0, 3.0])] == ["b"]


def test_a_reading_needs_one_scope_a_value() -> None:
    with pytest.raises(ValueError, match="2 values and 1 scopes"):
        Reading("loss", torch.zeros(2))

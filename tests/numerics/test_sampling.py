"""Updates seen through a sample of coordinates."""

import pytest
import torch

from gradwatch.numerics.sampling import CoordinateSample


def step(before: list[torch.Tensor], size: float) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [item + size * torch.randn(item.shape, generator=generator) for item in before]


def test_small_tensors_are_exact() -> None:
    before = [torch.randn(5, 7), torch.randn(11), torch.randn(())]
    after = step(before, 0.1)
    sample = CoordinateSample(before)
    norms = sample.change_norms(sample.gather(before), sample.gather(after))
    expected = [float((b - a).double().norm()) for a, b in zip(before, after, strict=True)]
    assert norms.tolist() == pytest.approx(expected, rel=1e-5)


def test_a_large_tensor_is_estimated_within_a_few_percent() -> None:
    before = [torch.zeros(300, 1000)]
    after = step(before, 1.0)
    sample = CoordinateSample(before)
    estimate = float(sample.change_norms(sample.gather(before), sample.gather(after))[0])
    # sqrt of a mean of 4096 squared normals: relative standard error 1/sqrt(2 * 4096) = 1.1 %
    assert estimate == pytest.approx(float(after[0].norm()), rel=0.045)


def test_the_choice_of_coordinates_leaves_the_global_stream_alone() -> None:
    state = torch.random.get_rng_state()
    CoordinateSample([torch.zeros(10_000)])
    assert torch.equal(state, torch.random.get_rng_state())


def test_the_same_coordinates_every_time() -> None:
    tensor = [torch.arange(100_000.0)]
    one, other = CoordinateSample(tensor), CoordinateSample(tensor)
    assert torch.equal(one.gather(tensor), other.gather(tensor))
    assert torch.equal(one.gather(tensor), one.gather(tensor))


def test_gathering_copies() -> None:
    tensor = torch.ones(4)
    sample = CoordinateSample([tensor])
    taken = sample.gather([tensor])
    tensor.zero_()
    assert taken.tolist() == [1.0] * 4


def test_unmoved_counts_only_entries_that_had_a_gradient() -> None:
    before = torch.tensor([1.0, 2.0, 3.0, 4.0])
    after = torch.tensor([1.0, 2.5, 3.0, 4.0])
    gradient = torch.tensor([1.0, 1.0, 1.0, 0.0])
    sample = CoordinateSample([before])
    gathered = (sample.gather([item]) for item in (before, after, gradient))
    unmoved, pushed = sample.unmoved_counts(*gathered)
    assert (unmoved.tolist(), pushed.tolist()) == ([2.0], [3.0])


def test_counts_are_those_of_the_whole_tensor() -> None:
    before = torch.arange(1000.0)
    sample = CoordinateSample([before], coordinates=100)
    gathered = sample.gather([before])
    unmoved, pushed = sample.unmoved_counts(gathered, gathered, torch.ones(100))
    assert (unmoved.tolist(), pushed.tolist()) == ([1000.0], [1000.0])


def test_updates_lost_to_bf16_rounding_are_seen() -> None:
    weight = torch.ones(64, dtype=torch.bfloat16)
    sample = CoordinateSample([weight])
    before = sample.gather([weight])
    weight -= 0.001  # half the spacing below 1 is 0.00195
    unmoved, pushed = sample.unmoved_counts(before, sample.gather([weight]), torch.ones(64))
    assert unmoved.tolist() == pushed.tolist() == [64.0]


def test_a_missing_gradient_counts_as_zero() -> None:
    sample = CoordinateSample([torch.ones(3), torch.ones(2)])
    assert sample.gather([None, torch.ones(2)]).tolist() == [0.0, 0.0, 0.0, 1.0, 1.0]


def test_float64_differences_below_float32_resolution_are_seen() -> None:
    before = torch.ones(3, dtype=torch.float64)
    after = before + 1e-12
    sample = CoordinateSample([before])
    change = sample.change_norms(sample.gather([before]), sample.gather([after]))
    assert float(change[0]) == pytest.approx(3**0.5 * 1e-12, rel=1e-3)

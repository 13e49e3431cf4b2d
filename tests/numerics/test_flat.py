"""Lists of tensors as one vector, and back."""

import torch

from gradwatch.numerics.flat import flatten, unflatten


def test_there_and_back() -> None:
    parts = [
        torch.randn(2, 3),
        torch.tensor(1.0),
        torch.randn(0),
        torch.randn(4, dtype=torch.cfloat),
        torch.randn(5, 2).T,
    ]
    flat = flatten(parts)
    assert (flat.shape, flat.dtype) == ((6 + 1 + 8 + 10,), torch.float32)
    for part, again in zip(parts, unflatten(flat, parts), strict=True):
        assert part.dtype == again.dtype
        assert torch.equal(part, again)


def test_the_widest_type_counts_and_each_part_gets_its_own_back() -> None:
    parts = [torch.ones(2, dtype=torch.bfloat16), torch.ones(1, dtype=torch.float64)]
    assert flatten(parts).dtype == torch.float64
    assert flatten(parts[:1]).dtype == torch.float32
    assert [part.dtype for part in unflatten(flatten(parts), parts)] == [
        torch.bfloat16,
        torch.float64,
    ]


def test_it_is_a_copy_without_a_graph() -> None:
    part = torch.ones(3, requires_grad=True)
    flat = flatten([part])
    flat.mul_(2.0)
    assert not flat.requires_grad
    assert torch.equal(part, torch.ones(3))


def test_complex_entries_are_a_real_and_an_imaginary_one() -> None:
    assert flatten([torch.tensor([1.0 + 2.0j])]).tolist() == [1.0, 2.0]

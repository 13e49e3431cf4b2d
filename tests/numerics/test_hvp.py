"""Hessian-vector products against Hessians that are known."""

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import hessian
from torch.func import functional_call

from gradwatch.numerics.hvp import Hessian, hvp


def leaf(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def test_a_quadratic_has_its_own_matrix() -> None:
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    matrix = root @ root.T
    point = torch.randn(5, generator=generator, dtype=torch.float64, requires_grad=True)
    product = Hessian(point @ matrix @ point / 2, [point])
    torch.testing.assert_close(product.gradient[0], (matrix @ point).detach())
    for unit in torch.eye(5, dtype=torch.float64):
        torch.testing.assert_close(product([unit])[0], matrix @ unit)


def test_a_network_agrees_with_the_whole_hessian() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    inputs, targets = torch.randn(6, 3).double(), torch.randint(2, (6,))
    named = {name: item.detach().requires_grad_() for name, item in model.named_parameters()}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        output = functional_call(model, parameters, (inputs,))
        return nn.functional.cross_entropy(output, targets)

    vector = [torch.randn_like(item) for item in named.values()]
    found = hvp(loss(named), list(named.values()), vector)
    blocks = hessian(lambda *items: loss(dict(zip(named, items, strict=True))), (*named.values(),))
    for row, got in zip(blocks, found, strict=True):
        products = [
            torch.tensordot(block, part, part.dim())
            for block, part in zip(row, vector, strict=True)
        ]
        torch.testing.assert_close(got, torch.stack(products).sum(0))


def test_a_loss_without_curvature_gives_zeros() -> None:
    point, unused = leaf(1.0, 2.0), leaf(3.0)
    straight = hvp(3.0 * point.sum(), [point, unused], [torch.ones(2), torch.ones(1)])
    assert [part.tolist() for part in straight] == [[0.0, 0.0], [0.0]]


def test_a_parameter_that_the_loss_ignores_gets_zeros() -> None:
    point, unused = leaf(1.0, 2.0), leaf(3.0)
    vector = [torch.ones(2, dtype=torch.float64), torch.ones(1, dtype=torch.float64)]
    found = hvp(point.square().sum(), [point, unused], vector)
    assert [part.tolist() for part in found] == [[2.0, 2.0], [0.0]]


def test_it_leaves_no_gradient_behind() -> None:
    point = leaf(1.0, 2.0)
    product = Hessian((point**4).sum(), [point])
    (found,) = product([torch.ones(2, dtype=torch.float64)])
    assert point.grad is None
    assert not found.requires_grad
    assert not product.gradient[0].requires_grad


def test_a_vector_of_another_length_is_refused() -> None:
    point = leaf(1.0)
    with pytest.raises(ValueError, match="argument"):
        hvp(point.square().sum(), [point], [])

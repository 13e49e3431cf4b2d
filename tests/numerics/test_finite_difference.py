"""Products by finite differences against double backward."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

from gradwatch.numerics.finite_difference import FiniteDifference, Gradient
from gradwatch.numerics.hvp import Hessian
from gradwatch.numerics.lanczos import cold_start, extreme_eigenpairs


def network(kind: torch.dtype) -> tuple[Gradient, list[Tensor], Hessian]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3)).to(kind)
    inputs, targets = torch.randn(40, 6).to(kind), torch.randint(3, (40,))
    names = [name for name, _ in model.named_parameters()]

    def loss(values: Sequence[Tensor]) -> Tensor:
        output = functional_call(model, dict(zip(names, values, strict=True)), (inputs,))
        return nn.functional.cross_entropy(output, targets)

    def gradient(values: Sequence[Tensor]) -> Sequence[Tensor]:
        return torch.autograd.grad(loss(values), list(values))

    point = [item.detach().requires_grad_() for item in model.parameters()]
    return gradient, point, Hessian(loss(point), point)


def relative_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    one, other = (torch.cat([part.flatten() for part in item]) for item in (found, expected))
    return float(torch.linalg.vector_norm(one - other) / torch.linalg.vector_norm(other))


@pytest.mark.parametrize(("kind", "error"), [(torch.float64, 1e-5), (torch.float32, 1e-3)])
def test_a_smooth_network(kind: torch.dtype, error: float) -> None:
    gradient, point, hessian = network(kind)
    product = FiniteDifference(gradient, point)
    for seed in range(3):
        vector = cold_start(point, seed)
        assert relative_error(product(vector), hessian(vector)) < error
    assert relative_error(product.gradient, hessian.gradient) < 1e-6
    assert all(one is other for one, other in zip(product.parameters, point, strict=True))


def test_the_eigenvalue_of_a_smooth_network() -> None:
    gradient, point, hessian = network(torch.float32)
    start = cold_start(point, 0)
    found = extreme_eigenpairs(FiniteDifference(gradient, point), start, 12).largest
    exact = extreme_eigenpairs(hessian, start, 12).largest
    assert float(found.value) == pytest.approx(float(exact.value), rel=1e-3)


def test_kinks_are_what_it_is_not_for() -> None:
    """The mean of |w - c| over c from 0 to 2 has no curvature but at its kinks, all of them."""
    kinks = torch.linspace(0.0, 2.0, 10_001, dtype=torch.float64)
    point = torch.tensor([0.99995], dtype=torch.float64, requires_grad=True)
    unit = [torch.ones(1, dtype=torch.float64)]
    (exact,) = Hessian((point - kinks).abs().mean(), [point])(unit)
    product = FiniteDifference(lambda at: [(at[0] - kinks).sign().mean()[None]], [point])
    assert float(exact) == 0.0
    assert float(product(unit)[0]) == pytest.approx(1.0, rel=0.1)


def test_the_length_of_the_vector_does_not_matter() -> None:
    gradient, point, hessian = network(torch.float64)
    product = FiniteDifference(gradient, point)
    for scale in (1e-8, 1e8):
        vector = [scale * part for part in cold_start(point, 1)]
        assert relative_error(product(vector), hessian(vector)) < 1e-5


def test_a_vector_of_zeros_gives_zeros() -> None:
    gradient, point, _ = network(torch.float32)
    found = FiniteDifference(gradient, point)([torch.zeros_like(part) for part in point])
    assert all(torch.equal(part, torch.zeros_like(part)) for part in found)


def test_parameters_that_are_zero_have_a_step_all_the_same() -> None:
    product = FiniteDifference(lambda at: [3.0 * at[0]], [torch.zeros(2)])
    torch.testing.assert_close(product([torch.ones(2)])[0], torch.full((2,), 3.0))


def test_the_parameters_are_never_written() -> None:
    gradient, point, _ = network(torch.float32)
    before = [(part.detach().clone(), part._version) for part in point]
    product = FiniteDifference(gradient, point)
    product(cold_start(point, 0))
    assert not any(part.requires_grad for part in product.gradient)
    for part, (values, version) in zip(point, before, strict=True):
        assert torch.equal(part, values)
        assert part._version == version
        assert part.grad is None


def test_no_number_is_read_on_the_host() -> None:
    with FakeTensorMode():
        product = FiniteDifference(lambda at: [at[0] ** 3], [torch.randn(4)])
        product([torch.randn(4)])

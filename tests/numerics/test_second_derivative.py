"""A gradient whose graph is cut gives no curvature, and torch does not say so."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from gradwatch.numerics.hvp import Hessian
from gradwatch.numerics.second_derivative import (
    NoSecondDerivativeError,
    require_second_derivative,
)


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        context.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        (x,) = context.saved_tensors
        out: Tensor = 3 * x**2 * gradient
        return out


class Once(Cube):
    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return Cube.backward(context, gradient)


class Kernel(Cube):
    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return Cube.backward(context, gradient).detach()


class Two(torch.autograd.Function):
    """One of its inputs has no derivative, another one a derivative that is constant."""

    @staticmethod
    def forward(context: Any, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return x + z

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, Tensor]:
        return gradient, None, torch.zeros_like(gradient)


def point() -> Tensor:
    return torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)


def curved(function: Any, at: Tensor) -> Tensor:
    """`x**6`, whose Hessian is diagonal."""
    loss: Tensor = function.apply(at).square().sum()
    return loss


def test_torch_takes_what_is_behind_a_cut_for_zero() -> None:
    """The reason for all of this; where it fails, torch has changed and the check may go."""
    for function in (Once, Kernel):
        at = point()
        slopes = torch.autograd.grad(curved(function, at), at, create_graph=True)
        if slopes[0].requires_grad:
            (product,) = torch.autograd.grad(
                slopes, at, torch.ones_like(at), allow_unused=True, materialize_grads=True
            )
            assert product.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("function", [Once, Kernel])
def test_a_cut_is_an_error(function: Any) -> None:
    at = point()
    with pytest.raises(NoSecondDerivativeError, match=f"the backward of {function.__name__}"):
        Hessian(curved(function, at), [at])


def test_a_mark_is_seen_behind_the_last_nonlinear_operation_as_well() -> None:
    at = point()
    with pytest.raises(NoSecondDerivativeError, match="once_differentiable"):
        Hessian(Once.apply(at).sum(), [at])  # type: ignore[no-untyped-call]


def test_a_custom_function_with_a_derivative_has_one() -> None:
    at = point()
    (product,) = Hessian(curved(Cube, at), [at])([torch.ones_like(at)])
    assert product.tolist() == pytest.approx([30.0, 30 * 16.0], rel=1e-12)


def test_a_function_that_some_inputs_do_not_matter_to_is_no_cut() -> None:
    x, y, z = point(), point(), point()
    found = Two.apply(x, y, z * 3)  # type: ignore[no-untyped-call]
    (product, *_) = Hessian((found**3).sum(), [x])([torch.ones_like(x)])
    assert product.tolist() == pytest.approx((6 * found).tolist(), rel=1e-12)


def test_a_model_of_torch_s_own_operations_is_let_through() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(3, 3)
    x = torch.randn(5, 3)
    hidden: Any = checkpoint(lambda x: torch.relu(layer(x)), x, use_reentrant=False)
    loss = nn.functional.mse_loss(layer(hidden), x)
    product = Hessian(loss, [layer.weight])([torch.ones_like(layer.weight)])
    assert product[0].abs().sum() > 0


def test_a_loss_without_a_graph_has_nothing_to_check() -> None:
    require_second_derivative(torch.ones(()))

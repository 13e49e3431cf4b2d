"""Extreme eigenvalues of the Hessians of networks, in float32 against the whole one in float64."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradwatch.numerics.flat import flatten, unflatten
from gradwatch.numerics.hvp import Hessian
from gradwatch.numerics.lanczos import cold_start, extreme_eigenpairs

ENOUGH = 20
"""Products that must be enough for 0.1 %."""


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 5, batch_first=True)
        self.out = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.lstm(x)[0][:, -1])
        return out


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(4, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=True)
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            out: Tensor = self.out(self.layer(self.into(x)).mean(1))
        return out


def perceptron(activation: type[nn.Module]) -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 12), activation(), nn.Linear(12, 8), activation(), nn.Linear(8, 3)
    )


def convolution() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(24, 3),
    )


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "tanh": (lambda: perceptron(nn.Tanh), (6,)),
    "relu": (lambda: perceptron(nn.ReLU), (6,)),
    "convolution": (convolution, (1, 8, 8)),
    "lstm": (Recurrent, (5, 4)),
    "transformer": (Attention, (5, 4)),
}


class Case:
    """A network, fresh or trained for some steps, and its data."""

    def __init__(self, name: str, steps: int = 0, seed: int = 0) -> None:
        torch.manual_seed(seed)
        make, shape = NETWORKS[name]
        self.model = make()
        self.x, self.y = torch.randn(40, *shape), torch.randint(3, (40,))
        self._optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.train(steps)

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self._optimizer.zero_grad()
            functional.cross_entropy(self.model(self.x), self.y).backward()
            self._optimizer.step()

    def loss(self, parameters: dict[str, Tensor]) -> Tensor:
        kind = next(iter(parameters.values())).dtype
        output = functional_call(self.model, parameters, (self.x.to(kind),))
        return functional.cross_entropy(output, self.y)

    def hessian(self, kind: torch.dtype = torch.float32) -> Hessian:
        named = {
            name: item.detach().to(kind).requires_grad_()
            for name, item in self.model.named_parameters()
        }
        return Hessian(self.loss(named), [*named.values()])

    def whole(self) -> Tensor:
        """The matrix, by a product with each unit vector."""
        hessian = self.hessian(torch.float64)
        size = sum(item.numel() for item in hessian.parameters)
        units = torch.eye(size, dtype=torch.float64)
        return torch.stack(
            [flatten(hessian(unflatten(unit, hessian.parameters))) for unit in units]
        )


@pytest.mark.parametrize("steps", [0, 60])
@pytest.mark.parametrize("name", NETWORKS)
def test_twenty_products_are_enough(name: str, steps: int) -> None:
    case = Case(name, steps)
    values, vectors = torch.linalg.eigh(case.whole())
    hessian = case.hessian()
    found = extreme_eigenpairs(hessian, cold_start(hessian.parameters, 0), ENOUGH)
    assert float(found.largest.value) == pytest.approx(float(values[-1]), rel=1e-3)
    assert int(found.largest.needed) <= ENOUGH
    assert float(found.largest.error) <= 1e-3 * float(values[-1])
    aligned = float(flatten(found.largest.vector).double() @ vectors[:, -1])
    assert abs(aligned) > 0.999
    # The smallest lies beside many others and takes longer: within its error, and negative.
    error = float(found.smallest.error) + 1e-4 * float(values.abs().max())
    assert float(found.smallest.value) == pytest.approx(float(values[0]), abs=error)
    assert float(found.smallest.value) < 0


@pytest.mark.parametrize("name", ["tanh", "convolution", "transformer"])
def test_the_preconditioned_one(name: str) -> None:
    """P from the squared gradient, whose entries differ by many orders of magnitude."""
    case = Case(name, 10)
    hessian = case.hessian()
    root = [(item.abs() + 1e-4).rsqrt() for item in hessian.gradient]

    def product(vector: Any) -> list[Tensor]:
        image = hessian([a * b for a, b in zip(root, vector, strict=True)])
        return [a * b for a, b in zip(root, image, strict=True)]

    flat = flatten(root).double()
    values = torch.linalg.eigvalsh(flat[:, None] * case.whole() * flat)
    found = extreme_eigenpairs(product, cold_start(hessian.parameters, 0), ENOUGH)
    assert float(found.largest.value) == pytest.approx(float(values[-1]), rel=1e-3)


def test_a_warm_start_follows_the_training() -> None:
    case = Case("transformer", 30)
    vector = list(case.hessian().parameters)
    needed: dict[str, list[int]] = {"warm": [], "cold": []}
    for probe in range(4):
        case.train(2)
        hessian = case.hessian()
        cold = cold_start(hessian.parameters, probe)
        starts = {"warm": vector if probe else cold, "cold": cold}
        found = {
            name: extreme_eigenpairs(hessian, start, ENOUGH, tolerance=1e-3)
            for name, start in starts.items()
        }
        for name, pairs in found.items():
            needed[name].append(int(pairs.largest.needed))
        vector = list(found["warm"].largest.vector)
        assert float(found["warm"].largest.value) == pytest.approx(
            float(found["cold"].largest.value), rel=1e-3
        )
    assert sum(needed["warm"][1:]) < sum(needed["cold"][1:])


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_arpack_with_products_forward_over_reverse_agrees() -> None:
    """Neither the solver nor the products are ours."""
    solver = pytest.importorskip("scipy.sparse.linalg")
    case = Case("tanh", 60)
    names = [name for name, _ in case.model.named_parameters()]
    point = tuple(item.detach().double() for item in case.model.parameters())

    def gradient(*values: Tensor) -> tuple[Tensor, ...]:
        def loss(inner: tuple[Tensor, ...]) -> Tensor:
            return case.loss(dict(zip(names, inner, strict=True)))

        found: tuple[Tensor, ...] = torch.func.grad(loss)(values)
        return found

    def product(vector: Any) -> Any:
        tangent = tuple(unflatten(torch.as_tensor(vector).reshape(-1), point))
        return flatten(torch.func.jvp(gradient, point, tangent)[1]).numpy()

    size = sum(item.numel() for item in point)
    operator = solver.LinearOperator((size, size), matvec=product, dtype=np.float64)
    lowest, highest = sorted(solver.eigsh(operator, k=2, which="BE", v0=np.ones(size))[0])
    hessian = case.hessian(torch.float64)
    found = extreme_eigenpairs(hessian, cold_start(hessian.parameters, 0), 60)
    assert float(found.largest.value) == pytest.approx(highest, rel=1e-9)
    assert float(found.smallest.value) == pytest.approx(lowest, rel=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_curvlinops_agrees() -> None:
    """Where it is installed; it needs torchvision, which few have beside a PyTorch for CPUs."""
    solver = pytest.importorskip("scipy.sparse.linalg")
    curvlinops = pytest.importorskip("curvlinops")
    case = Case("relu", 20)
    operator = curvlinops.HessianLinearOperator(
        case.model, nn.CrossEntropyLoss(), list(case.model.parameters()), [(case.x, case.y)]
    )
    (highest,) = solver.eigsh(operator.to_scipy(), k=1, which="LA")[0]
    hessian = case.hessian()
    found = extreme_eigenpairs(hessian, cold_start(hessian.parameters, 0), ENOUGH)
    assert float(found.largest.value) == pytest.approx(float(highest), rel=1e-4)

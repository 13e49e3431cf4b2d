"""The whole spectrum of the Hessian of a network at one place, outside of the training loop."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gradwatch.arguments import check_loss_fn
from gradwatch.capture.probe.batch import LastBatch
from gradwatch.capture.probe.objective import LossFunction
from gradwatch.capture.probe.undisturbed import undisturbed
from gradwatch.errors import ConfigError, GradwatchError
from gradwatch.numerics.spectral_density import Quadrature, lanczos_quadratures
from gradwatch.table import number, text_table
from gradwatch.theory.argument import positive, require

NEAR_ZERO = 0.01
"""Share of the largest absolute eigenvalue up to which the printed table counts one as near 0."""


@dataclass(frozen=True, slots=True)
class SpectralDensity:
    """Estimate of how the eigenvalues of a Hessian are distributed; print it for a table.

    The nodes are no eigenvalues, but for those at the ends; with their weights they stand for all.

    Attributes:
        parameters: D, how many eigenvalues there are.
        eigenvalues: rising nodes [L/P²].
        weights: the share of all eigenvalues that each node stands for, with sum 1.
        trace: sum of the eigenvalues [L/P²].
        trace_error: its standard error, NaN for a single sample [L/P²].
        largest: eigenvalue, from below [L/P²].
        largest_error: about how far it may be off [L/P²].
        smallest: eigenvalue, from above [L/P²].
        smallest_error: about how far it may be off [L/P²].
    """

    parameters: int
    eigenvalues: tuple[float, ...]
    weights: tuple[float, ...]
    trace: float
    trace_error: float
    largest: float
    largest_error: float
    smallest: float
    smallest_error: float

    def density(
        self, grid: Sequence[float] | NDArray[np.float64], width: float
    ) -> NDArray[np.float64]:
        """The density as a smooth curve: each node a normal law.

        Args:
            grid: where to evaluate it [L/P²].
            width: standard deviation of each law [L/P²].

        Returns:
            One value a point of the grid, with integral 1 over all of them [P²/L].

        Raises:
            ConfigError: unless the width is positive.
        """
        require(positive(width=width))
        nodes, weights = np.asarray(self.eigenvalues), np.asarray(self.weights)
        away = (np.asarray(grid, dtype=np.float64)[:, None] - nodes) / width
        laws: NDArray[np.float64] = np.exp(-(away**2) / 2) / (width * math.sqrt(2 * math.pi))
        curve: NDArray[np.float64] = laws @ weights
        return curve

    def share(self, lower: float, upper: float) -> float:
        """About the share of eigenvalues between two values.

        Args:
            lower: inclusive [L/P²].
            upper: inclusive [L/P²].

        Returns:
            From 0 to 1.
        """
        pairs = zip(self.eigenvalues, self.weights, strict=True)
        return math.fsum(weight for node, weight in pairs if lower <= node <= upper)

    def __str__(self) -> str:
        near = NEAR_ZERO * max(abs(self.largest), abs(self.smallest))
        rows = [
            ["parameters", str(self.parameters)],
            ["largest eigenvalue", _shown(self.largest, self.largest_error)],
            ["smallest eigenvalue", _shown(self.smallest, self.smallest_error)],
            ["trace", _shown(self.trace, self.trace_error)],
            [f"share below {number(-near)}", number(self.share(-math.inf, -near))],
            [f"share above {number(near)}", number(self.share(near, math.inf))],
        ]
        return text_table(("spectrum of the Hessian", "value"), rows)


def spectral_density(
    model: nn.Module,
    loss_fn: Callable[[nn.Module, Any], Tensor],
    batch: Any,
    *,
    products: int = 50,
    samples: int = 4,
    seed: int = 0,
) -> SpectralDensity:
    """The distribution of all eigenvalues of the Hessian of a loss on one batch.

    By stochastic Lanczos quadrature: `samples` random directions, `products` products with the
    Hessian from each, a product costs about two gradients. The model is measured as it is, in train
    or eval mode, and nothing of it changes: neither its gradients nor its buffers, nor the random
    streams. It waits for the device: it is not for the inside of a training loop, where the
    monitors `Sharpness` and `HessianTrace` follow what matters.

    Memory: the graph of a gradient on the whole batch and `products` copies of the parameters.

    Args:
        model: the network.
        loss_fn: the loss of a model on a batch [L].
        batch: as the loss function takes it.
        products: of each sample; more show more of the structure of the spectrum.
        samples: random directions; more make weights and trace more accurate.
        seed: of the directions.

    Returns:
        The nodes, their weights, the trace and both ends.

    Raises:
        ConfigError: if an argument is of another kind or out of its range, the model has nothing to
            train, or the loss or its Hessian is not finite.

    References:
        Ghorbani, Krishnan & Xiao 2019, arXiv:1901.10159; Papyan 2018, arXiv:1811.07062.

    Example:
        >>> line = nn.Linear(2, 1, bias=False)
        >>> x = torch.diag(torch.tensor([1.0, 2.0]))
        >>> found = spectral_density(line, lambda model, batch: model(batch).square().sum(), x)
        >>> [round(value, 3) for value in (found.smallest, found.largest)]
        [2.0, 8.0]
    """
    _check(model, loss_fn, products=products, samples=samples, seed=seed)
    objective = LossFunction(model, loss_fn, LastBatch(), batch)
    with undisturbed(objective.model):
        try:
            parameters = objective.parameters()
            with objective.hessian(parameters) as hessian:
                like = hessian.parameters
                found = lanczos_quadratures(hessian, like, products, samples, seed)
        except GradwatchError as error:
            raise ConfigError(f"the loss cannot be differentiated twice: {error}") from error
    if any(bool(item.nodes.isnan().any()) for item in found):
        raise ConfigError(
            "the Hessian must be finite, got a product with infinite or undefined numbers; see "
            "whether loss and gradients are finite"
        )
    return _joined(found, sum(item.numel() for item in parameters.values()))


def _joined(found: Sequence[Quadrature], parameters: int) -> SpectralDensity:
    nodes = torch.cat([item.nodes for item in found])
    weights = torch.cat([item.weights for item in found]) / len(found)
    order = nodes.argsort()
    means = torch.stack([(item.nodes * item.weights).sum() for item in found])
    error = float(means.std()) / math.sqrt(len(found)) if len(found) > 1 else math.nan
    largest, smallest = max(item.largest for item in found), min(item.smallest for item in found)
    return SpectralDensity(
        parameters=parameters,
        eigenvalues=tuple(nodes[order].tolist()),
        weights=tuple(weights[order].tolist()),
        trace=parameters * float(means.mean()),
        trace_error=parameters * error,
        largest=largest[0],
        largest_error=largest[1],
        smallest=smallest[0],
        smallest_error=smallest[1],
    )


def _shown(value: float, error: float) -> str:
    return number(value) if math.isnan(error) else f"{number(value)} ± {error:.2g}"


def _check(model: Any, loss_fn: Any, **numbers: Any) -> None:
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model must be a torch.nn.Module, got a {type(model).__name__}")
    trained = (item for item in model.parameters() if item.requires_grad)
    if not any(item.numel() for item in trained):
        raise ConfigError(f"model, a {type(model).__name__}, has no parameters to train")
    if loss_fn is None:
        raise ConfigError("loss_fn must be a function of the model and a batch, got None")
    check_loss_fn(loss_fn, None)
    for name, value in numbers.items():
        least = 0 if name == "seed" else 1
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{name} must be a whole number of at least {least}, got {value!r}")

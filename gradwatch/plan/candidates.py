"""Comparing networks before one of them is trained."""

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradwatch.capture.forward.gate import batch_size as size_of
from gradwatch.capture.probe.batch import LastBatch, ObjectiveError
from gradwatch.capture.probe.objective import LossFunction
from gradwatch.capture.probe.undisturbed import undisturbed
from gradwatch.errors import ConfigError
from gradwatch.plan.choice import learning_rate, steps
from gradwatch.plan.measure import FEWEST, gradient_variance, loss_and_curvature
from gradwatch.plan.table import Plan, PlanRow, groups

Builder = Callable[[], nn.Module]
LossFn = Callable[[nn.Module, Any], Tensor]


def network(
    candidates: Mapping[str, Builder] | Sequence[Builder],
    batches: Iterable[Any],
    loss_fn: LossFn,
    *,
    target: float,
    batch_size: int | None = None,
    lowest_loss: float = 0.0,
    seed: int = 0,
) -> Plan:
    """Measures candidate networks at initialisation and compares what it costs to train them.

    For each: L is the top eigenvalue of the Hessian, sigma² the variance of the gradient of one
    sample, D the loss above the lowest one, on the probe batches. Half of the target is for the
    noise floor, half for the steps: the learning rate is that of half the target, at most 0.5/L;
    the steps follow from the bound. Every candidate is built from the same seed; the global random
    streams stay as they are.

    Args:
        candidates: name and function that builds a model, or functions that are then named by
            their place. The model is measured as it is built: in training mode, on its device.
        batches: at least two probe batches, on the same device, independent draws of the data; each
            is kept in memory with its graph.
        loss_fn: the loss of a model on a batch, a mean over its samples [L].
        target: wanted mean square of the gradient [(L/P)²].
        batch_size: samples per step; None for the size of the first probe batch.
        lowest_loss: that can be reached, 0 for a loss that is never negative [L].
        seed: of the initialisation.

    Returns:
        One row a candidate, cheapest first.

    Raises:
        ConfigError: if there are no candidates or fewer than two batches, target is not positive, a
            candidate is no model or has nothing to train, or its loss is not finite, not above
            lowest_loss, or does not bend upwards.

    References:
        Bound derived in `theory.gradient_convergence`; Ithapu, Ravi & Singh 2017,
        arXiv:1702.08670, for its use to choose a network.

    Example:
        >>> x = torch.linspace(-1, 1, 64)[:, None]
        >>> answer = network(
        ...     {"line": lambda: nn.Linear(1, 1), "wide": lambda: nn.Linear(1, 100)},
        ...     [x[::2], x[1::2]],
        ...     lambda model, batch: (model(batch) - batch).square().mean(),
        ...     target=0.01,
        ... )
        >>> [row.parameters for row in answer.rows if row.name == "wide"]
        [200]
    """
    builders = _named(candidates)
    probes = tuple(batches)
    sizes = _sizes(probes)
    if not 0 < target < math.inf:
        raise ConfigError(f"target must be positive and finite, got {target}")
    if batch_size is not None and batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, got {batch_size}")
    size = sizes[0] if batch_size is None else batch_size
    rows = []
    for name, build in builders.items():
        with _seeded(seed):
            try:
                rows.append(
                    _row(name, _built(build), probes, sizes, loss_fn, target, size, lowest_loss)
                )
            except (ConfigError, ObjectiveError) as error:
                raise ConfigError(f"candidate {name!r}: {error}") from error
    rows.sort(key=lambda row: row.cost)
    numbered = zip(rows, groups(rows), strict=True)
    return Plan(target, tuple(replace(row, group=group) for row, group in numbered))


def _row(
    name: str,
    model: nn.Module,
    batches: Sequence[Any],
    sizes: Sequence[int],
    loss_fn: LossFn,
    target: float,
    batch_size: int,
    lowest_loss: float,
) -> PlanRow:
    objectives = [LossFunction(model, loss_fn, LastBatch(), batch) for batch in batches]
    with undisturbed(objectives[0].model):
        loss, curvature = loss_and_curvature(objectives)
        variance, error = gradient_variance(objectives, sizes)
    if loss <= lowest_loss:
        raise ConfigError(f"lowest_loss must be below the loss {loss:.4g}, got {lowest_loss}")
    if curvature <= 0.0:
        raise ConfigError(
            f"the loss must bend upwards along the parameters, got a top curvature {curvature:.4g}"
        )
    rate = learning_rate(
        smoothness=curvature, variance=variance, batch_size=batch_size, target=target
    )
    needed = steps(
        loss_gap=loss - lowest_loss,
        smoothness=curvature,
        variance=variance,
        batch_size=batch_size,
        learning_rate=rate,
        target=target,
    )
    return PlanRow(
        name=name,
        parameters=sum(item.numel() for item in objectives[0].parameters().values()),
        smoothness=curvature,
        variance=variance,
        variance_error=error,
        loss_gap=loss - lowest_loss,
        batch_size=batch_size,
        learning_rate=rate,
        steps=needed,
    )


def _named(candidates: Mapping[str, Builder] | Sequence[Builder]) -> dict[str, Builder]:
    if isinstance(candidates, Mapping):
        named = dict(candidates)
    else:
        named = {str(place): build for place, build in enumerate(candidates)}
    if not named:
        raise ConfigError("candidates must hold at least one function that builds a model")
    return named


def _sizes(batches: Sequence[Any]) -> list[int]:
    if len(batches) < FEWEST:
        raise ConfigError(f"batches must hold at least two probe batches, got {len(batches)}")
    sizes = [size_of(batch) for batch in batches]
    if min(sizes) < FEWEST:
        raise ConfigError(
            "batches must hold tensors whose first dimension counts at least two samples, got "
            f"sizes {sizes}"
        )
    return sizes


def _built(build: Builder) -> nn.Module:
    model = build()
    if not isinstance(model, nn.Module):
        raise ConfigError(f"must build a torch.nn.Module, got a {type(model).__name__}")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(f"the model, a {type(model).__name__}, has no parameters to train")
    return model


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Random streams from a seed; those of the caller are put back."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)

"""Comparing networks before one of them is trained."""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from gradwatch.capture.probe.batch import LastBatch, ObjectiveError
from gradwatch.capture.probe.objective import LossFunction
from gradwatch.capture.probe.undisturbed import undisturbed
from gradwatch.errors import ConfigError
from gradwatch.plan.arguments import Builder, check_loss, check_numbers, named, probe_batches
from gradwatch.plan.choice import learning_rate, steps
from gradwatch.plan.measure import Estimate, gradient_estimate, loss_and_curvature
from gradwatch.plan.table import Plan, PlanRow, groups

LossFn = Callable[[nn.Module, Any], Tensor]
SIGNIFICANT = 2.0  # standard errors that a square of the gradient must be above 0


class _Aim(NamedTuple):
    """What each candidate is to reach, and how."""

    target: float | None
    relative_target: float | None
    batch_size: int
    lowest_loss: float

    def of(self, square: Estimate) -> Estimate:
        """The target of a candidate.

        Args:
            square: of its gradient at initialisation.

        Returns:
            Wanted mean square of the gradient.

        Raises:
            ConfigError: if a relative target has no significant square to refer to.
        """
        if self.target is not None:
            return Estimate(self.target, 0.0)
        assert self.relative_target is not None
        if square.value <= SIGNIFICANT * square.error:
            raise ConfigError(
                "relative_target needs a square of the gradient at initialisation above "
                f"{SIGNIFICANT:g} standard errors, got {square.value:.3g} ± {square.error:.2g}; "
                "give more batches, or a target"
            )
        return Estimate(self.relative_target * square.value, self.relative_target * square.error)


def network(
    candidates: Mapping[str, Builder] | Sequence[Builder],
    batches: Iterable[Any],
    loss_fn: LossFn,
    *,
    target: float | None = None,
    relative_target: float | None = None,
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

    The square of the gradient has another scale in another parametrisation: one network with its
    outputs times 0.1, 1 and 3 costs 160, 7e3 and 6e5 for a target of 0.05, and 3e6, 4e5 and 2e5 for
    a tenth of its own. A relative target is exactly the same for every scale of the loss or of all
    parameters together, but with it a small gradient at the start makes the target strict.

    Args:
        candidates: name and function that builds a model, or functions that are then named by
            their place. The model is measured as it is built: in training mode, on its device.
        batches: at least two probe batches and eight samples, on the same device, independent
            draws of the data; each is kept in memory with its graph.
        loss_fn: the loss of a model on a batch, a mean over its samples [L].
        target: wanted mean square of the gradient, for candidates of the same output scale
            [(L/P)²]; or else give relative_target.
        relative_target: wanted share of each candidate's own square of the gradient at
            initialisation, in (0, 1).
        batch_size: samples per step; None for the size of the first probe batch.
        lowest_loss: that can be reached, 0 for a loss that is never negative [L].
        seed: of the initialisation.

    Returns:
        One row a candidate, by rising cost.

    Raises:
        ConfigError: if an argument is of another kind or out of its range, not exactly one target
            is given, two batches are the same, a candidate is no function that builds a model or
            has nothing to train, its gradient is too small for a relative target, or its loss is
            not finite, not above lowest_loss, or does not bend upwards.

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
    check_numbers(
        target=target,
        relative_target=relative_target,
        batch_size=batch_size,
        lowest_loss=lowest_loss,
        seed=seed,
    )
    check_loss(loss_fn)
    builders = named(candidates)
    probes, sizes = probe_batches(batches)
    size = sizes[0] if batch_size is None else batch_size
    aim = _Aim(target, relative_target, size, lowest_loss)
    rows = []
    for name, build in builders.items():
        with _seeded(seed):
            try:
                rows.append(_row(name, _built(build), probes, sizes, loss_fn, aim))
            except (ConfigError, ObjectiveError) as error:
                raise ConfigError(f"candidate {name!r}: {error}") from error
    rows.sort(key=lambda row: row.cost)
    numbered = zip(rows, groups(rows), strict=True)
    ordered = tuple(replace(row, group=group) for row, group in numbered)
    return Plan(target, relative_target, ordered)


def _row(
    name: str,
    model: nn.Module,
    batches: Sequence[Any],
    sizes: Sequence[int],
    loss_fn: LossFn,
    aim: _Aim,
) -> PlanRow:
    objectives = [LossFunction(model, loss_fn, LastBatch(), batch) for batch in batches]
    with undisturbed(objectives[0].model):
        loss, curvature = loss_and_curvature(objectives)
        square, variance = gradient_estimate(objectives, sizes)
    _check_measured(loss, curvature, aim.lowest_loss)
    target = aim.of(square)
    known = {
        "smoothness": curvature,
        "variance": variance.value,
        "batch_size": aim.batch_size,
        "target": target.value,
    }
    gap, rate = loss - aim.lowest_loss, learning_rate(**known)
    return PlanRow(
        name=name,
        parameters=sum(item.numel() for item in objectives[0].parameters().values()),
        gradient_square=square.value,
        gradient_square_error=square.error,
        smoothness=curvature,
        variance=variance.value,
        variance_error=variance.error,
        loss_gap=gap,
        target=target.value,
        target_error=target.error,
        batch_size=aim.batch_size,
        learning_rate=rate,
        steps=steps(loss_gap=gap, learning_rate=rate, **known),
    )


def _check_measured(loss: float, curvature: float, lowest_loss: float) -> None:
    if loss <= lowest_loss:
        raise ConfigError(f"lowest_loss must be below the loss {loss:.4g}, got {lowest_loss}")
    if curvature <= 0.0:
        raise ConfigError(
            f"the loss must bend upwards along the parameters, got a top curvature {curvature:.4g}"
        )


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

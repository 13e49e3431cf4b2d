"""Checks of what `plan.network` is given."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import nn

from gradwatch.arguments import check_count, check_loss_fn
from gradwatch.capture.forward.gate import batch_size as size_of
from gradwatch.capture.forward.gate import tensors_in
from gradwatch.errors import ConfigError
from gradwatch.plan.measure import FEWEST, FEWEST_PARTS, count_parts, microbatch_size
from gradwatch.theory.argument import finite, inside_unit, positive, require

Builder = Callable[[], nn.Module]
LARGEST_SEED = 2**32 - 1  # of NumPy


def check_numbers(
    *,
    target: float | None,
    relative_target: float | None,
    batch_size: int | None,
    lowest_loss: float,
    seed: int,
) -> None:
    """Checks the numbers.

    Args:
        target: wanted mean square of the gradient, or None.
        relative_target: wanted share of that at initialisation, or None.
        batch_size: samples per step, or None.
        lowest_loss: that can be reached.
        seed: of the initialisation.

    Raises:
        ConfigError: if one is no number or out of its range, or not exactly one target is given.
    """
    if (target is None) == (relative_target is None):
        raise ConfigError(
            f"network needs either target or relative_target, got target={target!r}, "
            f"relative_target={relative_target!r}"
        )
    require(
        "" if target is None else positive(target=target),
        "" if relative_target is None else inside_unit(relative_target=relative_target),
        finite(lowest_loss=lowest_loss),
    )
    check_count("batch_size", batch_size)
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed <= LARGEST_SEED:
        raise ConfigError(f"seed must be an integer from 0 to {LARGEST_SEED}, got {seed!r}")


def check_loss(loss_fn: Any) -> None:
    """Checks the loss function.

    Args:
        loss_fn: of a model and a batch.

    Raises:
        ConfigError: if it cannot be called, or takes something else.
    """
    if loss_fn is None:
        raise ConfigError("loss_fn must be a function of the model and a batch, got None")
    check_loss_fn(loss_fn, None)


def named(candidates: Mapping[str, Builder] | Sequence[Builder]) -> dict[str, Builder]:
    """The candidates by name.

    Args:
        candidates: name and function that builds a model, or functions.

    Returns:
        Name and function; without a name the place.

    Raises:
        ConfigError: if there are none, or one is a model or cannot be called.
    """
    if isinstance(candidates, Mapping):
        found = {str(name): build for name, build in candidates.items()}
    elif isinstance(candidates, Sequence) and not isinstance(candidates, str):
        found = {str(place): build for place, build in enumerate(candidates)}
    else:
        raise ConfigError(
            "candidates must be a mapping or a list of functions that build a model, got "
            f"a {type(candidates).__name__}"
        )
    if not found:
        raise ConfigError("candidates must hold at least one function that builds a model")
    for name, build in found.items():
        if isinstance(build, nn.Module) or not callable(build):
            raise ConfigError(
                f"candidate {name!r} must be a function that builds a model, such as lambda: "
                f"nn.Linear(2, 1), got a {type(build).__name__}"
            )
    return found


def probe_batches(batches: Iterable[Any]) -> tuple[tuple[Any, ...], list[int]]:
    """The probe batches and their sizes.

    Args:
        batches: independent draws of the data.

    Returns:
        The batches, and the samples of each.

    Raises:
        ConfigError: if they are too few or too small for a variance with its error, or two are the
            same.
    """
    if isinstance(batches, torch.Tensor) or not isinstance(batches, Iterable):
        raise ConfigError(f"batches must be a list of batches, got a {type(batches).__name__}")
    probes = tuple(batches)
    if len(probes) < FEWEST:
        raise ConfigError(f"batches must hold at least two probe batches, got {len(probes)}")
    sizes = [size_of(batch) for batch in probes]
    if min(sizes) < FEWEST:
        raise ConfigError(
            "batches must hold tensors whose first dimension counts at least two samples, got "
            f"sizes {sizes}"
        )
    if count_parts(sizes) < FEWEST_PARTS:
        raise ConfigError(
            f"batches must hold at least {FEWEST_PARTS} micro-batches of {microbatch_size(sizes)} "
            f"samples, or the error of the variance is unknown, got sizes {sizes}; give more or "
            "larger batches"
        )
    _check_different(probes)
    return probes, sizes


def _check_different(probes: Sequence[Any]) -> None:
    for (place, one), (later, other) in combinations(enumerate(probes), 2):
        if one is other or _same_tensors(one, other):
            raise ConfigError(
                f"batches must be independent draws of the data, got the same at {place} and "
                f"{later}; give different ones"
            )


def _same_tensors(one: Any, other: Any) -> bool:
    firsts, seconds = list(tensors_in(one)), list(tensors_in(other))
    return len(firsts) == len(seconds) and all(
        first.device == second.device and first.dtype == second.dtype and torch.equal(first, second)
        for first, second in zip(firsts, seconds, strict=True)
    )

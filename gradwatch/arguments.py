"""Checks what the user passes, before step 0."""

import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final, TypeVar

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from gradwatch.capture.model.names import unwrap_optimizer
from gradwatch.errors import AttachError, ConfigError
from gradwatch.interfaces import Monitor

PartT = TypeVar("PartT")

STATE_VERSION: Final = 1
"""Of the states that `Watch.state_dict` returns."""


def check_cadence(every_n_steps: int, log_every_n_steps: int) -> None:
    """Checks the two cadences.

    Args:
        every_n_steps: measure every so many steps.
        log_every_n_steps: report every so many steps.

    Raises:
        ConfigError: unless both are positive and the second is a multiple of the first.
    """
    for name, value in (
        ("every_n_steps", every_n_steps),
        ("log_every_n_steps", log_every_n_steps),
    ):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{name} must be an integer of at least 1, got {value!r}")
    if log_every_n_steps % every_n_steps:
        raise ConfigError(
            f"log_every_n_steps must be a multiple of every_n_steps, got {log_every_n_steps} and "
            f"{every_n_steps}; the nearest multiple is "
            f"{max(1, round(log_every_n_steps / every_n_steps)) * every_n_steps}"
        )


def check_count(name: str, value: int | None) -> None:
    """Checks an optional number of things.

    Args:
        name: of the argument.
        value: its value.

    Raises:
        ConfigError: unless it is None or a positive integer.
    """
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise ConfigError(f"{name} must be a positive integer or None, got {value!r}")


def check_loss_fn(loss_fn: Any, probe_batch: Any) -> None:
    """Checks what probes evaluate.

    Args:
        loss_fn: of the model and a batch, or None.
        probe_batch: the batch, or None.

    Raises:
        ConfigError: if the first cannot be called, or the second has no use without it.
    """
    if loss_fn is not None and not callable(loss_fn):
        raise ConfigError(
            f"loss_fn must be a function of the model and a batch, got {loss_fn!r}; such as "
            "lambda model, batch: criterion(model(batch[0]), batch[1])"
        )
    if isinstance(loss_fn, (nn.Module, type)):
        kind = loss_fn.__name__ if isinstance(loss_fn, type) else type(loss_fn).__name__
        raise ConfigError(
            f"loss_fn must be a function of the model and a batch, got a {kind}, which takes "
            "outputs and targets; write lambda model, batch: criterion(model(batch[0]), batch[1])"
        )
    if probe_batch is not None and loss_fn is None:
        raise ConfigError("probe_batch needs a loss_fn(model, batch) to evaluate it with")


def plain_optimizers(
    model: Any, optimizer: Optimizer | Sequence[Optimizer]
) -> tuple[Optimizer, ...]:
    """The torch optimizers that the user passed, unwrapped.

    Args:
        model: what the user passed as the model.
        optimizer: one optimizer or several.

    Returns:
        At least one optimizer with step hooks.

    Raises:
        AttachError: if one of the two is something else.
    """
    if not isinstance(model, nn.Module):
        raise AttachError(
            f"model must be a torch.nn.Module, got {type(model).__name__}; pass the module that "
            "the training loop calls"
        )
    given = optimizer if isinstance(optimizer, (list, tuple)) else [optimizer]
    found = tuple(unwrap_optimizer(item) for item in given)
    for item in found:
        if not hasattr(item, "register_step_pre_hook"):
            raise AttachError(
                f"optimizer must be a torch.optim.Optimizer or a list of them, got "
                f"{type(item).__name__}, which has no step hooks; pass the torch optimizer inside"
            )
    if not found:
        raise AttachError("optimizer must be at least one optimizer, got an empty list")
    return found


def typed(argument: str, kind: Callable[..., PartT], items: Iterable[PartT]) -> tuple[PartT, ...]:
    """Checks a list of parts.

    Args:
        argument: name of the argument.
        kind: the class that each must be an instance of.
        items: the parts.

    Returns:
        The parts.

    Raises:
        ConfigError: if one is something else, such as the class instead of an instance.
    """
    if not isinstance(items, Iterable):
        raise ConfigError(f"{argument} must be a list, got {type(items).__name__}")
    parts = tuple(items)
    for part in parts:
        if not (isinstance(kind, type) and isinstance(part, kind)):
            hint = f"; write {part.__name__}()" if isinstance(part, type) else ""
            raise ConfigError(
                f"{argument} must hold instances of {kind.__qualname__}, got {part!r}{hint}"
            )
    return parts


def distinct_metrics(monitors: Sequence[Monitor]) -> tuple[str, ...]:
    """The metrics of all monitors.

    Args:
        monitors: the monitors.

    Returns:
        Their metrics, in order.

    Raises:
        ConfigError: if two monitors report the same metric, or probe the same number.
    """
    _check_distinct("report different metrics", [(item, item.metrics) for item in monitors])
    _check_distinct("probe different numbers", [(item, item.probed) for item in monitors])
    return tuple(metric for monitor in monitors for metric in monitor.metrics)


def _check_distinct(what: str, names: Sequence[tuple[Monitor, Sequence[str]]]) -> None:
    owners: dict[str, str] = {}
    for monitor, its_own in names:
        for name in its_own:
            if name in owners:
                raise ConfigError(
                    f"monitors must {what}, got {name!r} from both {owners[name]} and "
                    f"{type(monitor).__name__}; leave one of them out"
                )
            owners[name] = type(monitor).__name__


def check_share(name: str, value: float | None) -> None:
    """Checks an optional share of something.

    Args:
        name: of the argument.
        value: its value.

    Raises:
        ConfigError: unless it is None or a number above 0 and at most 1.
    """
    if value is None:
        return
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value <= 1:
        raise ConfigError(f"{name} must be None or a share above 0, at most 1, got {value!r}")


def checked_state(state: Mapping[str, Any]) -> tuple[int, Any]:
    """Step and model of a state that may have come from anywhere.

    Args:
        state: what the user took for a state of `Watch.state_dict`.

    Returns:
        The step, and the facts about the model as plain values or None.

    Raises:
        ConfigError: if the state is of another version or damaged.
    """
    if not isinstance(state, Mapping):
        raise ConfigError(
            f"the state must be what Watch.state_dict returned, got {type(state).__name__}"
        )
    if state.get("version") != STATE_VERSION:
        raise ConfigError(
            f"the state must have version {STATE_VERSION}, got {state.get('version')!r}; "
            "it was saved by another version of gradwatch"
        )
    missing = [key for key in ("step", "model", "pipeline", "announced") if key not in state]
    if missing:
        raise ConfigError(
            f"the state must be what Watch.state_dict returned, got one without {missing}; "
            "start without it"
        )
    step = state["step"]
    if not isinstance(step, int) or step < 0:
        raise ConfigError(f"the state must have a step of at least 0, got the step {step!r}")
    return step, state["model"]


def installed_versions() -> dict[str, str]:
    """Versions that a run's record names."""
    try:
        own = version("torch-gradwatch")
    except PackageNotFoundError:  # used from a source folder that was never installed
        own = "unknown"
    return {
        "gradwatch": own,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }

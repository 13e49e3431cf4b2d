"""What a Trainer knows of the training; what it does not know is None, never a guess."""

import math
from typing import Any

import torch
from torch import Tensor


def optimizes(trainer: Any) -> bool:
    """Whether there is something to watch: `configure_optimizers` may have returned None.

    Args:
        trainer: at the start of a fit.

    Returns:
        True if an optimizer holds a parameter.
    """
    return any(group["params"] for item in trainer.optimizers for group in item.param_groups)


def planned_steps(trainer: Any) -> int | None:
    """The planned number of optimizer steps.

    Args:
        trainer: in `on_train_start` or later; earlier it would load the data.

    Returns:
        The number, or None if the training is endless, if the user's own code decides when the
        optimizers step, or if accumulation changes, of which Lightning's estimate knows nothing.
    """
    changing = any(is_a(item, "GradientAccumulationScheduler") for item in trainer.callbacks)
    if changing or not trainer.lightning_module.automatic_optimization:
        return None
    steps = trainer.estimated_stepping_batches
    return int(steps) if math.isfinite(steps) and steps >= 1 else None


def train_size(trainer: Any) -> int | None:
    """The number of training samples.

    Args:
        trainer: in `on_train_start` or later.

    Returns:
        The length of the training set; None if it has none, if there are several sets, or if
        `overfit_batches` takes an unknown part of it.
    """
    if getattr(trainer, "overfit_batches", 0):
        return None
    dataset = getattr(trainer.train_dataloader, "dataset", None)
    try:
        size = len(dataset)  # type: ignore[arg-type]  # what has no length raises
    except Exception:  # the user's own code, or none of the kind
        return None
    return size if size >= 1 else None


def is_a(thing: Any, name: str) -> bool:
    """Whether something is of a class of Lightning, or of a subclass.

    Args:
        thing: a logger or a callback.
        name: of the class; there are two packages, and importing one of them takes seconds.

    Returns:
        True if one of its classes has that name.
    """
    return any(cls.__name__ == name for cls in type(thing).__mro__)


def axis_now(trainer: Any) -> int:
    """Where Lightning itself draws what is logged now.

    Args:
        trainer: of either package.

    Returns:
        Batches that led to a step. With several optimizers `global_step` counts each of them.
    """
    loop = getattr(trainer.fit_loop, "epoch_loop", None)
    return int(getattr(loop, "_batches_that_stepped", trainer.global_step))


def unscaled(trainer: Any, loss: Tensor) -> Tensor:
    """The loss without the factor of loss scaling.

    Args:
        trainer: of either package.
        loss: as it goes into the backward pass [L].

    Returns:
        The loss, detached; nothing is read on the host [L].
    """
    loss = loss.detach()
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None:
        return loss.clone()
    scale: Tensor = scaler.scale(torch.ones((), device=loss.device))
    return loss / scale


def hides_raw_gradients(trainer: Any) -> bool:
    """Whether no hook shows the gradients of a step, unscaled and before clipping.

    Args:
        trainer: of either package.

    Returns:
        True if a fused optimizer takes the loss scale out itself, and with manual optimization
        if there is a loss scale or more than one optimizer: a backward pass may belong to any.
    """
    scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
    if not trainer.lightning_module.automatic_optimization:
        return scaled or len(trainer.optimizers) > 1
    return scaled and any(
        getattr(item, "_step_supports_amp_scaling", False) for item in trainer.optimizers
    )


def is_compiled(module: Any) -> bool:
    """Whether `torch.compile(module)` was given to the Trainer, which unwraps it."""
    return getattr(module, "_compiler_ctx", None) is not None

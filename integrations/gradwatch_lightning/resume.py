"""What a checkpoint holds of a fit, and how the next fit goes on from it."""

from collections.abc import Mapping
from typing import Any

import gradwatch
from gradwatch.errors import ConfigError
from gradwatch.isolation import logger as log
from gradwatch_lightning.fit import Fit
from gradwatch_lightning.trainer_facts import axis_now


def state_of(fit: Fit) -> dict[str, Any]:
    """What a checkpoint must hold.

    Args:
        fit: under way or over.

    Returns:
        Plain values only.
    """
    return {"global_step": int(fit.trainer.global_step), "watch": fit.watch.state_dict()}


def resume(fit: Fit, saved: Mapping[str, Any]) -> None:
    """Lets a fit go on from a state, if that belongs to this point of the training.

    Otherwise it counts on from the step of the Trainer, but knows nothing of what was before.

    Args:
        fit: that has just begun.
        saved: what `state_of` returned, or anything else that a checkpoint held.
    """
    trainer, watch = fit.trainer, fit.watch
    if trainer.global_step == 0:
        return
    state = saved.get("watch") if saved.get("global_step") == trainer.global_step else None
    if not (isinstance(state, Mapping) and _loads(watch, state)):
        automatic = trainer.lightning_module.automatic_optimization
        done = trainer.global_step if automatic else axis_now(trainer)
        watch.load_state_dict(watch.state_dict() | {"step": int(done)})
    fit.resumed()


def _loads(watch: gradwatch.Watch, state: Mapping[str, Any]) -> bool:
    """Loads a state if it is about the same parameters, and whole."""
    now, model = watch.model_info, state.get("model")
    if model is not None:
        if list(model.get("parameters", ())) != list(now.parameters):
            return False
        # A run is resumed to train longer than was planned.
        plans = {"planned_steps": now.planned_steps, "train_size": now.train_size}
        state = {**state, "model": {**model, **plans}}
    try:
        watch.load_state_dict(state)
    except ConfigError as error:
        log.warning("the record starts anew at this step: %s", error)
        return False
    return True

"""The one line that joins gradwatch to a Trainer."""

from typing import Any

from transformers import Trainer

from gradwatch.errors import AttachError
from gradwatch_transformers.callback import GradwatchCallback


def attach(trainer: Trainer, **options: Any) -> GradwatchCallback:
    """Watches every training of a Trainer; call it before `trainer.train()`.

    Better than `Trainer(callbacks=[GradwatchCallback()])`: the callback goes in front of those
    of the loggers, so that its values reach all of `report_to`, and it sees the model as the
    Trainer calls it, compiled or wrapped.

    Args:
        trainer: of transformers, or a subclass such as those of TRL.
        **options: those of `GradwatchCallback`.

    Returns:
        The callback; it closes its watch at the end of the training, and as a context manager
        also when the training is interrupted.

    Raises:
        AttachError: if there is no Trainer to attach to, or it is watched already, or training.
        ConfigError: if an option cannot work.
    """
    if not isinstance(trainer, Trainer):
        raise AttachError(
            f"trainer must be a transformers.Trainer, got {type(trainer).__name__}; make the "
            "Trainer first and attach to it before trainer.train()"
        )
    if any(isinstance(item, GradwatchCallback) for item in trainer.callback_handler.callbacks):
        raise AttachError(
            "this trainer has a GradwatchCallback already; leave it out of callbacks=[...], or "
            "take it off with trainer.remove_callback(GradwatchCallback)"
        )
    if getattr(trainer, "is_in_train", False):
        raise AttachError(
            "the trainer is training already; call attach(trainer) before trainer.train()"
        )
    callback = GradwatchCallback(**options)
    trainer.add_callback(callback)
    callback.belongs_to(trainer)
    return callback

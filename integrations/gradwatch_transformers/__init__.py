"""gradwatch in the Hugging Face Trainer: one line before `trainer.train()`.

    callback = gradwatch_transformers.attach(trainer, logdir="runs/first")
    trainer.train()
    print(callback.summary())

Example:
    >>> from gradwatch_transformers import GradwatchCallback
    >>> GradwatchCallback(every_n_steps=10, log_every_n_steps=10).recommendations
    ()
"""

from gradwatch.errors import MissingExtraError

try:
    import accelerate  # noqa: F401 - asked for here, to say which extra brings them
    import transformers.trainer_callback  # noqa: F401
except ImportError as error:
    raise MissingExtraError("gradwatch_transformers", "transformers", error) from error

from gradwatch_transformers.attach import attach
from gradwatch_transformers.callback import GradwatchCallback

__all__ = ["GradwatchCallback", "attach"]

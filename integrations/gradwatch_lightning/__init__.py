"""gradwatch in Lightning: one callback for `lightning` and for `pytorch_lightning`.

    trainer = Trainer(callbacks=[GradwatchCallback()])

Example:
    >>> from gradwatch_lightning import GradwatchCallback
    >>> GradwatchCallback.__name__
    'GradwatchCallback'
"""

from gradwatch_lightning.callback import GradwatchCallback

__all__ = ["GradwatchCallback"]

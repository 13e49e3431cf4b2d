"""gradwatch in TensorBoard: measured values, their bounds and the advice, live.

Example:
    >>> from gradwatch_tensorboard import TensorBoardSink
    >>> TensorBoardSink.__name__
    'TensorBoardSink'
"""

from gradwatch_tensorboard.sink import TensorBoardSink

__all__ = ["TensorBoardSink"]

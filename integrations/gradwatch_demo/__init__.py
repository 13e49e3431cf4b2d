"""The demo: real handwritten digits, watched from the first step to the advice and beyond it.

    gradwatch demo

trains a deep classifier as PyTorch initialises it, prints what the watch found, and trains it once
more with the advice followed. The command needs the extra `demo`.
"""

from gradwatch import MissingExtraError

try:
    from gradwatch_demo.demo import run_demo
except ImportError as error:
    raise MissingExtraError("gradwatch demo", "demo", error) from error

__all__ = ["run_demo"]

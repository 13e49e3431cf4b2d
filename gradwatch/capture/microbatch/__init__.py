"""The gradient norm of every micro-batch of a step, on this process alone."""

from gradwatch.capture.microbatch.capture import MicrobatchCapture
from gradwatch.capture.microbatch.record import MicrobatchNorms

__all__ = ["MicrobatchCapture", "MicrobatchNorms"]

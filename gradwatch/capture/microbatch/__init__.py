"""The gradient norm of every micro-batch of a step, on this process alone."""

from gradwatch.capture.microbatch.capture import MicrobatchCapture
from gradwatch.capture.microbatch.record import MicrobatchNorms
from gradwatch.capture.microbatch.tap import MicrobatchTap

__all__ = ["MicrobatchCapture", "MicrobatchNorms", "MicrobatchTap"]

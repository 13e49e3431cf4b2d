"""The gradient norm of every micro-batch of a step, on this process alone."""

from gradwatch.capture.step.microbatch.capture import MicrobatchCapture
from gradwatch.capture.step.microbatch.covariance import covariance_of, microbatch_covariance
from gradwatch.capture.step.microbatch.independent import independent_gradients
from gradwatch.capture.step.microbatch.record import MicrobatchNorms
from gradwatch.capture.step.microbatch.tap import MicrobatchTap

__all__ = [
    "MicrobatchCapture",
    "MicrobatchNorms",
    "MicrobatchTap",
    "covariance_of",
    "independent_gradients",
    "microbatch_covariance",
]

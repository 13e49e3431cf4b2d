"""One metric family a file: what is the value now?"""

from gradwatch.monitors.activation_norm import ActivationNorm
from gradwatch.monitors.dropout_noise import DropoutNoise
from gradwatch.monitors.gradient_noise import GradientNoise
from gradwatch.monitors.gradient_norm import GradientNorm
from gradwatch.monitors.input_statistics import InputStatistics
from gradwatch.monitors.loss_value import LossValue
from gradwatch.monitors.lr_batch_ratio import LrBatchRatio
from gradwatch.monitors.microbatch_gradient_norm import MicrobatchGradientNorm
from gradwatch.monitors.noise_curvature import NoiseCurvature
from gradwatch.monitors.non_finite import NonFinite
from gradwatch.monitors.parameter_norm import ParameterNorm
from gradwatch.monitors.smoothness import Smoothness
from gradwatch.monitors.stationarity import Stationarity
from gradwatch.monitors.update_ratio import UpdateRatio

__all__ = [
    "ActivationNorm",
    "DropoutNoise",
    "GradientNoise",
    "GradientNorm",
    "InputStatistics",
    "LossValue",
    "LrBatchRatio",
    "MicrobatchGradientNorm",
    "NoiseCurvature",
    "NonFinite",
    "ParameterNorm",
    "Smoothness",
    "Stationarity",
    "UpdateRatio",
]

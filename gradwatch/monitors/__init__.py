"""One metric family a file: what is the value now?"""

from gradwatch.monitors.activation_norm import ActivationNorm
from gradwatch.monitors.batch_sharpness import BatchSharpness
from gradwatch.monitors.dropout_noise import DropoutNoise
from gradwatch.monitors.edge_of_stability import EdgeOfStability
from gradwatch.monitors.gradient_covariance import GradientCovariance
from gradwatch.monitors.gradient_noise import GradientNoise
from gradwatch.monitors.gradient_norm import GradientNorm
from gradwatch.monitors.hessian_trace import HessianTrace
from gradwatch.monitors.input_statistics import InputStatistics
from gradwatch.monitors.loss_value import LossValue
from gradwatch.monitors.lr_batch_ratio import LrBatchRatio
from gradwatch.monitors.microbatch_gradient_norm import MicrobatchGradientNorm
from gradwatch.monitors.noise_curvature import NoiseCurvature
from gradwatch.monitors.non_finite import NonFinite
from gradwatch.monitors.parameter_norm import ParameterNorm
from gradwatch.monitors.sharpness import Sharpness
from gradwatch.monitors.smoothness import Smoothness
from gradwatch.monitors.stationarity import Stationarity
from gradwatch.monitors.update_ratio import UpdateRatio

__all__ = [
    "ActivationNorm",
    "BatchSharpness",
    "DropoutNoise",
    "EdgeOfStability",
    "GradientCovariance",
    "GradientNoise",
    "GradientNorm",
    "HessianTrace",
    "InputStatistics",
    "LossValue",
    "LrBatchRatio",
    "MicrobatchGradientNorm",
    "NoiseCurvature",
    "NonFinite",
    "ParameterNorm",
    "Sharpness",
    "Smoothness",
    "Stationarity",
    "UpdateRatio",
]

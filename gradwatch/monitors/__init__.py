"""One metric family a file: what is the value now?"""

from gradwatch.monitors.activation_norm import ActivationNorm
from gradwatch.monitors.gradient_norm import GradientNorm
from gradwatch.monitors.loss_value import LossValue
from gradwatch.monitors.lr_batch_ratio import LrBatchRatio
from gradwatch.monitors.microbatch_gradient_norm import MicrobatchGradientNorm
from gradwatch.monitors.non_finite import NonFinite
from gradwatch.monitors.parameter_norm import ParameterNorm
from gradwatch.monitors.update_ratio import UpdateRatio

__all__ = [
    "ActivationNorm",
    "GradientNorm",
    "LossValue",
    "LrBatchRatio",
    "MicrobatchGradientNorm",
    "NonFinite",
    "ParameterNorm",
    "UpdateRatio",
]

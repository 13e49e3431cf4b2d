"""Learning-rate/batch ratio and gradient noise scale.

Learning rate eta, batch size S and gradient variance act through eta sigma²/S as long as the
steps are small against the curvature (Jastrzebski et al. 2017, arXiv:1711.04623, in the text of
its ICLR 2018 submission). The noise scale tr(Sigma)/|G|² is the largest useful batch (McCandlish
et al. 2018, arXiv:1812.06162, abstract). What is marked "derived here" was derived for this package
and checked by simulation.

Symbols: G true gradient, Sigma covariance of the gradient of one sample, H Hessian of the mean
loss, lambda its eigenvalues, beta momentum coefficient of heavy ball, N training samples,
B_simple = tr(Sigma)/|G|², B_noise = tr(H Sigma)/(G^T H G). The laws are for SGD: Adam divides the
noise out, and eta/S is not its temperature. The noise scale rises by orders of magnitude during a
training.
"""

from gradwatch.theory.lr_batch_ratio.efficiency import (
    rescaled_learning_rate,
    sample_efficiency,
    step_efficiency,
)
from gradwatch.theory.lr_batch_ratio.noise_scale import (
    adam_estimate,
    curvature_estimate,
    curvature_noise_scale,
    microbatch_norm_estimate,
    simple_noise_scale,
    two_batch_estimate,
)
from gradwatch.theory.lr_batch_ratio.optimal_step import (
    best_gain,
    expected_loss_change,
    noiseless_step,
    optimal_step,
    simple_stationarity_bound,
    stall_ratio,
)
from gradwatch.theory.lr_batch_ratio.stationary import (
    finite_data_factor,
    finite_data_holds,
    learning_rate_limit,
    ratio_law_limit,
    stationary_excess_loss,
    stationary_variance,
    stationary_variance_limit,
    without_replacement_factor,
)
from gradwatch.theory.lr_batch_ratio.temperature import (
    effective_ratio,
    minima_ratio,
    noise_threshold,
    temperature,
)

__all__ = [
    "adam_estimate",
    "best_gain",
    "curvature_estimate",
    "curvature_noise_scale",
    "effective_ratio",
    "expected_loss_change",
    "finite_data_factor",
    "finite_data_holds",
    "learning_rate_limit",
    "microbatch_norm_estimate",
    "minima_ratio",
    "noise_threshold",
    "noiseless_step",
    "optimal_step",
    "ratio_law_limit",
    "rescaled_learning_rate",
    "sample_efficiency",
    "simple_noise_scale",
    "simple_stationarity_bound",
    "stall_ratio",
    "stationary_excess_loss",
    "stationary_variance",
    "stationary_variance_limit",
    "step_efficiency",
    "temperature",
    "two_batch_estimate",
    "without_replacement_factor",
]

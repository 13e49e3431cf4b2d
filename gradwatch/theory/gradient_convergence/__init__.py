"""Gradient convergence: how small the true gradient gets, and what sets it.

Stochastic gradient descent on a smooth objective makes the mean square of its gradient small in
expectation, down to a floor that learning rate and batch size set. That network structure, input
statistics, dropout and denoising act through the constants of such a bound is the subject of
Ithapu, Ravi & Singh 2017, arXiv:1702.08670 (abstract; its theorems are not quoted). Every formula
here is derived for this package and checked by simulation.

Symbols: f objective as trained (dropout averaged, weight decay included), g learning rate of plain
SGD, N steps, B batch size, D = f(start) - lowest f, L smoothness (top eigenvalue of the Hessian
along the path), sigma² trace of the covariance of the gradient of one sample, s² = sigma²/B, eps
target for the mean of ||grad f||², zeta keep rate of a mask (1 - p of `nn.Dropout`).

Along a training L and sigma² change by factors, up or down (7 to 30 times up in one experiment):
what follows from those at initialisation may be off either way, so measure again during the
training. Nothing here is about test error.
"""

from gradwatch.theory.gradient_convergence.bound import (
    Split,
    noise_floor,
    path_bound,
    stationarity_bound,
    stationarity_bound_decay,
    stopping_weights,
)
from gradwatch.theory.gradient_convergence.dropout import (
    keep_rate_for_target,
    linear_dropout_penalty,
    mask_law,
    masked_second_moment,
    two_mask_variance,
    update_coverage,
    variance_at,
)
from gradwatch.theory.gradient_convergence.family import (
    Setting,
    pretraining_steps_saved,
    same_convergence,
)
from gradwatch.theory.gradient_convergence.inversion import (
    batch_size_for_floor,
    batch_size_for_target,
    best_learning_rate,
    learning_rate_for_floor,
    step_progress,
    steps_for_target,
    trainings_for_reliability,
)
from gradwatch.theory.gradient_convergence.noise import (
    GradientEstimate,
    microbatch_estimate,
    weighted_estimate,
)
from gradwatch.theory.gradient_convergence.structure import (
    SIGMOID_CURVATURE,
    box_squares,
    input_curvature_bound,
    layer_gradient_squares,
    one_layer_smoothness,
    one_layer_variance,
)

__all__ = [
    "SIGMOID_CURVATURE",
    "GradientEstimate",
    "Setting",
    "Split",
    "batch_size_for_floor",
    "batch_size_for_target",
    "best_learning_rate",
    "box_squares",
    "input_curvature_bound",
    "keep_rate_for_target",
    "layer_gradient_squares",
    "learning_rate_for_floor",
    "linear_dropout_penalty",
    "mask_law",
    "masked_second_moment",
    "microbatch_estimate",
    "noise_floor",
    "one_layer_smoothness",
    "one_layer_variance",
    "path_bound",
    "pretraining_steps_saved",
    "same_convergence",
    "stationarity_bound",
    "stationarity_bound_decay",
    "step_progress",
    "steps_for_target",
    "stopping_weights",
    "trainings_for_reliability",
    "two_mask_variance",
    "update_coverage",
    "variance_at",
    "weighted_estimate",
]

"""Break-even point and edge of stability.

Early in a training the sharpness lambda, the largest eigenvalue of the Hessian H, and lambda_K,
that of the covariance K of the gradients of single examples, grow together until the steps become
unstable along the sharpest direction: the break-even point. A larger learning rate or a smaller
batch gets there earlier, at a smaller sharpness (Jastrzebski et al. 2020, arXiv:2002.09572, in the
text of its ICLR 2020 submission). Without noise the sharpness then hovers at the stability
threshold of the optimizer (Cohen et al. 2021, arXiv:2103.00065; 2022, arXiv:2207.14484). What is
marked "derived here" was derived for this package and checked by simulation.

The ratio r of sharpness and threshold says whether curvature limits the learning rate: far below 1
it does not, about 1 is normal at a large learning rate, well above 1 with a rising loss the run
diverges. What is said of the time after the break-even point presupposes that it was reached: two
runs of r far below 1 are no test of it.
"""

from gradwatch.theory.break_even.covariance import (
    corrected_top_eigenvalue,
    gram_factor,
    minibatch_variance,
    resolution_limit,
    top_eigenvalue_bias,
)
from gradwatch.theory.break_even.noise import (
    StabilityShares,
    break_even_curvature,
    largest_learning_rate,
    noise_factor,
    second_moment_factor,
    smallest_batch_size,
    stability_shares,
    stable_curvatures,
)
from gradwatch.theory.break_even.objective import another_gradient, same_gradient
from gradwatch.theory.break_even.optimizer import (
    PRECONDITIONED,
    Threshold,
    settled_step,
    threshold_at,
    threshold_of,
)
from gradwatch.theory.break_even.sample import ENOUGH_EXAMPLES, stands_for_all
from gradwatch.theory.break_even.threshold import (
    adam_threshold,
    adamw_threshold,
    minibatch_threshold,
    momentum_threshold,
    nesterov_threshold,
    return_length,
    rmsprop_threshold,
)

__all__ = [
    "ENOUGH_EXAMPLES",
    "PRECONDITIONED",
    "StabilityShares",
    "Threshold",
    "adam_threshold",
    "adamw_threshold",
    "another_gradient",
    "break_even_curvature",
    "corrected_top_eigenvalue",
    "gram_factor",
    "largest_learning_rate",
    "minibatch_threshold",
    "minibatch_variance",
    "momentum_threshold",
    "nesterov_threshold",
    "noise_factor",
    "resolution_limit",
    "return_length",
    "rmsprop_threshold",
    "same_gradient",
    "second_moment_factor",
    "settled_step",
    "smallest_batch_size",
    "stability_shares",
    "stable_curvatures",
    "stands_for_all",
    "threshold_at",
    "threshold_of",
    "top_eigenvalue_bias",
]

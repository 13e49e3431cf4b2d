"""Norm preservation at initialisation: laws for activations and gradients of a fresh network.

A bias-free ReLU network with He weights keeps the norm of its activations and of its weight
gradients up to random factors (Arpit & Bengio 2019, arXiv:1901.03611, abstract). This module holds
the exact law of those factors and what follows from it. The theorems of that paper are not quoted:
"derived here" marks a statement derived for this package and checked by simulation.

Symbols: m width, n fan-in, L depth, rho = ||h_l||^2 / ||h_(l-1)||^2 the factor of one layer, R_l
the product of the first l factors, q = ||h||^2 / m the mean square, phi the activation, z a
standard normal number, N examples, delta a failure probability. Norms are Euclidean; factors,
their variances, and probabilities are pure numbers. A count is a whole number of at least 1.
"""

from gradwatch.theory.norm_preservation.activation import (
    ActivationLaw,
    activation_law,
    activation_second_moment,
    known_activations,
)
from gradwatch.theory.norm_preservation.architecture import (
    dropout_factor,
    largest_dropout,
    padding_factor,
    padding_profile,
    residual_factor,
)
from gradwatch.theory.norm_preservation.chain import (
    NARROWEST,
    log_ratio_moments,
    norm_variance,
    ratio_variance,
    width_for_stability,
    z_score,
)
from gradwatch.theory.norm_preservation.depth_bound import (
    layer_tolerance,
    lower_tail_bound,
    martingale_width,
    ratio_moment,
    union_width,
    upper_tail_bound,
)
from gradwatch.theory.norm_preservation.gradient import (
    gradient_factor,
    gradient_log_variance,
    weight_gradient_norm,
)
from gradwatch.theory.norm_preservation.initialisation import (
    bias_noise_floor,
    default_variance,
    he_variance_fan_in,
    he_variance_fan_out,
    mean_square_factor,
    squared_norm_factor,
)
from gradwatch.theory.norm_preservation.one_layer import (
    Moments,
    chernoff_rate,
    layer_moments,
    relu_square_mgf,
    tail_bound,
    tail_rate,
    union_bound,
)
from gradwatch.theory.norm_preservation.subspace import NormBounds, subspace_bounds, subspace_width

__all__ = [
    "NARROWEST",
    "ActivationLaw",
    "Moments",
    "NormBounds",
    "activation_law",
    "activation_second_moment",
    "bias_noise_floor",
    "chernoff_rate",
    "default_variance",
    "dropout_factor",
    "gradient_factor",
    "gradient_log_variance",
    "he_variance_fan_in",
    "he_variance_fan_out",
    "known_activations",
    "largest_dropout",
    "layer_moments",
    "layer_tolerance",
    "log_ratio_moments",
    "lower_tail_bound",
    "martingale_width",
    "mean_square_factor",
    "norm_variance",
    "padding_factor",
    "padding_profile",
    "ratio_moment",
    "ratio_variance",
    "relu_square_mgf",
    "residual_factor",
    "squared_norm_factor",
    "subspace_bounds",
    "subspace_width",
    "tail_bound",
    "tail_rate",
    "union_bound",
    "union_width",
    "upper_tail_bound",
    "weight_gradient_norm",
    "width_for_stability",
    "z_score",
]

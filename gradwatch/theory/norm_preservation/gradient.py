"""Gradients of the weights: their norms, and the correction for finite width."""

import math

import numpy as np

from gradwatch.theory.argument import fault_in, whole
from gradwatch.theory.norm_preservation.vector import Vector


def weight_gradient_norm(inputs: Vector, errors: Vector) -> float:
    """Norm of the weight gradient of one example, ||dl/dW||_F = ||h|| ||delta||, exactly.

    With T positions that share the weight it is ||sum_t delta_t h_t^T||_F =
    sqrt(sum((H H^T) * (D D^T))). The gradient of a batch is not such a product.

    Args:
        inputs: h, (n,) or (T, n), input of the layer.
        errors: delta, (m,) or (T, m), derivative of the example's own loss with respect to the
            pre-activation.

    Returns:
        The Frobenius norm, in the unit of loss over weight.

    Raises:
        ValueError: If an array has more than two dimensions or the numbers of positions differ.

    References:
        Arpit & Bengio 2019, arXiv:1901.03611, abstract, for its use; identity derived here.

    Example:
        >>> weight_gradient_norm(np.array([3.0, 4.0]), np.array([0.0, 2.0]))
        10.0
    """
    h, delta = np.atleast_2d(inputs).astype(float), np.atleast_2d(errors).astype(float)
    if h.ndim != 2 or delta.ndim != 2 or len(h) != len(delta):
        raise ValueError(
            "inputs and errors must be (n,) and (m,) or (T, n) and (T, m), "
            f"got {np.shape(inputs)} and {np.shape(errors)}"
        )
    return math.sqrt(max(0.0, float(np.sum((h @ h.T) * (delta @ delta.T)))))


def gradient_factor(depth: int, layer: int, alignment: float, width: int) -> float:
    """Expected E ||delta_l||^2 / ||delta_L||^2 = 1 + (L-l) (c2 - 2/m), to first order.

    a_l . delta_l is conserved along the depth, so an error aligned with the last activation grows
    towards the input. By the claim of the paper, ||dl/dW_l|| = ||x|| ||delta_L||, it is 1.

    Args:
        depth: L, bias-free fan-out He ReLU layers of equal width.
        layer: l, from 1 to L.
        alignment: c2, squared cosine of the angle between h_L and delta_L; 2/m if unaligned.
        width: m.

    Returns:
        The factor of the squared gradient norm.

    Raises:
        ValueError: If depth, layer or width is not a count, layer is above depth, alignment is
            outside [0, 1], or the first-order form is not positive (too deep for the width).

    References:
        Derived here, for the claim of Arpit & Bengio 2019, arXiv:1901.03611, abstract.

    Example:
        >>> round(gradient_factor(10, 5, 0.082, 100), 3)
        1.31
    """
    counts = whole(depth=depth, layer=layer, width=width)
    counts = counts or fault_in({"layer": layer}, lambda v: v <= depth, f"be at most depth {depth}")
    if fault := counts or fault_in(
        {"alignment": alignment}, lambda v: 0 <= v <= 1, "lie in [0, 1]"
    ):
        raise ValueError(fault)
    factor = 1.0 + (depth - layer) * (alignment - 2.0 / width)
    if factor <= 0.0:
        raise ValueError(
            f"width must be large against depth for the first-order form, got {width} and {depth}"
        )
    return factor


def gradient_log_variance(depth: int, width: int) -> float:
    """Variance of the log squared weight gradient, about 5 (L-1) / m at every layer.

    Args:
        depth: L, fan-out He ReLU layers of equal width.
        width: m.

    Returns:
        The variance between initialisations.

    Raises:
        ValueError: If depth or width is not a count.

    References:
        Derived here.

    Example:
        >>> gradient_log_variance(11, 100)
        0.5
    """
    if fault := whole(depth=depth, width=width):
        raise ValueError(fault)
    return 5.0 * (depth - 1) / width

"""Dropout and denoising as gradient noise.

With independent masks per sample the objective is the loss averaged over masks, and the variance
of the gradient is that of the data plus that of the masks (law of total variance, exact). PyTorch
divides kept units by the keep rate, zeta = 1 - p: "inverted" masks. Plain masks do not, and their
signal, gradient and noise all shrink with the keep rate.
"""

import numpy as np
from numpy.typing import ArrayLike

from gradwatch.errors import ConfigError
from gradwatch.theory.argument import (
    Vector,
    at_least_one,
    inside_unit,
    keep_rate,
    not_negative,
    positive,
    require,
    values_of,
)


def two_mask_variance(difference_square: float, batch_size: float) -> float:
    """Variance per sample that the masks cause: B ||g_1 - g_2||² / 2, unbiased.

    Args:
        difference_square: ||g_1 - g_2||², of the gradients of the same batch under two
            independent draws of the masks [(L/P)²].
        batch_size: B, at least 1.

    Returns:
        sigma²_mask [(L/P)²].

    Raises:
        ConfigError: If an argument is outside its range.

    References:
        Derived here.

    Example:
        >>> two_mask_variance(0.25, 32)
        4.0
    """
    require(not_negative(difference_square=difference_square), at_least_one(batch_size=batch_size))
    return batch_size * difference_square / 2.0


def mask_law(mask_variance: float, keep: float) -> float:
    """Constant v of the law sigma²_mask ~ v (1 - zeta) / zeta of inverted masks.

    The law is of first order in (1-zeta)/zeta, at fixed weights. Measured, v was constant within
    1.1 % for hidden masks of zeta 0.95 to 0.3, and within 10 % for masks on the inputs.

    Args:
        mask_variance: sigma²_mask, per sample [(L/P)²].
        keep: zeta, probability of keeping a unit, in (0, 1).

    Returns:
        v [(L/P)²].

    Raises:
        ConfigError: If an argument is outside its range.

    References:
        Derived here.

    Example:
        >>> mask_law(2.0, 0.5)
        2.0
    """
    require(not_negative(mask_variance=mask_variance), inside_unit(keep=keep))
    return mask_variance * keep / (1.0 - keep)


def variance_at(keep: float, data_variance: float, law: float) -> float:
    """Variance per sample at another keep rate, same weights: sigma²_data + v (1 - zeta) / zeta.

    Args:
        keep: zeta, in (0, 1].
        data_variance: sigma²_data, per sample, without the masks' share [(L/P)²].
        law: v of `mask_law` [(L/P)²].

    Returns:
        sigma² [(L/P)²].

    Raises:
        ConfigError: If an argument is outside its range.

    References:
        Derived here; first order in (1 - zeta) / zeta.

    Example:
        >>> variance_at(0.5, 1.532, 4.59)
        6.122
    """
    require(keep_rate(keep=keep), not_negative(data_variance=data_variance, law=law))
    return data_variance + law * (1.0 - keep) / keep


def keep_rate_for_target(
    law: float,
    data_variance: float,
    smoothness: float,
    batch_size: float,
    learning_rate: float,
    target: float,
) -> float | None:
    """Smallest keep rate whose noise floor is within the target: v / (v + M).

    M = B eps (2 - L g) / (L g) - sigma²_data is what the target leaves for the masks.

    Args:
        law: v of `mask_law` [(L/P)²].
        data_variance: sigma²_data, per sample [(L/P)²].
        smoothness: L [L/P²].
        batch_size: B, at least 1.
        learning_rate: g, above 0 [P²/L].
        target: eps, above 0 [(L/P)²].

    Returns:
        The keep rate, in [0, 1); None if the data alone are too noisy.

    Raises:
        ConfigError: If an argument is outside its range.

    References:
        Derived here; first order in (1 - zeta) / zeta.

    Example:
        >>> round(keep_rate_for_target(8.75, 9.5, 1, 32, 0.3, 0.12), 6)
        0.416468
    """
    require(
        not_negative(law=law, data_variance=data_variance),
        positive(smoothness=smoothness, learning_rate=learning_rate, target=target),
        at_least_one(batch_size=batch_size),
    )
    product = smoothness * learning_rate
    left = batch_size * target * (2.0 - product) / product - data_variance
    return law / (law + left) if left > 0.0 else None


def update_coverage(keep_in: float, keep_out: float, masks: float = 1) -> float:
    """Probability that a weight has a gradient in a step: 1 - (1 - zeta_in zeta_out)^B.

    Args:
        keep_in: Keep rate of the input of the layer, in (0, 1].
        keep_out: Keep rate of its output, in (0, 1].
        masks: B, independent masks in the step: the batch size, or 1 if the mask is shared.

    Returns:
        The probability.

    Raises:
        ConfigError: If an argument is outside its range.

    References:
        Derived here.

    Example:
        >>> round(update_coverage(0.8, 0.5, 4), 4)
        0.8704
    """
    require(keep_rate(keep_in=keep_in, keep_out=keep_out), at_least_one(masks=masks))
    return float(1.0 - (1.0 - keep_in * keep_out) ** masks)


def linear_dropout_penalty(
    weights: ArrayLike, inputs: ArrayLike, keep: float, inverted: bool = True
) -> float:
    """Ridge penalty that masks on the inputs of a linear layer with squared loss amount to.

    The loss averaged over masks is ||y - W x||² + ((1-zeta)/zeta) sum_j x_j² ||W_:j||² with
    inverted masks, ||y - zeta W x||² + zeta (1-zeta) sum_j x_j² ||W_:j||² with plain ones.

    Args:
        weights: (outputs, inputs), W.
        inputs: (inputs,), x of one sample.
        keep: zeta, in (0, 1].
        inverted: PyTorch's masks; False for masks that are not divided by zeta.

    Returns:
        The penalty, in the unit of the loss.

    Raises:
        ConfigError: If keep is outside (0, 1], an entry is not finite, or the shapes do not fit.

    References:
        Derived here, exact.

    Example:
        >>> round(linear_dropout_penalty([[1, -2], [0.5, 3]], [1, 2], 0.8), 4)
        13.3125
    """
    require(keep_rate(keep=keep))
    w, x = values_of("weights", weights, dimensions=2), values_of("inputs", inputs)
    if w.shape[1] != len(x):
        raise ConfigError(f"weights must have {len(x)} columns, one an input, got {w.shape[1]}")
    factor = (1.0 - keep) / keep if inverted else keep * (1.0 - keep)
    return factor * float(np.sum(x**2 * np.sum(w**2, axis=0)))


def masked_second_moment(second_moment: ArrayLike, keep: float, inverted: bool = True) -> Vector:
    """Second moment of masked inputs: M + ((1-zeta)/zeta) diag M, or zeta² M + zeta(1-zeta) diag M.

    Args:
        second_moment: (d, d), M = E x x^T of the inputs.
        keep: zeta, in (0, 1].
        inverted: PyTorch's masks; False for the second form.

    Returns:
        (d, d), the second moment of the masked inputs.

    Raises:
        ConfigError: If keep is outside (0, 1] or second_moment is not a square finite matrix.

    References:
        Derived here, exact.

    Example:
        >>> masked_second_moment([[1.0, 0.5], [0.5, 2.0]], 0.5).tolist()
        [[2.0, 0.5], [0.5, 4.0]]
    """
    require(keep_rate(keep=keep))
    moment = values_of("second_moment", second_moment, dimensions=2)
    if moment.shape[0] != moment.shape[1]:
        raise ConfigError(f"second_moment must be square, got shape {moment.shape}")
    diagonal = np.diag(np.diag(moment))
    plain = keep**2 * moment + keep * (1.0 - keep) * diagonal
    return np.asarray(moment + (1.0 - keep) / keep * diagonal if inverted else plain)

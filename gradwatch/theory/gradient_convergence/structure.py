"""Constants from widths, weights and input statistics: explicit, but loose.

For sigmoid units, targets in [0, 1] and the loss c ||v - y||². Measured constants were 0.0004 to
0.17 of these bounds in depth: they show an order and a trend, never a limit.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

from gradwatch.theory.argument import keep_rate, not_negative, positive, require, whole

# sup over s, y in [0, 1] of |d/dz ((s - y) s (1 - s))|, s = sigmoid(z): 2s² - 5s³ + 3s⁴ at its top.
_TOP = (15.0 - math.sqrt(33.0)) / 24.0
SIGMOID_CURVATURE = _TOP**2 * (2.0 - 5.0 * _TOP + 3.0 * _TOP**2)


def input_curvature_bound(covariance_eigenvalue: float, inputs: int, mean_square: float) -> float:
    """Bound on the top eigenvalue of E x x^T: lambda_max(Cov) + d_0 tau.

    Inputs that are not centred pay d_0 tau in the curvature of the first layer.

    Args:
        covariance_eigenvalue: Top eigenvalue of the covariance of the inputs [A²].
        inputs: d_0, number of inputs.
        mean_square: tau, mean over the inputs of (E x_j)² [A²].

    Returns:
        The bound [A²].

    Raises:
        ConfigError: If an argument is outside its range.

    References:
        Derived here.

    Example:
        >>> input_curvature_bound(0.5, 64, 0.25)
        16.5
    """
    require(
        not_negative(covariance_eigenvalue=covariance_eigenvalue, mean_square=mean_square),
        whole(inputs=inputs),
    )
    return covariance_eigenvalue + inputs * mean_square


def one_layer_variance(
    inputs: int,
    outputs: int,
    input_square: float,
    loss_scale: float = 0.5,
    keep: float = 1.0,
    inverted: bool = True,
) -> float:
    """Bound on the variance per sample of one sigmoid layer: (8c/27)² d_L d_0 m_2.

    Inverted masks on the inputs divide it by the keep rate, plain ones multiply it.

    Args:
        inputs: d_0.
        outputs: d_L.
        input_square: m_2, mean over the inputs of E x_j².
        loss_scale: c of the loss c ||v - y||²; 1/d_L for PyTorch's mean squared error.
        keep: Keep rate of masks on the inputs, in (0, 1].
        inverted: PyTorch's masks.

    Returns:
        The bound on sigma² [(L/P)²].

    Raises:
        ConfigError: If an argument is outside its range.

    References:
        Derived here.

    Example:
        >>> round(one_layer_variance(64, 10, 0.25), 6)
        3.51166
    """
    require(
        whole(inputs=inputs, outputs=outputs),
        not_negative(input_square=input_square),
        positive(loss_scale=loss_scale),
        keep_rate(keep=keep),
    )
    masked = 1.0 / keep if inverted else keep
    return (8.0 * loss_scale / 27.0) ** 2 * outputs * inputs * input_square * masked


def one_layer_smoothness(input_eigenvalue: float, loss_scale: float = 0.5) -> float:
    """Bound on the curvature of one sigmoid layer: 2 c 0.0770293 lambda_max(E x x^T).

    Args:
        input_eigenvalue: Top eigenvalue of E x x^T of the inputs.
        loss_scale: c of the loss c ||v - y||².

    Returns:
        The bound on L [L/P²].

    Raises:
        ConfigError: If an argument is outside its range.

    References:
        Derived here.

    Example:
        >>> round(one_layer_smoothness(10.455), 6)
        0.805341
    """
    require(not_negative(input_eigenvalue=input_eigenvalue), positive(loss_scale=loss_scale))
    return 2.0 * loss_scale * SIGMOID_CURVATURE * input_eigenvalue


def box_squares(widths: Sequence[int], largest_weight: float) -> list[float]:
    """Bound on the squared norms of weight matrices in a box |W| <= w: w² d_l d_(l+1).

    Args:
        widths: d_0 to d_L, at least two.
        largest_weight: w, at least 0.

    Returns:
        One number a layer.

    Raises:
        ConfigError: If an argument is outside its range.

    References:
        Derived here.

    Example:
        >>> box_squares([4, 3, 2], 0.5)
        [3.0, 1.5]
    """
    require(_widths(widths), not_negative(largest_weight=largest_weight))
    return [largest_weight**2 * n * m for n, m in pairwise(widths)]


def layer_gradient_squares(
    widths: Sequence[int],
    weight_squares: Sequence[float],
    spectral_squares: Sequence[float] | None = None,
    *,
    input_square: float = 1.0,
    loss_scale: float = 0.5,
    keep: Sequence[float] | None = None,
    inverted: bool = True,
) -> list[float]:
    """Bounds on E ||grad_W_l||² of every layer of a sigmoid network.

    (8c/27)² d_L q_l prod_(j>l) f_j/16, layers from 0. Inverted masks: q_l = d_l/zeta_l,
    f_j = min(||W_j||_F²/zeta_j, ||W_j||_2²/zeta_j²). Plain: q_l = zeta_l d_l,
    f_j = min(zeta_j ||W_j||_F², ||W_j||_2²). q_0 has the factor m_2.

    Args:
        widths: d_0 to d_L, at least two.
        weight_squares: ||W_l||_F², one a layer.
        spectral_squares: ||W_l||_2², one a layer; None for the same numbers, which are larger.
        input_square: m_2, mean over the inputs of E x_j².
        loss_scale: c of the loss c ||v - y||².
        keep: zeta_l, keep rate of the input of each layer; None for no masks.
        inverted: PyTorch's masks.

    Returns:
        One bound a layer [(L/P)²].

    Raises:
        ConfigError: If an argument is outside its range or the lengths do not fit.

    References:
        Derived here.

    Example:
        >>> [round(v, 3) for v in layer_gradient_squares([8, 4, 2], [3.0, 1.5])]
        [0.033, 0.176]
    """
    layers = len(widths) - 1
    spectral = weight_squares if spectral_squares is None else spectral_squares
    rates = [1.0] * layers if keep is None else keep
    require(
        _widths(widths),
        _per_layer(layers, weight_squares=weight_squares, spectral_squares=spectral, keep=rates),
        not_negative(input_square=input_square),
        positive(loss_scale=loss_scale),
        not_negative(**_entries("weight_squares", weight_squares)),
        not_negative(**_entries("spectral_squares", spectral)),
        keep_rate(**_entries("keep", rates)),
    )
    per_layer = zip(rates, weight_squares, spectral, strict=True)
    factors = [_layer_factor(*items, inverted) / 16.0 for items in per_layer]
    scale = (8.0 * loss_scale / 27.0) ** 2 * widths[-1]
    inputs = [widths[0] * input_square, *widths[1:-1]]
    return [
        scale * inputs[layer] * (1.0 / zeta if inverted else zeta) * math.prod(factors[layer + 1 :])
        for layer, zeta in enumerate(rates)
    ]


def _layer_factor(
    keep: float, weight_square: float, spectral_square: float, inverted: bool
) -> float:
    if inverted:
        return min(weight_square / keep, spectral_square / keep**2)
    return min(keep * weight_square, spectral_square)


def _widths(widths: Sequence[int]) -> str:
    few = f"widths must name inputs and outputs, got {len(widths)}" if len(widths) < 2 else ""
    return few or whole(1, **_entries("widths", widths))


def _per_layer(layers: int, **values: Sequence[float]) -> str:
    return next(
        (
            f"{name} must hold one number a layer, got {len(items)} for {layers} layers"
            for name, items in values.items()
            if len(items) != layers
        ),
        "",
    )


def _entries(name: str, values: Sequence[float]) -> dict[str, float]:
    return {f"{name}[{i}]": value for i, value in enumerate(values)}

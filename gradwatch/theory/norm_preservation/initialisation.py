"""Initialisations: what a layer does to the mean square and to the norm, by its weight variance."""

from gradwatch.theory.argument import not_negative, whole


def mean_square_factor(weight_variance: float, fan_in: int, second_moment: float) -> float:
    """Expected factor of the mean square over one layer, E q_l / q_(l-1) = n sigma^2 m2.

    Args:
        weight_variance: sigma^2 of one weight.
        fan_in: n, inputs of one unit.
        second_moment: m2; for a curved phi at pre-activation variance v = n sigma^2 q_(l-1), use
            `activation_second_moment(name, v) / v`.

    Returns:
        The factor; 1 for fan-in He, 1/6 for PyTorch's default and ReLU.

    Raises:
        ValueError: If a variance or moment is negative or not finite, or fan_in is not a count.

    References:
        He et al. 2015, arXiv:1502.01852, the forward argument.

    Example:
        >>> mean_square_factor(2 / 512, 512, 0.5)
        1.0
    """
    variances = not_negative(weight_variance=weight_variance, second_moment=second_moment)
    if fault := variances or whole(fan_in=fan_in):
        raise ValueError(fault)
    return fan_in * weight_variance * second_moment


def squared_norm_factor(weight_variance: float, width: int, second_moment: float) -> float:
    """Expected factor of the squared norm over one layer, E rho = m sigma^2 m2.

    Args:
        weight_variance: sigma^2 of one weight.
        width: m, units of the layer.
        second_moment: m2, as in `mean_square_factor`.

    Returns:
        The factor; 1 for fan-out He, m/n for fan-in He.

    Raises:
        ValueError: If a variance or moment is negative or not finite, or width is not a count.

    References:
        Derived here.
    """
    variances = not_negative(weight_variance=weight_variance, second_moment=second_moment)
    if fault := variances or whole(width=width):
        raise ValueError(fault)
    return width * weight_variance * second_moment


def he_variance_fan_in(fan_in: int) -> float:
    """Weight variance 2/n that preserves the mean square q through ReLU.

    Args:
        fan_in: n, inputs of one unit.

    Returns:
        Variance of one weight, the default of PyTorch's `kaiming_normal_`.

    Raises:
        ValueError: If fan_in is not a count.

    References:
        He et al. 2015, arXiv:1502.01852.
    """
    if fault := whole(fan_in=fan_in):
        raise ValueError(fault)
    return 2.0 / fan_in


def he_variance_fan_out(fan_out: int) -> float:
    """Weight variance 2/m that preserves the squared norm ||h||^2 through ReLU.

    Args:
        fan_out: m, units of the layer.

    Returns:
        Variance of one weight.

    Raises:
        ValueError: If fan_out is not a count.

    References:
        Arpit & Bengio 2019, arXiv:1901.03611, the authors' experiment scripts.
    """
    if fault := whole(fan_out=fan_out):
        raise ValueError(fault)
    return 2.0 / fan_out


def default_variance(fan_in: int) -> float:
    """Weight variance 1/(3n) of a freshly built PyTorch Linear or Conv.

    With ReLU the mean square q shrinks by 1/6 per layer, down to `bias_noise_floor`.

    Args:
        fan_in: n, inputs of one unit.

    Returns:
        Variance of one weight under `kaiming_uniform_(a=sqrt(5))`.

    Raises:
        ValueError: If fan_in is not a count.

    References:
        PyTorch, `torch.nn.Linear.reset_parameters`; derived here.
    """
    if fault := whole(fan_in=fan_in):
        raise ValueError(fault)
    return 1.0 / (3.0 * fan_in)


def bias_noise_floor(fan_in: int) -> float:
    """Mean square q* = 1/(5n) at which PyTorch's default ReLU layers settle.

    Biases of variance 1/(3n) feed what the weights lose: q = (q + 1/n) / 6.

    Args:
        fan_in: n, inputs of one unit.

    Returns:
        The fixed point of the mean square.

    Raises:
        ValueError: If fan_in is not a count.

    References:
        Derived here.

    Example:
        >>> bias_noise_floor(100)
        0.002
    """
    if fault := whole(fan_in=fan_in):
        raise ValueError(fault)
    return 1.0 / (5.0 * fan_in)

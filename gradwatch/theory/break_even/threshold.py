"""The largest curvature at which an optimizer converges on a parabola, with constant settings.

Steps along an eigenvector of curvature lambda converge if and only if lambda is below the
threshold and above 0 (above -wd with weight decay). In networks the sharpness typically climbs to
the threshold and hovers there within a few per cent, without divergence; it may also never get
there. The threshold is a ceiling and no forecast.

The statements hold for PyTorch's forms of the optimizers. Those of Adam and RMSprop are about
lambda_max(P^-1 H), which is that of P^-1/2 H P^-1/2, for a preconditioner P that does not change.
"""

from gradwatch.theory.argument import fault_in, momentum_rate, not_negative, positive, require


def momentum_threshold(
    learning_rate: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
) -> float:
    """Threshold of SGD with heavy ball: 2 (1 + beta)/(eta (1 - d)) - wd.

    For v = beta v + (1 - d)(g + wd w), w = w - eta v. Without momentum it is 2/eta - wd.

    Args:
        learning_rate: eta, above 0 [P²/L].
        momentum: beta, in [0, 1).
        dampening: d, below 1; PyTorch leaves it out without momentum.
        weight_decay: wd, added to the gradient [L/P²].

    Returns:
        The threshold [L/P²]; not above 0 if the weight decay alone is unstable.

    Raises:
        ConfigError: If an argument is outside its range.

    References:
        Derived here; 2/eta as in Cohen et al. 2021, arXiv:2103.00065.

    Example:
        >>> momentum_threshold(0.5), momentum_threshold(0.5, 0.5, 0.5)
        (4.0, 12.0)
    """
    require(
        positive(learning_rate=learning_rate),
        not_negative(weight_decay=weight_decay),
        momentum_rate(momentum=momentum),
        fault_in({"dampening": dampening}, lambda v: abs(v) < 1, "lie in (-1, 1)"),
    )
    return 2.0 * (1.0 + momentum) / (learning_rate * (1.0 - dampening)) - weight_decay


def nesterov_threshold(
    learning_rate: float, momentum: float = 0.0, weight_decay: float = 0.0
) -> float:
    """Threshold of SGD with Nesterov's momentum: 2 (1 + beta)/(eta (1 + 2 beta)) - wd.

    For v = beta v + g', w = w - eta (g' + beta v) with g' = g + wd w; PyTorch allows no dampening.

    Args:
        learning_rate: eta, above 0 [P²/L].
        momentum: beta, in [0, 1).
        weight_decay: wd, added to the gradient [L/P²].

    Returns:
        The threshold [L/P²]; not above 0 if the weight decay alone is unstable.

    Raises:
        ConfigError: If an argument is outside its range.

    References:
        Derived here.

    Example:
        >>> nesterov_threshold(0.5, 0.5)
        3.0
    """
    require(
        positive(learning_rate=learning_rate),
        not_negative(weight_decay=weight_decay),
        momentum_rate(momentum=momentum),
    )
    return 2.0 * (1.0 + momentum) / (learning_rate * (1.0 + 2.0 * momentum)) - weight_decay


def adam_threshold(learning_rate: float, beta1: float = 0.9) -> float:
    """Threshold of Adam and AMSGrad: 2 (1 + beta1)/((1 - beta1) eta), 38/eta at 0.9.

    With weight decay, which Adam adds to the gradient, it is the threshold on the largest
    eigenvalue of P^-1 (H + wd I), not on that of P^-1 H.

    Args:
        learning_rate: eta, above 0 [P].
        beta1: decay rate of the mean gradient, in [0, 1).

    Returns:
        The threshold on lambda_max(P^-1 H) [1/P], P = (1 - beta1^t)(sqrt(v_hat) + eps), with the
        running maximum of v for AMSGrad.

    Raises:
        ConfigError: If an argument is outside its range.

    References:
        Derived here; value as in Cohen et al. 2022, arXiv:2207.14484.

    Example:
        >>> adam_threshold(0.5, 0.5)
        12.0
    """
    return adamw_threshold(learning_rate, beta1, 0.0)


def adamw_threshold(learning_rate: float, beta1: float = 0.9, weight_decay: float = 0.0) -> float:
    """Threshold of AdamW: (2 - eta wd)(1 + beta1)/((1 - beta1) eta).

    Args:
        learning_rate: eta, above 0 [P].
        beta1: decay rate of the mean gradient, in [0, 1).
        weight_decay: wd, by which each step shrinks the parameters, w = (1 - eta wd) w [1/P].

    Returns:
        The threshold on lambda_max(P^-1 H) [1/P]; not above 0 if the weight decay alone is
        unstable.

    Raises:
        ConfigError: If an argument is outside its range.

    References:
        Derived here.

    Example:
        >>> adamw_threshold(0.5, 0.5, 1.0)
        9.0
    """
    require(
        positive(learning_rate=learning_rate),
        momentum_rate(beta1=beta1),
        not_negative(weight_decay=weight_decay),
    )
    gain = (1.0 + beta1) / (1.0 - beta1)
    return (2.0 - learning_rate * weight_decay) * gain / learning_rate


def rmsprop_threshold(learning_rate: float, momentum: float = 0.0) -> float:
    """Threshold of RMSprop, centred or not: 2 (1 + mu)/eta.

    Its momentum is heavy ball on preconditioned gradients, v = mu v + P^-1 g, w = w - eta v. With
    weight decay, which it adds to the gradient, it is the threshold on P^-1 (H + wd I).

    Args:
        learning_rate: eta, above 0 [P].
        momentum: mu, in [0, 1).

    Returns:
        The threshold on lambda_max(P^-1 H) [1/P], P = sqrt(v) + eps without bias correction; v less
        the square of the mean gradient if centred.

    Raises:
        ConfigError: If an argument is outside its range.

    References:
        Derived here.

    Example:
        >>> rmsprop_threshold(0.5, 0.5)
        6.0
    """
    return momentum_threshold(learning_rate, momentum)


def minibatch_threshold(learning_rate: float) -> float:
    """Level to which the batch sharpness E[g_B^T H_B g_B/|g_B|²] rises under plain SGD: 2/eta.

    An observation, no theorem; on handwritten digits it was 1.8/eta to 2.1/eta for batches of 8 to
    128 examples.

    Args:
        learning_rate: eta, above 0 [P²/L].

    Returns:
        The level [L/P²].

    Raises:
        ConfigError: If an argument is outside its range.

    References:
        Andreyev and Beneventano 2024, arXiv:2412.20553.

    Example:
        >>> minibatch_threshold(0.1)
        20.0
    """
    return momentum_threshold(learning_rate)


def return_length(learning_rate: float, curvature: float) -> float:
    """How many times a step along the gradient takes the loss back to its start: 2/(eta rho).

    For a loss that is a parabola along the step. The gradient can miss the sharpest direction by
    far early in a training, where this says little of the threshold.

    Args:
        learning_rate: eta of plain SGD, above 0 [P²/L].
        curvature: rho = g^T H g/|g|², above 0 [L/P²].

    Returns:
        The multiple alpha, 1 at the edge of stability.

    Raises:
        ConfigError: If an argument is outside its range.

    References:
        The probe: Jastrzebski et al. 2020, arXiv:2002.09572; the formula derived here.

    Example:
        >>> return_length(0.5, 2.0)
        2.0
    """
    require(positive(learning_rate=learning_rate, curvature=curvature))
    return 2.0 / (learning_rate * curvature)

"""The covariance K of the gradients of single examples, from the gradients of mini-batches.

Lb mini-batches of M examples have gradients g_a of mean gbar, and the Gram matrix
Gram_ab = (g_a - gbar).(g_b - gbar)/(Lb - 1). Multiplied with the factor below its trace is that of
K per example; its largest eigenvalue is that of K and a bias. Numbers in units of K/M, as in
papers, are no numbers to compare across M.
"""

import math
from typing import Final

import numpy as np
from numpy.typing import ArrayLike

from gradwatch.errors import ConfigError
from gradwatch.theory.argument import (
    at_least_one,
    fault_in,
    finite,
    not_negative,
    require,
    values_of,
    whole,
)
from gradwatch.theory.break_even.noise import noise_factor

RESOLVED_SHARE: Final = 0.6
"""Of the largest ratio that can be read; a reading beyond it is not told from the largest one."""


def minibatch_variance(
    covariance_trace: float, batch_size: float, train_size: float = math.inf
) -> float:
    """Mean square distance of a batch's gradient to the true one: tr(K) (N - S)/(S (N - 1)).

    Args:
        covariance_trace: tr K, per example [(L/P)²].
        batch_size: S, from 1 to N.
        train_size: N; inf for tr(K)/S.

    Returns:
        E|g_B - g|² [(L/P)²].

    Raises:
        ConfigError: If an argument is outside its range.

    References:
        Derived here.

    Example:
        >>> minibatch_variance(4.0, 8)
        0.5
    """
    require(not_negative(covariance_trace=covariance_trace))
    return covariance_trace * noise_factor(batch_size, train_size)


def gram_factor(microbatch_size: float, train_size: float = math.inf) -> float:
    """Factor from the Gram matrix of mini-batch gradients to single examples: M (N - 1)/(N - M).

    tr K = factor * tr Gram without bias; lambda_K = factor * lambda_1(Gram) biased up.

    Args:
        microbatch_size: M, drawn without replacement, from 1, below N.
        train_size: N; inf for M.

    Returns:
        The factor, a pure number.

    Raises:
        ConfigError: If an argument is outside its range.

    References:
        Mini-batch gradients for K: Jastrzebski et al. 2020, arXiv:2002.09572; the factor derived
        here.

    Example:
        >>> gram_factor(32), gram_factor(2, 5)
        (32.0, 2.6666666666666665)
    """
    need = f"be above {microbatch_size}"
    require(
        at_least_one(microbatch_size=microbatch_size),
        fault_in({"train_size": train_size}, lambda v: v > microbatch_size, need),
    )
    return 1.0 / noise_factor(microbatch_size, train_size)


def corrected_top_eigenvalue(top: float, trace: float, count: int) -> float:
    """The largest eigenvalue of a sample covariance less its bias: top - (trace - top)/(Lb - 1).

    To first order and for a top eigenvalue far above the others.

    Args:
        top: largest eigenvalue of Gram.
        trace: of Gram, at least `top`, in the same unit.
        count: Lb, gradients, at least 2.

    Returns:
        The corrected eigenvalue in the same unit; may be 0 or negative, which is not resolved.

    Raises:
        ConfigError: If an argument is outside its range.

    References:
        Derived here.

    Example:
        >>> corrected_top_eigenvalue(0.5, 2.0, 25)
        0.4375
    """
    require(finite(top=top, trace=trace), whole(2, count=count))
    return top - (trace - top) / (count - 1)


def top_eigenvalue_bias(eigenvalues: ArrayLike, count: int) -> float:
    """Excess of the largest eigenvalue of Gram: l_1 sum_{j>1} l_j/((Lb - 1)(l_1 - l_j)).

    Args:
        eigenvalues: (d,), of the true covariance, at least 0, the largest one simple.
        count: Lb, gradients, at least 2.

    Returns:
        The excess to first order in 1/Lb, in the unit of the eigenvalues.

    Raises:
        ConfigError: If an argument is outside its range.

    References:
        Derived here.

    Example:
        >>> top_eigenvalue_bias([4.0, 2.0], 5)
        1.0
    """
    require(whole(2, count=count))
    values = np.sort(values_of("eigenvalues", eigenvalues))[::-1]
    top, others = values[0], values[1:]
    if values[-1] < 0.0 or (others.size and others[0] == top):
        raise ConfigError(
            f"eigenvalues must be at least 0 and the largest one simple, got {values.tolist()}"
        )
    return float(top * np.sum(others / (top - others)) / (count - 1))


def resolution_limit(count: int) -> float:
    """Largest reading of tr K/lambda_K that is resolved: 0.6 (Lb - 1).

    The trace of Lb centred gradients over their largest eigenvalue never exceeds Lb - 1, whatever
    K is. The share of 0.6 is a heuristic.

    Args:
        count: Lb, gradients, at least 2.

    Returns:
        The limit, a pure number.

    Raises:
        ConfigError: If an argument is outside its range.

    References:
        Derived here.

    Example:
        >>> round(resolution_limit(26), 9)
        15.0
    """
    require(whole(2, count=count))
    return RESOLVED_SHARE * (count - 1)

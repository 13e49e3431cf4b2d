"""Norm preservation against simulation: sampled laws and freshly initialised networks.

Each test is one experiment; the numbers it compares are those of its table row. Seeds fix the
draws, tolerances are statistical, so another generator gives another number that still holds.
"""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gradwatch.theory import norm_preservation as theory

PAGE = "Norm preservation at initialisation"

Verify = Callable[..., None]


def squared_factors(
    generator: np.random.Generator, shape: tuple[int, ...], width: int
) -> np.ndarray:
    """Draw rho = (2/m) chi2_K, K ~ Binomial(m, 1/2)."""
    active = generator.binomial(width, 0.5, size=shape)
    return np.asarray((2 / width) * 2 * generator.standard_gamma(active / 2))


def normal_weights(generator: torch.Generator, *shape: int, variance: float) -> Tensor:
    weights = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return weights.mul_(math.sqrt(variance))


def he_networks(
    generator: torch.Generator, networks: int, widths: list[int], fan_in: bool = False
) -> Iterator[list[Tensor]]:
    """Draw the weights of bias-free networks one after another, widths from the input on."""
    for _ in range(networks):
        yield [
            normal_weights(
                generator,
                m,
                n,
                variance=theory.he_variance_fan_in(n) if fan_in else theory.he_variance_fan_out(m),
            )
            for n, m in pairwise(widths)
        ]


def log_squared_ratio(weights: list[Tensor], x: Tensor) -> float:
    h = x
    for weight in weights:
        h = torch.relu(weight @ h)
    return float(2 * torch.log(h.norm() / x.norm()))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_n1_one_layer_moments(verify: Verify) -> None:
    rho = squared_factors(np.random.default_rng(0), (400_000,), 100)
    law = theory.layer_moments(100)
    verify("N1", "E rho", expected=law.mean, measured=rho.mean(), tolerance=("relative", 0.005))
    verify(
        "N1",
        "m Var rho",
        expected=100 * law.variance,
        measured=100 * rho.var(),
        tolerance=("relative", 0.02),
    )
    # The law itself, from the layer it describes.
    x = normal_weights(seeded(0), 30, variance=1.0)
    weights = normal_weights(seeded(1), 8000, 100, 30, variance=theory.he_variance_fan_out(100))
    layer = torch.relu(weights @ x).square().sum(dim=1) / x.square().sum()
    verify(
        "N1",
        "m Var ||ReLU(Wx)||^2/||x||^2",
        expected=100 * law.variance,
        measured=100 * float(layer.var()),
        tolerance=("relative", 0.06),
    )


def test_n2_one_layer_tails(verify: Verify) -> None:
    rho = squared_factors(np.random.default_rng(0), (400_000,), 100)
    for sign, what in ((1, "P(rho > 1.5)"), (-1, "P(rho < 0.5)")):
        verify(
            "N2",
            f"{what}, m = 100",
            expected=theory.tail_bound(100, sign * 0.5),
            measured=np.mean(sign * (rho - 1) > 0.5),
            tolerance="at_most",
        )


def test_n3_product_of_ten_layers(verify: Verify) -> None:
    products = np.cumprod(squared_factors(np.random.default_rng(1), (200_000, 10), 256), axis=1)
    layers, kappas = [256] * 10, [5.0] * 10
    verify(
        "N3",
        "Var R_10, m = 256",
        expected=theory.ratio_variance(layers, kappas),
        measured=products[:, -1].var(),
        tolerance=("relative", 0.03),
    )
    verify(
        "N3",
        "std log R_10",
        expected=math.sqrt(theory.norm_variance(layers, kappas)),
        measured=np.log(products[:, -1]).std(),
        tolerance=("relative", 0.03),
    )
    verify(
        "N3",
        "P(max R_l >= 1.5)",
        expected=theory.upper_tail_bound(layers, 1.5),
        measured=np.mean(products.max(axis=1) >= 1.5),
        tolerance="at_most",
    )
    verify(
        "N3",
        "P(min R_l <= 0.5)",
        expected=theory.lower_tail_bound(layers, 0.5),
        measured=np.mean(products.min(axis=1) <= 0.5),
        tolerance="at_most",
    )


@pytest.mark.parametrize(
    ("width", "networks"), [(100, 300), pytest.param(400, 100, marks=pytest.mark.slow)]
)
def test_n4_whole_networks(verify: Verify, width: int, networks: int) -> None:
    generator = seeded(0)
    logs = []
    for weights in he_networks(generator, networks, [500] + [width] * 10):
        x = normal_weights(generator, 500, variance=1.0)
        logs.append(log_squared_ratio(weights, x))
    variance = theory.norm_variance([width] * 10, [5.0] * 10)
    verify(
        "N4",
        f"std log R_10 of {networks} networks, m = {width}",
        expected=math.sqrt(variance),
        measured=np.std(logs, ddof=1),
        tolerance=("relative", 0.10),
    )


def backward(weights: list[Tensor], readout: Tensor, x: Tensor, target: Tensor) -> list[Tensor]:
    """Run a network with softmax cross-entropy; give h_L and the errors delta_1..delta_L."""
    h = x
    pre_activations = []
    for weight in weights:
        a = (weight @ h).requires_grad_()
        pre_activations.append(a)
        h = torch.relu(a)
    loss = -(target * torch.log_softmax(readout @ h, dim=0)).sum()
    return [h.detach(), *torch.autograd.grad(loss, pre_activations)]


@pytest.mark.slow
def test_n5_gradients(verify: Verify) -> None:
    generator, width, depth = seeded(1), 100, 10
    ratios, alignments = [], []
    for weights in he_networks(generator, 800, [500] + [width] * depth):
        readout = normal_weights(generator, 20, width, variance=1.0)
        x = normal_weights(generator, 500, variance=1.0)
        target = torch.rand(20, generator=generator, dtype=torch.float64)
        h, *errors = backward(weights, readout, x, target / target.sum())
        squared = torch.stack([error.square().sum() for error in errors])
        ratios.append(squared / squared[-1])
        alignments.append(float(torch.dot(h, errors[-1]) ** 2 / (h @ h * squared[-1])))
    for layer in (5, 1):
        verify(
            "N5",
            f"E ||delta_{layer}||^2/||delta_10||^2, m = {width}",
            expected=theory.gradient_factor(depth, layer, float(np.mean(alignments)), width),
            measured=torch.stack(ratios)[:, layer - 1].mean(),
            tolerance=("relative", 0.06),
        )


def test_n6_default_initialisation(verify: Verify) -> None:
    generator = seeded(0)
    factors = torch.zeros(6, dtype=torch.float64)
    for network in range(20):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(network)
            layers = [nn.Linear(512, 512, bias=False, dtype=torch.float64) for _ in range(6)]
        h = normal_weights(generator, 16, 512, variance=1.0)
        for index, layer in enumerate(layers):
            out = torch.relu(layer(h)).detach()
            factors[index] += (out.square().mean() / h.square().mean()) / 20
            h = out
    law = theory.mean_square_factor(theory.default_variance(512), 512, 0.5)
    for index in range(6):
        verify(
            "N6",
            f"factor of q, layer {index + 1} of nn.Linear(512) and ReLU",
            expected=law,
            measured=factors[index],
            tolerance=("relative", 0.06),
        )


@pytest.mark.slow
def test_n7_digits(verify: Verify) -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    x = torch.as_tensor(datasets.load_digits().data)
    means = []
    for seed in range(40):
        (weights,) = he_networks(seeded(seed), 1, [64] + [256] * 10, fan_in=True)
        h = x
        for weight in weights:
            h = torch.relu(h @ weight.T)
        q_ratio = h.square().mean(dim=1) / x.square().mean(dim=1)
        means.append(float(q_ratio.log().mean()))
    law = theory.log_ratio_moments(theory.norm_variance([256] * 10, [5.0] * 10))
    verify(
        "N7",
        "batch mean of log q_10/q_0, mean of 40 seeds",
        expected=law.mean,
        measured=np.mean(means),
        tolerance=("absolute", 0.2),
    )
    verify("N7", "the same is negative", expected=0, measured=np.mean(means), tolerance="at_most")
    verify(
        "N7",
        "the same, std over seeds (examples share the weights)",
        expected=math.sqrt(law.variance),
        measured=np.std(means, ddof=1),
        tolerance="at_most",
    )


@pytest.mark.slow
def test_n8_unequal_widths(verify: Verify) -> None:
    widths = [64, 512, 128, 1024, 256]
    generator = seeded(0)
    ratios = []
    for weights in he_networks(generator, 200, widths, fan_in=True):
        x = normal_weights(generator, 64, variance=1.0)
        ratios.append(math.exp(log_squared_ratio(weights, x)))
    variance = theory.ratio_variance(widths[1:], [5.0] * 4)
    # Fan-in weights keep q; the squared norm follows the widths.
    factor = math.prod(
        theory.squared_norm_factor(theory.he_variance_fan_in(n), m, 0.5)
        for n, m in pairwise(widths)
    )
    verify(
        "N8",
        "E ||h_4||^2/||x||^2, fan-in, widths 64, 512, 128, 1024, 256",
        expected=factor,
        measured=np.mean(ratios),
        tolerance=("relative", 0.06),
    )
    verify(
        "N8",
        "Var q_4/q_0",
        expected=variance,
        measured=np.var(np.array(ratios) / 4, ddof=1),
        tolerance=("relative", 0.25),
    )


def test_n9_dropout(verify: Verify) -> None:
    generator = seeded(0)
    a = normal_weights(generator, 4000, 1000, variance=theory.he_variance_fan_out(1000))
    kept = torch.rand(4000, 1000, generator=generator) >= 0.5
    rho = (torch.relu(a) * kept / 0.5).square().sum(dim=1)
    law = theory.layer_moments(1000, dropout=0.5)
    what = "after ReLU and dropout 0.5, m = 1000"
    verify(
        "N9",
        f"E rho {what}",
        expected=theory.dropout_factor(0.5),
        measured=rho.mean(),
        tolerance=("relative", 0.05),
    )
    verify(
        "N9",
        f"m Var rho {what}",
        expected=1000 * law.variance,
        measured=1000 * rho.var(),
        tolerance=("relative", 0.05),
    )


@pytest.mark.slow
def test_n10_residual_blocks(verify: Verify) -> None:
    generator, width, depth, alphas = seeded(0), 400, 10, (1.0, math.sqrt(0.1), 0.1)
    growth = torch.zeros(3, dtype=torch.float64)
    for _ in range(40):
        x = normal_weights(generator, width, variance=1.0)
        streams = x.repeat(3, 1)
        scale = torch.tensor(alphas, dtype=torch.float64)[:, None]
        for _ in range(depth):
            inner = normal_weights(
                generator, width, width, variance=theory.he_variance_fan_out(width)
            )
            outer = normal_weights(generator, width, width, variance=1 / width)
            streams = streams + scale * (torch.relu(streams @ inner.T) @ outer.T)
        growth += streams.square().sum(dim=1) / x.square().sum() / 40
    for index, alpha in enumerate(alphas):
        verify(
            "N10",
            f"E ||h_10||^2/||x||^2 of residual blocks, alpha = {alpha:.3g}",
            expected=theory.residual_factor(alpha, depth=depth),
            measured=growth[index],
            tolerance=("relative", 0.10),
        )


def padded_networks(generator: torch.Generator, size: int, depth: int, networks: int) -> float:
    """Give the mean of q_L/q_0 over fan-in He 3x3 convolutions with zero padding 1."""
    ratios = []
    for _ in range(networks):
        x = torch.randn(4, 128, size, size, generator=generator)
        h = x
        for _ in range(depth):
            variance = theory.he_variance_fan_in(128 * 9)
            kernel = torch.randn(128, 128, 3, 3, generator=generator) * math.sqrt(variance)
            h = torch.relu(nn.functional.conv2d(h, kernel, padding=1))
        ratios.append(float(h.square().mean() / x.square().mean()))
    return float(np.mean(ratios))


@pytest.mark.parametrize("size", [8, 16])
def test_n11_zero_padding(verify: Verify, size: int) -> None:
    verify(
        "N11",
        f"factor of q over one 3x3 convolution, H = {size}",
        expected=theory.padding_factor(size, 3, 1) ** 2,
        measured=padded_networks(seeded(0), size, depth=1, networks=10),
        tolerance=("relative", 0.03),
    )


@pytest.mark.slow
def test_n11_zero_padding_of_a_stack(verify: Verify) -> None:
    """Weak edges lose less: the factor of a stack is not the power of the factor of a layer."""
    profile = np.ones(8)
    for _ in range(10):
        profile = theory.padding_profile(profile, 3, 1)
    verify(
        "N11",
        "factor of q over ten 3x3 convolutions, H = 8",
        expected=profile.mean() ** 2,
        measured=padded_networks(seeded(0), 8, depth=10, networks=200),
        tolerance=("relative", 0.10),
    )


@pytest.mark.parametrize(
    ("width", "depth", "beyond_three", "beyond_four"),
    [(64, 6, 0.0027, 2e-4), (256, 12, 0.0027, 6.3e-5)],
)
def test_n12_null_of_the_z_score(
    verify: Verify, width: int, depth: int, beyond_three: float, beyond_four: float
) -> None:
    """Normal tails, except that P(|z| > 4) is heavier in a net as narrow as 64, about 2e-4."""
    factors = squared_factors(np.random.default_rng(1), (200_000, depth), width)
    variance = theory.norm_variance([width] * depth, [5.0] * depth)
    z = np.array([theory.z_score(log, variance) for log in np.log(factors).sum(axis=1)])
    for limit, expected in ((3, beyond_three), (4, beyond_four)):
        verify(
            "N12",
            f"P(|z| > {limit}), m = {width}, L = {depth}",
            expected=expected,
            measured=np.mean(np.abs(z) > limit),
            tolerance=("factor", 3),
        )


@pytest.mark.slow
def test_n13_all_inputs_of_a_plane(verify: Verify) -> None:
    generator = seeded(0)
    angles = torch.linspace(0, 2 * math.pi, 4001, dtype=torch.float64)
    circle = torch.stack([angles.cos(), angles.sin()])
    worst = 0.0
    for _ in range(50):
        weights = normal_weights(generator, 4096, 2, variance=theory.he_variance_fan_out(4096))
        squared = (weights @ circle).relu_().square_().sum(dim=0)
        worst = max(worst, float((squared - 1).abs().max()))
    verify(
        "N13",
        "sup | ||h||^2/||x||^2 - 1 | over a plane, worst of 50 layers, m = 4096",
        expected=theory.subspace_bounds(4096, 2, 0.05).upper ** 2 - 1,
        measured=worst,
        tolerance="at_most",
    )

"""Both ends of the spectrum of the Hessian, also as the optimizer sees it."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final

import torch
from torch import Tensor, nn
from typing_extensions import override

from gradwatch.capture.probe.batch import ObjectiveError
from gradwatch.capture.probe.curvature import Curvature
from gradwatch.capture.probe.objective import Objective
from gradwatch.capture.probe.preconditioner import Preconditioner
from gradwatch.capture.probe.view import ProbeView
from gradwatch.capture.view import StepView
from gradwatch.errors import ConfigError
from gradwatch.interfaces import Monitor
from gradwatch.monitors.smoothness import FINITE_DIFFERENCES
from gradwatch.numerics.lanczos import Extremes, cold_start, extreme_eigenpairs
from gradwatch.numerics.reading import Reading
from gradwatch.numerics.running import reading_of
from gradwatch.records import Measurement, ModelInfo, StepInfo

FEWEST: Final = 2
"""Products of a probe that follows two eigenvectors."""
ANEW: Final = 10
"""Every so many probes one begins anew: who follows an eigenvector sees no other overtake it."""
PRODUCTS: Final = 12
"""Of a probe that begins anew; on all test networks ten were enough for 0.1 %."""
PARTS: Final = 16
FEWEST_PARTS: Final = 4
LARGEST_BASIS: Final = 2**29
"""Entries of the vectors that are kept in a probe, 2 GiB; larger networks keep none."""
_PLAIN: Final = "hessian"
_PRECONDITIONED: Final = "preconditioned"


_UNITS: Final = {
    "sharpness": "L/P²",
    "smallest_eigenvalue": "L/P²",
    "preconditioned_sharpness": "1/P",
    "sharpness_variance": "L²/P⁴",
}
_ESTIMATES: Final = tuple(_UNITS)


class Sharpness(Monitor):
    """Largest and smallest eigenvalue of the Hessian of the training loss [L/P²], with their sign.

    `sharpness = max_v v^T H v / v^T v`, `smallest_eigenvalue` the minimum, of the loss as it is
    trained on: on the fixed probe batch of the watch, or else on the last batch that the model saw
    in the step, in train mode, at the parameters before the step. Several ranks take the Hessian
    of all their batches.

    `preconditioned_sharpness` is the largest eigenvalue of `P^(-1/2) H P^(-1/2)` [1/P], for Adam,
    AdamW and RMSprop, with the P that they divide by from their live state. A weight decay is left
    out: where it is all of a gradient, P is as small as the weight and the quotient says nothing.

    `sharpness_variance` is the variance over the examples of `e^T H_i e` [L²/P⁴], with e the
    eigenvector of the largest eigenvalue, from up to 16 parts of the batch, of a loss that is a
    mean over the examples. Measured for SGD, not with batch normalisation in train mode, whose
    parts would have another loss.

    By the Lanczos iteration: the first probe makes `products` products with the Hessian, each about
    two gradients, the others follow the eigenvectors that they know with as many as the last one
    needed and one more, and every tenth begins anew. Several ranks always make all. The standard
    errors are estimates from residuals, see `gradwatch.numerics.tridiagonal`. `sharpness_products`
    is how many products it took until the error of `sharpness` was 0.1 %, one more than were made
    if it is larger.

    With `finite_differences` a product is the difference of two gradients, for models that have no
    second derivative, such as those with an external attention kernel. It is valid for smooth
    networks only, not with ReLU. The values are labelled so, have no standard errors and no
    verdicts, and nothing is recommended on them; `sharpness_variance` is left out.

    Memory during a probe: the graph of a gradient and `products` + 2 copies of the parameters;
    between probes one copy, two with a preconditioner. Where `products` copies have more than 2^29
    entries, six copies and none between probes: then each probe begins anew, and
    `sharpness_variance` is left out. FSDP2 makes the whole model on each rank during a probe.

    Args:
        products: the most products of the Hessian with a vector in a probe, for each of the two.
        finite_differences: of gradients instead of second derivatives; see above.

    Raises:
        ConfigError: if `products` is no whole number of at least 2, or `finite_differences` is
            neither True nor False.

    References:
        Lanczos 1950; Cohen et al. 2021, arXiv:2103.00065 (sharpness); Cohen et al. 2022,
        arXiv:2207.14484 (preconditioned sharpness).
    """

    metrics = (*_ESTIMATES, "sharpness_products")
    probed = (*_ESTIMATES, *map("{}_error".format, _ESTIMATES), "sharpness_products")

    def __init__(self, products: int = PRODUCTS, *, finite_differences: bool = False) -> None:
        if isinstance(products, bool) or not isinstance(products, int) or products < FEWEST:
            raise ConfigError(
                f"products must be a whole number of at least {FEWEST}, got {products!r}"
            )
        if not isinstance(finite_differences, bool):
            raise ConfigError(
                f"finite_differences must be True or False, got {finite_differences!r}"
            )
        self.products = products
        self.finite_differences = finite_differences
        # Instance by instance: nearly all of it are the products.
        self.probe_cost = 2.2 * products + 8.0
        self._next = products
        self._probes = 0
        self._vectors: dict[str, list[Tensor]] = {}
        self._inputs: dict[str, float] = {}

    @override
    def joint_sums(self, view: ProbeView) -> int:
        each = self.products + 1
        return 2 * each + 1 if view.preconditioned else each

    @override
    def probe(self, view: ProbeView) -> dict[str, Tensor]:
        if _is_half(view.any.model):
            view.note("sharpness: half precision is too coarse for second derivatives")
            return {}
        if self._probes % ANEW == 0:
            self._vectors, self._next = {}, self.products
        self._probes += 1
        known, self._vectors = self._vectors, {}  # nothing is kept of a probe that fails
        self._inputs = {"examples": _examples(view)}
        differences = self.finite_differences
        with view.curvature(view.any, finite_differences=differences) as curvature:
            plain = self._extremes(_PLAIN, curvature.product, curvature, known, view)
            found = _numbers(plain)
            if view.preconditioned:
                found |= self._preconditioned(curvature, known, view)
            elif not differences:
                found |= _variance(curvature, plain.largest.vector)
        return found

    @override
    def read(self, view: StepView) -> Iterator[Reading]:
        probed = view.probed
        for metric, unit in _UNITS.items():
            if metric in probed:
                differences = self.finite_differences
                yield Reading(
                    metric,
                    probed[metric],
                    unit=unit,
                    standard_errors=None if differences else probed[f"{metric}_error"],
                    source=FINITE_DIFFERENCES if differences else "",
                    inputs=self._inputs,
                )
        if "sharpness_products" in probed:
            yield Reading("sharpness_products", probed["sharpness_products"])

    @override
    def derive(
        self, step: StepInfo, measurements: Sequence[Measurement], model: ModelInfo
    ) -> Iterator[Measurement]:
        needed = reading_of(measurements, "sharpness_products")
        if needed is not None:
            converged = needed.value <= self._next
            wanted = needed.value + 1 if converged else 2 * self._next
            self._next = int(min(max(wanted, FEWEST), self.products))
        return iter(())

    def _extremes(
        self,
        kind: str,
        operator: Callable[[Sequence[Tensor]], Sequence[Tensor]],
        curvature: Curvature,
        known: Mapping[str, Sequence[Tensor]],
        view: ProbeView,
    ) -> Extremes:
        cold = cold_start(curvature.point, seed=self._probes)
        start = _usable_or(known.get(kind, cold), cold)
        products = self._next if view.sums is None else self.products
        keep = self.products * sum(item.numel() for item in start) <= LARGEST_BASIS
        found = extreme_eigenpairs(operator, curvature.mean(start), products, reorthogonalise=keep)
        if keep:
            ends = zip(found.largest.vector, found.smallest.vector, strict=True)
            self._vectors[kind] = [one + other for one, other in ends]
        return found

    def _preconditioned(
        self, curvature: Curvature, known: Mapping[str, Sequence[Tensor]], view: ProbeView
    ) -> dict[str, Tensor]:
        preconditioner = curvature.preconditioner()
        if preconditioner is None:
            return {}
        operator = _as_seen_by_optimizer(curvature, preconditioner)
        found = self._extremes(_PRECONDITIONED, operator, curvature, known, view).largest
        return {
            "preconditioned_sharpness": found.value,
            "preconditioned_sharpness_error": found.error,
        }


def _as_seen_by_optimizer(
    curvature: Curvature, preconditioner: Preconditioner
) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """`P^(-1/2) H P^(-1/2)`."""
    roots = preconditioner.inverse_roots

    def product(vector: Sequence[Tensor]) -> list[Tensor]:
        scaled = [part * root for part, root in zip(vector, roots, strict=True)]
        bent = curvature.product(scaled)
        return [root * image for root, image in zip(roots, bent, strict=True)]

    return product


def _numbers(found: Extremes) -> dict[str, Tensor]:
    return {
        "sharpness": found.largest.value,
        "sharpness_error": found.largest.error,
        "smallest_eigenvalue": found.smallest.value,
        "smallest_eigenvalue_error": found.smallest.error,
        "sharpness_products": found.largest.needed,
    }


def _variance(curvature: Curvature, vector: Sequence[Tensor]) -> dict[str, Tensor]:
    """`s² = M Var(h_part)` from the scatter of parts of M examples, none of which they share.

    A batch may be sorted, so that each part takes its examples from all over it.
    """
    examples = _count(curvature.objective)
    parts = min(PARTS, examples)
    if not vector or parts < FEWEST_PARTS or _mixes_examples(curvature.objective.model):
        return {}
    size = examples // parts
    rows = [slice(first, size * parts, parts) for first in range(parts)]
    curvatures = torch.stack([curvature.along(vector, part) for part in rows])
    variance = curvatures.var() * size
    # Of a normal law; with a heavier tail it is larger.
    error = variance * (2 / (parts - 1)) ** 0.5
    return {"sharpness_variance": variance, "sharpness_variance_error": error}


def _examples(view: ProbeView) -> float:
    """Of all ranks; NaN if the batch does not show them."""
    return float(view.ranks * _count(view.any) or math.nan)


def _count(objective: Objective) -> int:
    try:
        return objective.examples
    except ObjectiveError:
        return 0


def _usable_or(vector: Sequence[Tensor], other: Sequence[Tensor]) -> list[Tensor]:
    """A vector, or another one where a probe before has failed or was of other parameters."""
    if list(map(_kind, vector)) != list(map(_kind, other)):
        return list(other)
    finite = torch.stack([item.isfinite().all() for item in vector]).all()
    some = torch.stack([item.any() for item in vector]).any()
    return [torch.where(finite & some, one, two) for one, two in zip(vector, other, strict=True)]


def _kind(item: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return item.shape, item.dtype, item.device


def _is_half(model: nn.Module) -> bool:
    trained = (item for item in model.parameters() if item.requires_grad)
    return any(item.element_size() < torch.float32.itemsize for item in trained)


def _mixes_examples(model: nn.Module) -> bool:
    return any(
        isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training
        for module in model.modules()
    )

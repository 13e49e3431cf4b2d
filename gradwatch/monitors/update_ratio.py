"""How far a step moved the parameters, as measured, not as a formula of the optimizer says."""

from collections.abc import Iterator

import torch
from torch import Tensor
from typing_extensions import override

from gradwatch.capture.view import NamedValues, StepView
from gradwatch.interfaces import Monitor
from gradwatch.numerics.norms import total_norm
from gradwatch.numerics.reading import Reading


class UpdateRatio(Monitor):
    """Size of the update relative to the parameter, and entries that it left unmoved.

    `update_ratio` is `||theta_new - theta_old|| / ||theta_new||`, for the model and for each
    parameter that had a gradient; `update_norm` is its numerator for the whole model [P].
    `unmoved_fraction` is the share of entries with a non-zero gradient that are bit-identical
    after the step: near 0 in float32, near 1 where updates are lost to rounding in low
    precision. All come from 4096 entries of each parameter, so they are exact for small ones.
    """

    metrics = ("update_norm", "update_ratio", "unmoved_fraction")
    needs = frozenset({"parameters", "updates"})

    @override
    def read(self, view: StepView) -> Iterator[Reading]:
        updates, unmoved, norms = view.update_norms, view.unmoved_fractions, view.parameter_norms
        if updates is None or unmoved is None or norms is None:
            return
        sizes = _select(norms, updates.names)
        yield Reading("update_norm", updates.total(), unit="P")
        yield Reading("update_ratio", _ratio(updates.total(), total_norm(sizes)))
        yield Reading("update_ratio", _ratio(updates.values, sizes), updates.names)
        yield Reading("unmoved_fraction", unmoved.values.mean())
        yield Reading("unmoved_fraction", unmoved.values, unmoved.names)


def _select(values: NamedValues, names: tuple[str, ...]) -> Tensor:
    if values.names == names:
        return values.values
    place = {name: index for index, name in enumerate(values.names)}
    wanted = torch.tensor([place[name] for name in names])
    return values.values[wanted.to(values.values.device)]


def _ratio(update: Tensor, size: Tensor) -> Tensor:
    """0 for a parameter that is and stays 0, such as a bias that nothing pushes."""
    return torch.where(update == 0, torch.zeros_like(update), update / size)

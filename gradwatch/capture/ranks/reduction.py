"""The sampled step of all ranks together, in one sum over the ranks.

Everything that a rank knows goes into one vector of fixed length: squares of norms, weighted so
that parts which several ranks hold count once, then means, then which parts of the watch have
failed. A rank whose capture has failed sends zeros: the others must not wait for it.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from gradwatch.capture.forward.weights import WEIGHT_FACTS
from gradwatch.capture.part import CAPTURE
from gradwatch.capture.ranks.ranks import Ranks
from gradwatch.capture.step_tensors import StepTensors
from gradwatch.capture.view import NamedValues
from gradwatch.isolation import Isolation

_NORMS: Final = ("used", "raw", "updates", "parameters")
_COUNTS: Final = ("unmoved", "pushed", "first_squares", "seconds")
_MEANS: Final = ("activations", "log_gains")
_SUMS: Final = ("found_inf", "microbatch_squares", "microbatches", "weights", "weight_squares")
_NUMBERS: Final = ("loss", "samples", *_SUMS)
_COUNTED: Final = ("loss", "samples", "raw", "microbatches", "weights", "covariance")
INCOMPLETE: Final[Mapping[str, tuple[str, ...]]] = {
    "raw": ("gradient_norm", "clip_coefficient", "gradient_square", "gradient_variance"),
    "microbatches": ("microbatch_gradient_norm", "microbatches"),
    "weights": ("gradient_square", "gradient_variance"),
    "covariance": ("covariance_trace", "covariance_top_eigenvalue"),
}
"""What needs all ranks, and the metrics that are made of it."""

_FACTS: Final = len(WEIGHT_FACTS)
_COVARIANCE: Final = 4
_MOST_PLACES: Final = 32


class Reduction:
    """Combines the sampled steps of the ranks.

    Args:
        ranks: that train together.
        parameters: the optimized parameters by name, the same on all ranks.
        layers: the layers that may be measured, likewise.
        parts: the parts of the watch whose failures concern all ranks, likewise.
        numbers: what probes may measure, likewise.
        clock: length of the clock of the probes, likewise.
    """

    def __init__(
        self,
        ranks: Ranks,
        parameters: Mapping[str, Tensor],
        layers: Sequence[str],
        parts: Sequence[str],
        numbers: Sequence[str] = (),
        clock: int = 0,
    ) -> None:
        self._ranks = ranks
        self._parts = tuple(parts)
        self._parameters = {name: place for place, name in enumerate(parameters)}
        self._layers = {name: place for place, name in enumerate(layers)}
        self._numbers = {name: place for place, name in enumerate(numbers)}
        self._device = next(iter(parameters.values())).device
        shares = [ranks.share(parameter) for parameter in parameters.values()]
        self._shares = torch.tensor(shares, dtype=torch.float32).to(self._device)
        of_parameters, of_layers = len(self._parameters), len(self._layers)
        self._lengths = {
            **dict.fromkeys((*_NORMS, *_COUNTS), of_parameters),
            **dict.fromkeys((*_MEANS, *map(_number_of, _MEANS)), of_layers),
            "facts": of_layers * _FACTS,
            _number_of("facts"): of_layers,
            **dict.fromkeys(_NUMBERS, 1),
            "covariance": _COVARIANCE,
            **dict.fromkeys(map(_number_of, _COUNTED), 1),
            **dict.fromkeys(("probed", _number_of("probed")), len(self._numbers)),
            "clock": clock,
            "failures": len(self._parts),
            "left": 1,
        }
        self._places: dict[tuple[str, ...], Tensor | slice] = {
            tuple(self._parameters): slice(None),
            tuple(self._layers): slice(None),
        }

    def combine(
        self, local: StepTensors | None, isolation: Isolation, *, left: bool = False
    ) -> tuple[StepTensors | None, Tensor]:
        """Adds up over the ranks; all of them must call it, whatever has failed.

        Args:
            local: of this rank, or None if it could not be captured.
            isolation: knows the parts that have failed on this rank.
            left: this rank closes its watch, and the step is nothing without it.

        Returns:
            The step of all ranks together, None where `local` is, and for each of `parts` on
            how many ranks it has failed.
        """
        vector = self._zeros()
        # What fails here fails on this rank alone, and the others wait.
        if local is not None and not isolation.run(CAPTURE, self._write, vector, local):
            vector, local = self._zeros(), None
        mine = self._segments(vector)
        for place, part in enumerate(self._parts):
            if part in isolation.failures:
                mine["failures"][place] = 1
        mine["left"].fill_(float(left))
        sums = self._segments(self._ranks.sum(vector))
        step = None if local is None else self._read(sums, local)
        return step, torch.cat([sums["failures"], sums["left"], *self._incomplete(sums)])

    def _zeros(self) -> Tensor:
        return torch.zeros(sum(self._lengths.values()), device=self._device, dtype=torch.float32)

    def _segments(self, vector: Tensor) -> dict[str, Tensor]:
        parts = vector.split(list(self._lengths.values()))
        return dict(zip(self._lengths, parts, strict=True))

    def _write(self, vector: Tensor, local: StepTensors) -> bool:
        mine = self._segments(vector)
        for field in (*_NORMS, *_COUNTS):
            values: NamedValues | None = getattr(local, field)
            if values is not None and values.names:
                amounts = values.values if field in _COUNTS else values.values.square()
                place = self._place(self._parameters, values.names)
                mine[field][place] = amounts.to(mine[field]) * self._shares[place]
        for field in _MEANS:
            values = getattr(local, field)
            if values is not None and values.names:
                amounts = values.values.square() if field == "activations" else values.values
                place = self._place(self._layers, values.names)
                mine[field][place] = amounts.to(mine[field])
                mine[_number_of(field)][place] = 1
        for name, facts in local.facts.items():
            mine["facts"].view(-1, _FACTS)[self._layers[name]] = facts.to(self._device)
            mine[_number_of("facts")][self._layers[name]] = 1
        for name, found in local.probed.items():
            mine["probed"][self._numbers[name]] = found.to(self._device)
            mine[_number_of("probed")][self._numbers[name]] = 1
        if local.clock is not None:
            mine["clock"].copy_(local.clock, non_blocking=True)
        for field in (*_NUMBERS, "covariance"):
            number: Any = getattr(local, field)
            if number is not None:
                mine[field].add_(number)
        for field in _COUNTED:
            if getattr(local, field) is not None:
                mine[_number_of(field)].add_(1)
        return True

    def _read(self, sums: dict[str, Tensor], local: StepTensors) -> StepTensors:
        found: dict[str, Any] = {}
        for field in (*_NORMS, *_COUNTS):
            values: NamedValues | None = getattr(local, field)
            if values is not None:
                total = sums[field][self._place(self._parameters, values.names)]
                if field == "raw":  # what is equal on all ranks is known from some of them
                    total = total * (self._ranks.size / sums[_number_of(field)])
                found[field] = NamedValues(
                    values.names, total if field in _COUNTS else total.sqrt()
                )
        for field in _MEANS:
            values = getattr(local, field)
            if values is not None:
                place = self._place(self._layers, values.names)
                mean = sums[field][place] / sums[_number_of(field)][place]
                mean = mean.sqrt() if field == "activations" else mean
                found[field] = NamedValues(values.names, mean)
        found |= {name: sums[name][0] for name in _SUMS if getattr(local, name) is not None}
        if local.covariance is not None:
            found["covariance"] = sums["covariance"] / sums[_number_of("covariance")]
        facts = sums["facts"].view(-1, _FACTS) / sums[_number_of("facts")].unsqueeze(1)
        probed = sums["probed"] / sums[_number_of("probed")]
        return StepTensors(
            probed={name: probed[self._numbers[name]] for name in local.probed},
            clock=sums["clock"],
            facts={name: facts[self._layers[name]] for name in local.facts},
            loss=None if local.loss is None else (sums["loss"] / sums[_number_of("loss")])[0],
            samples=None if local.samples is None else self._samples(sums),
            loss_scale=local.loss_scale,
            shrink=local.shrink,
            **found,
        )

    def _samples(self, sums: dict[str, Tensor]) -> Tensor:
        # With tensor parallelism several ranks work on one batch; a rank that saw no batch size
        # is taken to have had the mean one.
        of_all = sums["samples"] * self._ranks.replicas / sums[_number_of("samples")]
        return of_all.round()[0]

    def _incomplete(self, sums: dict[str, Tensor]) -> list[Tensor]:
        """Above 0 for what is worthless because only some of the ranks know it."""
        some = {name: sums[_number_of(name)] % self._ranks.size for name in INCOMPLETE}
        if not self._ranks.in_parts:  # what is equal on all ranks, one of them knows
            some["raw"] = torch.zeros_like(some["raw"])
        return [*some.values(), sums[_number_of("probed")] % self._ranks.size]

    def _place(self, slots: Mapping[str, int], names: tuple[str, ...]) -> Tensor | slice:
        # Kept, because a new index would have to travel to the device.
        if names not in self._places:
            if len(self._places) == _MOST_PLACES:  # other parameters are used in each step
                self._places.clear()
            wanted = [slots[name] for name in names]
            self._places[names] = torch.tensor(wanted, dtype=torch.long).to(self._device)
        return self._places[names]


def _number_of(field: str) -> str:
    """Where it is counted how many ranks know a field."""
    return f"number of {field}"

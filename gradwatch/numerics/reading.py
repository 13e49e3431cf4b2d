"""Readings: named values that are still on their device, and their one trip to the host."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gradwatch.records import MODEL, Measurement


@dataclass(frozen=True, slots=True)
class Reading:
    """Values of one metric at one step, on their device.

    Attributes:
        metric: name of the metric, one of its monitor's `metrics`.
        values: shape (k,), or () for a single one; any float or integer type.
        scopes: k names: parameters, layers, blocks; "model" for the whole model.
        unit: in terms of L, P and A.
        standard_errors: shape of `values`, or None where they are not known.
        only_nonzero: leave out zeros on the host, for counts that are nearly always 0.
        source: what the values were estimated from, where there are several ways.
        inputs: numbers known on the host that a bound needs to judge the values.

    Example:
        >>> Reading("loss", torch.tensor(0.5), unit="L").scopes
        ('model',)
    """

    metric: str
    values: Tensor
    scopes: Sequence[str] = (MODEL,)
    unit: str = "1"
    standard_errors: Tensor | None = None
    only_nonzero: bool = False
    source: str = ""
    inputs: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for tensor in self.tensors():
            if not _can_be_fetched(tensor):
                raise TypeError(
                    f"a Reading of {self.metric} needs dense tensors of real numbers, got "
                    f"{tensor!r}"
                )
            if tensor.numel() != len(self.scopes):
                raise ValueError(
                    f"a Reading of {self.metric} needs one scope a value, got "
                    f"{tensor.numel()} values and {len(self.scopes)} scopes"
                )
        if not all(isinstance(text, str) for text in (self.unit, self.source, *self.scopes)):
            raise TypeError(
                f"a Reading of {self.metric} needs strings as unit and scopes, got {self.unit!r} "
                f"and {self.scopes!r}"
            )

    def tensors(self) -> list[Tensor]:
        """What must travel to the host: the values and, if any, their standard errors."""
        return [self.values, *([] if self.standard_errors is None else [self.standard_errors])]

    def measurements(self, step: int, values: Sequence[float]) -> list[Measurement]:
        """Names the fetched numbers.

        Args:
            step: the optimizer step that they belong to.
            values: the numbers of `tensors()`, one after the other.

        Returns:
            One measurement a scope.
        """
        count = len(self.scopes)
        errors: Sequence[float | None] = values[count:] or [None] * count
        return [
            Measurement(
                metric=self.metric,
                scope=scope,
                step=step,
                value=value,
                unit=self.unit,
                standard_error=error,
                source=self.source,
                inputs=self.inputs,
            )
            for scope, value, error in zip(self.scopes, values[:count], errors, strict=True)
            if not (self.only_nonzero and value == 0)
        ]


def _can_be_fetched(values: object) -> bool:
    if not isinstance(values, Tensor) or values.layout != torch.strided:
        return False
    return not values.is_complex() and not values.is_meta


def fetch(tensors: Sequence[Tensor]) -> list[list[float]]:
    """Copies many small tensors to the host in one transfer.

    Tensors on several devices are first gathered on the device of the first one.

    Args:
        tensors: any shapes and types; integers beyond 2^24 are rounded to float32.

    Returns:
        One flat list of floats a tensor.

    Example:
        >>> fetch([torch.tensor(1.0), torch.tensor([2.0, 3.0])])
        [[1.0], [2.0, 3.0]]
    """
    if not tensors:
        return []
    device = tensors[0].device
    flat = [tensor.detach().reshape(-1).to(device, torch.float32) for tensor in tensors]
    numbers: list[float] = torch.cat(flat).tolist()
    lengths = [tensor.numel() for tensor in tensors]
    starts = [sum(lengths[:index]) for index in range(len(lengths))]
    return [numbers[start : start + length] for start, length in zip(starts, lengths, strict=True)]

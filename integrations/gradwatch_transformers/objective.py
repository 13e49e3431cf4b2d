"""The loss that a model of transformers returns, for probes."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn
from typing_extensions import override

from gradwatch.capture.probe.batch import Call
from gradwatch.capture.probe.objective import OwnLoss
from gradwatch.numerics.hvp import Hessian

_PLAIN_FORWARD: Final = "_original_forward"
"""Where accelerate keeps the forward that it put its autocast around."""


class ReturnedLoss(OwnLoss):
    """The mean loss of the batch that the model was called with last.

    The Trainer tells the model over how many tokens of how many micro-batches and ranks to average;
    here it is over those of the batch, or of the part of it that is evaluated.
    """

    @override
    def _call(self) -> Call:
        call = super()._call()
        return Call(call.args, _without_count(call.kwargs))

    @override
    @contextmanager
    def hessian(
        self,
        parameters: Mapping[str, Tensor],
        rows: slice | None = None,
        *,
        by: Sequence[Tensor] | None = None,
    ) -> Iterator[Hessian]:
        single = all(item.dtype == torch.float32 for item in parameters.values())
        plainly = _without_autocast(self.model, wanted=single)
        with plainly, super().hessian(parameters, rows, by=by) as found:
            yield found


@contextmanager
def _without_autocast(model: nn.Module, *, wanted: bool) -> Iterator[None]:
    """Takes the autocast of accelerate off, inside of which nobody else's has a say."""
    attributes = vars(model)
    if not wanted or _PLAIN_FORWARD not in attributes or "forward" not in attributes:
        yield
        return
    wrapped = attributes["forward"]
    attributes["forward"] = attributes[_PLAIN_FORWARD]
    try:
        yield
    finally:
        attributes["forward"] = wrapped


def _without_count(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name != "num_items_in_batch"}

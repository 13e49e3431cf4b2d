"""The loss that a model of transformers returns, for probes."""

from typing import Any

from typing_extensions import override

from gradwatch.capture.probe.batch import Call
from gradwatch.capture.probe.objective import OwnLoss


class ReturnedLoss(OwnLoss):
    """The mean loss of the batch that the model was called with last.

    The Trainer tells the model over how many tokens of how many micro-batches and ranks to average;
    here it is over those of the batch, or of the part of it that is evaluated.
    """

    @override
    def _call(self) -> Call:
        call = super()._call()
        return Call(call.args, _without_count(call.kwargs))


def _without_count(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name != "num_items_in_batch"}

"""The training loss."""

from collections.abc import Iterator

from typing_extensions import override

from gradwatch.capture.view import StepView
from gradwatch.interfaces import Monitor
from gradwatch.numerics.reading import Reading


class LossValue(Monitor):
    """The training loss of the step [L].

    It is taken from `watch.observe(loss=...)`, from the closure of the optimizer step, from the
    model's own output (`output.loss`), or with `track_loss=True` from what `backward()` is
    called on, in this order.
    """

    metrics = ("loss",)

    @override
    def read(self, view: StepView) -> Iterator[Reading]:
        if view.loss is None:
            view.note(
                "loss: it is computed outside the model, where the watch does not look; pass "
                "track_loss=True or call watch.observe(loss=loss)"
            )
            return
        yield Reading("loss", view.loss, unit="L")

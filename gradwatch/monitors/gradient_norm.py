"""How large the gradients are, before and after clipping."""

from collections.abc import Iterator
from typing import Final

from typing_extensions import override

from gradwatch.capture.view import NamedValues, StepView
from gradwatch.interfaces import Monitor
from gradwatch.numerics.reading import Reading

UNIT: Final = "L/P"
UNSEEN: Final = (
    "the watch cannot see whether gradients are clipped; use watch.clip_grad_norm_, call "
    "watch.observe before clipping, or pass track_clipping=True"
)


class GradientNorm(Monitor):
    """L2 norm of the gradient, of the model and of each parameter.

    `gradient_norm_used` is of the gradient that the optimizer consumed: after unscaling, over
    all micro-batches, after clipping. `gradient_norm` is of the raw gradient before clipping.
    It is there where clipping can be seen: with `watch.clip_grad_norm_`, `watch.observe` before
    clipping, or `track_clipping=True`. `clip_coefficient` is their quotient, 1 for no clipping.

    The norm of a mini-batch gradient is no estimate of the norm of the full gradient: its square
    is too large by the gradient noise.
    """

    metrics = ("gradient_norm", "gradient_norm_used", "clip_coefficient")

    @override
    def read(self, view: StepView) -> Iterator[Reading]:
        used = view.gradient_norms
        if not used.names:
            view.note("gradient_norm: no parameter of the optimizer had a gradient")
            return
        if view.without_gradient:
            view.note(f"no gradient reached {shortened(view.without_gradient)}")
        yield from _model_and_parameters("gradient_norm_used", used)
        if view.raw_gradient_norms is None or view.clip_coefficient is None:
            view.note(f"gradient_norm (before clipping): {view.clipping_hidden or UNSEEN}")
            return
        yield from _model_and_parameters("gradient_norm", view.raw_gradient_norms)
        yield Reading("clip_coefficient", view.clip_coefficient)


def shortened(names: tuple[str, ...], most: int = 5) -> str:
    """A list of names in words, not longer than a line.

    Args:
        names: the names.
        most: how many to spell out.

    Returns:
        The first ones and how many more there are.

    Example:
        >>> shortened(("a", "b", "c"), most=2)
        'a, b and 1 more'
    """
    listed = ", ".join(names[:most])
    return listed if len(names) <= most else f"{listed} and {len(names) - most} more"


def _model_and_parameters(metric: str, norms: NamedValues) -> Iterator[Reading]:
    yield Reading(metric, norms.total(), unit=UNIT)
    yield Reading(metric, norms.values, norms.names, unit=UNIT)

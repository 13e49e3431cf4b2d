"""Whether the derivative of a loss can be differentiated again, where torch does not say so.

A custom `torch.autograd.Function` whose backward is `once_differentiable`, or calls a kernel that
autograd knows nothing of, cuts the graph of the gradient. `torch.autograd.grad` then takes the
part behind the cut for 0: a curvature comes out that is none, and no error.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Final

from torch import Tensor
from torch.autograd.function import BackwardCFunction, once_differentiable

from gradwatch.errors import GradwatchError

_MARKED: Final = once_differentiable(lambda context: None).__code__
"""The code that all functions share which are marked."""


class NoSecondDerivativeError(GradwatchError):
    """An operation of a model cannot be differentiated twice."""


def require_second_derivative(loss: Tensor) -> None:
    """Lets the next gradient of a loss fail where its graph would be cut.

    Custom functions are looked at, of which most models have none; whatever torch brings itself
    raises an error on its own. A backward is linear in what it is given: where that has a graph
    and nothing that comes out has one, it was cut. Where it has none, as behind the last nonlinear
    operation, a cut is seen only if the backward is marked as `once_differentiable`.

    Args:
        loss: () tensor with its graph, to be differentiated with `create_graph=True`.

    Raises:
        NoSecondDerivativeError: if a function is marked as `once_differentiable`. The gradient
            raises it for a cut that only shows then.
    """
    for node in _custom_functions(loss):
        name = type(node).__name__.removesuffix("Backward")
        if _is_once_differentiable(node):
            raise NoSecondDerivativeError(f"the backward of {name} is marked once_differentiable")
        node.register_hook(partial(_check_graph, name))


def _custom_functions(loss: Tensor) -> Iterator[Any]:
    seen, waiting = set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting += [before for before, _ in node.next_functions]
        if isinstance(node, BackwardCFunction):
            yield node


def _is_once_differentiable(node: Any) -> bool:
    backward = getattr(getattr(node, "_forward_cls", None), "backward", None)
    return getattr(backward, "__code__", None) is _MARKED


def _check_graph(
    name: str, after: Sequence[Tensor | None], before: Sequence[Tensor | None]
) -> None:
    comes_out = [item.requires_grad for item in after if item is not None]
    went_in = [item.requires_grad for item in before if item is not None]
    if any(went_in) and comes_out and not any(comes_out):
        raise NoSecondDerivativeError(f"the backward of {name} has no derivative")

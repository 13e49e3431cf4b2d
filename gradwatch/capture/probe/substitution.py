"""A model that computes with other parameters and copies of its buffers for a while."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from gradwatch.capture.probe.kept import REGISTERED, DisturbedError
from gradwatch.capture.probe.outside import renew_outside


@contextmanager
def substituted(model: nn.Module, parameters: Mapping[str, Tensor]) -> Iterator[None]:
    """Lets the model compute with other tensors inside the block.

    Every place that holds a parameter or a buffer is put back afterwards, however many names a
    module has: `torch.func.functional_call` leaves the substitutes in a module that is registered
    twice. Frozen parameters are copied, too, unless they are much larger than the trainable ones
    and so would be no fair price; then a change in place is an error. Inside `undisturbed` the
    buffers of other modules that the loss calls are fresh copies, too.

    Args:
        model: the user's own module.
        parameters: by name; the model's own that are left out stay as they are.

    Yields:
        None.

    Raises:
        DisturbedError: if the forward changed a parameter in place that could not be copied.
    """
    given, alias = _substitutes(model, parameters)
    saved = [
        (module, [dict(vars(module)[kind]) for kind in REGISTERED]) for module in model.modules()
    ]
    versions = [item._version for item in alias]
    renew_outside()
    try:
        for module, _ in saved:
            for kind in ("_parameters", "_buffers"):
                _put(vars(module)[kind], given)
        yield
    finally:
        for module, kinds in saved:
            for kind, items in zip(REGISTERED, kinds, strict=True):
                held: dict[str, Any] = vars(module)[kind]
                held.clear()
                held.update(items)
    if versions != [item._version for item in alias]:
        raise DisturbedError("the forward changes frozen parameters in place; give no loss_fn")


def _put(held: dict[str, Any], given: Mapping[int, Tensor]) -> None:
    for name, tensor in held.items():
        if tensor is not None and id(tensor) in given:
            held[name] = given[id(tensor)]


def _substitutes(
    model: nn.Module, parameters: Mapping[str, Tensor]
) -> tuple[dict[int, Tensor], list[Tensor]]:
    """What stands for each tensor of the model, by identity, and what nothing stands for."""
    named = dict(model.named_parameters())
    given = {id(named[name]): item for name, item in parameters.items()}
    rest: list[Tensor] = [item for item in named.values() if id(item) not in given]
    copies = sum(item.numel() for item in rest) <= sum(item.numel() for item in parameters.values())
    if copies:
        given |= {id(item): item.detach().clone() for item in rest}
    given |= {id(item): item.detach().clone() for item in model.buffers()}
    return given, [] if copies else rest

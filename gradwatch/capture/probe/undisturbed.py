"""A second evaluation of the loss that the training does not notice."""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Final

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from gradwatch.capture.forward.gate import unnoticed
from gradwatch.capture.joint_sums import adding_up
from gradwatch.capture.probe.batch import ObjectiveError
from gradwatch.capture.probe.kept import kept_attributes
from gradwatch.capture.probe.outside import kept_outside
from gradwatch.capture.probe.random_states import devices_of, kept_random_states
from gradwatch.numerics.sharding import world_size

_COLLECTIVES: Final = frozenset({"c10d", "_c10d_functional", "c10d_functional"})


@contextmanager
def undisturbed(
    model: nn.Module,
    *,
    pause: Callable[[], AbstractContextManager[Any]] = nullcontext,
    autocast: torch.dtype | None = None,
) -> Iterator[None]:
    """Protects a training while its loss and the derivatives of it are evaluated again.

    Restored afterwards, also after an error: the random streams of PyTorch (CPU and the devices of
    the model), Python and NumPy; the train or eval mode and the other attributes of the modules, as
    `kept_attributes` says; the state of other modules that the loss calls, as `kept_outside` says.
    The hooks of all watches are silent. Gradients are on; attention and recurrent layers use
    kernels that have second derivatives; compiled functions run uncompiled. With several processes
    the loss must not communicate: the other ranks need not be probing, and would wait.

    Not protected: what modules hold in objects of other types, what lies outside of modules, the
    parameters of other modules, and the user's own hooks, which run. Within the block `backward()`
    must not be called: an `Objective` takes derivatives by `torch.autograd.grad`.

    Args:
        model: the user's own module, without wrappers.
        pause: gives a context to enter before anything else.
        autocast: evaluate under autocast to this type; None for none.

    Yields:
        None. Each block begins with the same random state, so that two blocks draw the same
        dropout masks; within a block each evaluation draws its own.
    """
    devices = devices_of(model.modules())
    with ExitStack() as everything:
        everything.enter_context(unnoticed())
        everything.enter_context(pause())
        everything.enter_context(kept_attributes(model.modules()))
        everything.enter_context(kept_random_states(devices))
        everything.enter_context(kept_outside(model))
        everything.enter_context(torch.inference_mode(False))
        everything.enter_context(torch.enable_grad())
        for kind in {device.type for device in devices} | {"cpu"}:
            everything.enter_context(
                torch.autocast(kind, autocast or torch.bfloat16, enabled=autocast is not None)
            )
        everything.enter_context(sdpa_kernel(SDPBackend.MATH))
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            everything.enter_context(torch.backends.cudnn.flags(enabled=False))
        if world_size() > 1:
            everything.enter_context(_NoCollectives())  # type: ignore[no-untyped-call]
        if "torch._dynamo" in sys.modules:
            everything.enter_context(torch.compiler.set_stance("force_eager"))
        yield


def same_draws(model: nn.Module) -> AbstractContextManager[None]:
    """Two evaluations with the same random draws, such as dropout masks.

    To be used inside `undisturbed`: what is evaluated first within this context draws the same as
    what is evaluated first after it.

    Args:
        model: the user's own module.

    Returns:
        The context.
    """
    return kept_random_states(devices_of(model.modules()))


class _NoCollectives(TorchDispatchMode):
    """Refuses what would wait for another rank."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace in _COLLECTIVES and not adding_up.get():
            raise ObjectiveError(
                "the loss communicates with other ranks, which a probe must not; give a loss_fn "
                "that does not"
            )
        return func(*args, **(kwargs or {}))

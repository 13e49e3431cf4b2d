"""Everything that is seen of the layers: norms, gains, and how they are linked."""

import math
from collections.abc import Callable
from typing import Any, Final
from weakref import ref

import torch
from torch import Tensor, nn

from gradwatch.capture.forward.gain import GainTap
from gradwatch.capture.forward.gate import ForwardGate, first_tensor
from gradwatch.capture.forward.graph import Link
from gradwatch.capture.forward.links import LinkTrace
from gradwatch.capture.forward.structure import link_layers
from gradwatch.capture.hooks import HookHandles, OwnHook, inside_backward, is_replica
from gradwatch.capture.model.facts import ROOT, layers_of
from gradwatch.capture.model.names import compiled_parts
from gradwatch.capture.part import LAYERS
from gradwatch.capture.view import NamedValues, some_examples
from gradwatch.isolation import Isolation
from gradwatch.numerics.norms import norm
from gradwatch.numerics.sharding import is_sharded
from gradwatch.records import ModelInfo

ELEMENTS: Final = 2**20
"""Outputs beyond this size are measured on their first examples only."""


class LayerCapture:
    """Measures the output of every layer while the gate is open.

    A hook stores a number at once and keeps no output: outputs may be changed in place by the
    next operation, and keeping them would cost the memory of the whole graph.

    Args:
        model: the unwrapped model.
        gate: says when a training forward runs.
        isolation: what to do when a hook fails.

    Attributes:
        linked: the facts about the model already say how its layers are linked.
    """

    def __init__(self, model: nn.Module, gate: ForwardGate, isolation: Isolation) -> None:
        self._gate = gate
        self._isolation = isolation
        self._links = LinkTrace(model, gate, isolation)
        self._gains = GainTap()
        self._slots: dict[str, Tensor] = {}
        self.linked = False
        out_of_reach = compiled_parts(model)
        # Weak, so that a watch that is never closed does not keep the model alive.
        self._layers = [
            (name, ref(module), _comes_first(name, module))
            for name, module in layers_of(model)
            if module not in out_of_reach
        ]
        self._handles = HookHandles()

    def begin_forward(self) -> None:
        """Puts the hooks on, for one training forward of a sampled step.

        At all other times they are off: PyTorch has fused kernels for evaluation that it uses
        only for modules without hooks.
        """
        self._handles.remove()
        self._isolation.run(LAYERS, self._attach)

    def end_forward(self, completed: bool) -> None:
        """Takes the hooks off and lets go of everything but numbers.

        Args:
            completed: the forward did not raise; otherwise it is as if it had not been.
        """
        self._handles.remove()
        self._links.remove()
        self._isolation.run(LAYERS, self._finish if completed else self._forget)

    def take_norms(self) -> NamedValues:
        """The norms of the last forward, layers in the order in which they ran; then forgets.

        Returns:
            For each layer that ran, the root mean square over examples of the L2 norm of its
            output [A].
        """
        slots, self._slots = self._slots, {}
        return NamedValues.stack(slots)

    def take_log_gains(self) -> NamedValues:
        """The log gains of the last forward (see `GainTap`); then forgets."""
        return self._gains.take()

    def link(self, model: ModelInfo) -> ModelInfo:
        """Adds to the facts how the layers are linked, once the first forward has shown it.

        Args:
            model: the facts so far.

        Returns:
            The facts with the links, or the same ones if there is nothing new.
        """
        if not self._links.finished:
            return model
        if self.linked:
            self._gains.facts = {}
            return model
        self.linked = True
        return link_layers(
            model,
            links=self._links.links,
            chained=self._chained(),
            padding=self._gains.padding,
            residual_blocks=self._links.residual_blocks,
        )

    def weight_facts(self) -> dict[str, Tensor]:
        """`weight_facts` of each chained layer, still on the device; then forgets them."""
        if not self._gains.facts or not self.linked:
            return {}
        facts = {name: self._gains.facts[name] for name in self._chained()}
        self._gains.facts = {}
        return facts

    def remove(self) -> None:
        """Takes the hooks off and lets go of the model."""
        self._handles.remove()
        self._links.release()
        self._layers = []

    def _attach(self) -> None:
        for name, reference, comes_first in self._layers:
            module = reference()
            if module is None:
                continue
            self._handles.add(
                module.register_forward_hook(
                    OwnHook(self._hook(name)), with_kwargs=True, prepend=comes_first
                )
            )
        self._links.attach()

    def _forget(self) -> None:
        self._slots = {}
        self._gains.forget()
        self._links.forget()

    @torch.no_grad()
    def _finish(self) -> None:
        self._links.finish()
        self._gains.finish(self._chained())

    def _chained(self) -> dict[str, Link]:
        """The layers that theory has a law for, with what stands behind each."""
        return self._links.successors(self._gains.padding.keys())

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            if self._gate.is_open and not inside_backward() and not is_replica(module):
                self._isolation.run(LAYERS, self._record, name, module, (args, kwargs), output)

        return hook

    @torch.no_grad()
    def _record(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        given, result = first_tensor(inputs), first_tensor(output)
        if result is None or result.numel() == 0:
            return
        examples = some_examples(result, ELEMENTS)
        count = examples.shape[0] if examples.dim() > 1 else 1
        self._slots[name] = norm(examples) / math.sqrt(count)
        if given is not None:
            self._links.see(name, given, result)
            self._gains.see(name, module, given, result)


def _comes_first(name: str, module: nn.Module) -> bool:
    """Before the hook that closes the gate, and before the one with which FSDP2 shards again."""
    return name == ROOT or any(map(is_sharded, module.parameters(recurse=False)))

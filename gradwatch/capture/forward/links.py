"""How layers are linked, learnt from the autograd graph of the first training forward.

Module order says little about what feeds what, and functional activations are no modules. The
graph says exactly what stands between two layers, at no cost and without reading a value.
"""

from collections import Counter
from collections.abc import Callable, Collection
from typing import Any
from weakref import ref

from torch import Tensor, nn

from gradwatch.capture.forward.gate import ForwardGate, first_tensor
from gradwatch.capture.forward.graph import Link, adds_its_input, trace_link
from gradwatch.capture.hooks import HookHandles, OwnHook, is_replica
from gradwatch.capture.model.facts import DROPOUTS
from gradwatch.capture.model.names import compiled_parts, named_modules
from gradwatch.capture.part import STRUCTURE
from gradwatch.isolation import Isolation


class LinkTrace:
    """Listens to one forward, then knows the links and lets the graph go.

    Args:
        model: the unwrapped model.
        gate: says when a training forward runs.
        isolation: what to do when a hook fails.

    Attributes:
        finished: the forward has been heard.
        links: for each layer, where its input comes from, None if that was not recognised.
        residual_blocks: modules whose output is their input plus something.
    """

    def __init__(self, model: nn.Module, gate: ForwardGate, isolation: Isolation) -> None:
        self.finished = False
        self.links: dict[str, Link | None] = {}
        self.residual_blocks: set[str] = set()
        self._gate = gate
        self._isolation = isolation
        self._calls: Counter[str] = Counter()
        self._outputs: dict[Any, str] = {}
        self._dropouts: dict[Any, tuple[float, Any]] = {}
        out_of_reach = compiled_parts(model)
        self._modules = [
            (name, ref(module))
            for name, module in named_modules(model)
            if module not in out_of_reach
        ]
        self._handles = HookHandles()

    def attach(self) -> None:
        """Puts the hooks on for one forward, unless one has been heard already."""
        self.remove()
        if self.finished:
            return
        for name, reference in self._modules:
            module = reference()
            if isinstance(module, DROPOUTS):
                self._listen(module, self._see_dropout)
            elif name and module is not None and any(True for _ in module.children()):
                self._listen(module, self._block_listener(name))

    def see(self, name: str, given: Tensor, result: Tensor) -> None:
        """Takes in one layer, from its forward hook.

        Args:
            name: of the layer.
            given: its first input.
            result: its first output.
        """
        if self.finished:
            return
        self._calls[name] += 1
        self.links[name] = trace_link(given.grad_fn, self._outputs, self._dropouts)
        if result.grad_fn is not None:
            self._outputs[result.grad_fn] = name

    def finish(self) -> None:
        """Ends the forward; the nodes of its graph are let go."""
        self.finished = True
        self._outputs = {}
        self._dropouts = {}

    def forget(self) -> None:
        """As if the forward under way had not begun."""
        if not self.finished:
            self.links, self.residual_blocks = {}, set()
            self._calls = Counter()
            self._outputs, self._dropouts = {}, {}

    def remove(self) -> None:
        """Takes the hooks off."""
        self._handles.remove()

    def release(self) -> None:
        """Takes the hooks off for good and lets go of the model."""
        self.remove()
        self._modules = []

    def successors(self, layers: Collection[str]) -> dict[str, Link]:
        """For each layer that feeds another one in a recognised way, what stands in between.

        A layer that ran several times in the forward is left out: with shared weights the
        factors of a chain are not independent, and theory is silent. So is one that feeds
        several layers in different ways.

        Args:
            layers: the layers that count, at both ends of a link.

        Returns:
            The link of each layer that feeds another one.
        """
        once = {name for name in layers if self._calls[name] == 1}
        found: dict[str, set[Link]] = {}
        for name, link in self.links.items():
            if link is not None and name in once and link.origin in once:
                found.setdefault(link.origin, set()).add(link)
        return {origin: links.pop() for origin, links in found.items() if len(links) == 1}

    def _listen(self, module: nn.Module, see: Callable[[nn.Module, Tensor, Tensor], None]) -> None:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            given, result = first_tensor(inputs), first_tensor(output)
            if given is not None and result is not None:
                see(module, given, result)

        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            if self._gate.is_open and not self.finished and not is_replica(module):
                self._isolation.run(STRUCTURE, look, module, (args, kwargs), output)

        self._handles.add(module.register_forward_hook(OwnHook(hook), with_kwargs=True))

    def _see_dropout(self, module: nn.Module, given: Tensor, result: Tensor) -> None:
        if result.grad_fn is not None and result.grad_fn is not given.grad_fn:
            self._dropouts[result.grad_fn] = (float(getattr(module, "p", 0.0)), given.grad_fn)

    def _block_listener(self, name: str) -> Callable[[nn.Module, Tensor, Tensor], None]:
        def see(module: nn.Module, given: Tensor, result: Tensor) -> None:
            known = given.grad_fn is not None and result.grad_fn is not None
            if known and adds_its_input(result.grad_fn, given.grad_fn):
                self.residual_blocks.add(name)

        return see

"""Gains of chained layers: by how much a layer and its activation change the mean square."""

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from gradwatch.capture.forward.graph import Link
from gradwatch.capture.forward.weights import (
    mean_square,
    plain_weight,
    response,
    spatial_padding,
    weight_facts,
)
from gradwatch.capture.model.facts import fans
from gradwatch.capture.view import NamedValues, some_examples
from gradwatch.numerics.activation import activate

EXAMPLES: Final = 64
ELEMENTS: Final = 2**18


@dataclass(frozen=True, slots=True)
class _Passage:
    """What a layer did to the first examples, kept until the forward ends."""

    arriving: Tensor
    """(examples,) mean squares of the inputs."""
    answer: Tensor
    """(examples, ...) pre-activations without the bias."""


class GainTap:
    """Measures `||phi(W h)||²/m / (||h||²/n)` of each layer on the first examples of the batch.

    The bias is taken out because the law is about the weights: under PyTorch's default
    initialisation the biases soon outweigh a signal that the weights let die.

    Attributes:
        facts: `weight_facts` of each layer in its first forward.
        padding: `spatial_padding` of each layer in its first forward.
    """

    def __init__(self) -> None:
        self.facts: dict[str, Tensor] = {}
        self.padding: dict[str, float] = {}
        self._passages: dict[str, _Passage] = {}
        self._log_gains: dict[str, Tensor] = {}
        self._chained: dict[str, Link] | None = None

    def see(self, name: str, module: nn.Module, given: Tensor, result: Tensor) -> None:
        """Takes in one layer, from its forward hook.

        Args:
            name: of the layer.
            module: the layer.
            given: its first input.
            result: its first output.
        """
        if self._chained is not None and name not in self._chained:
            return
        weight = plain_weight(module)
        if weight is None or given.dim() < 2 or result.dim() < 2:  # noqa: PLR2004 - needs a batch
            return
        inputs = some_examples(given.detach()[:EXAMPLES], ELEMENTS)
        answer = response(module, result.detach()[: inputs.shape[0]])
        self._passages[name] = _Passage(mean_square(inputs), answer)
        if name not in self.padding:
            self.padding[name] = spatial_padding(module, given)
            fan_in = fans(module)[0]
            self.facts[name] = weight_facts(
                module, weight, inputs, answer, fan_in, self.padding[name]
            )

    def finish(self, successors: dict[str, Link]) -> None:
        """Ends a forward: measures the gains and lets the pre-activations go.

        Args:
            successors: for each chained layer, what stands between it and the next one.
        """
        self._chained = successors
        for name, link in successors.items():
            if name in self._passages:
                self._log_gains[name] = _log_gain(self._passages[name], link)
        self._passages = {}

    def forget(self) -> None:
        """As if the forward under way had not begun."""
        self._passages = {}
        if self._chained is None:
            self.facts, self.padding = {}, {}

    def take(self) -> NamedValues:
        """The gains of the last forward; then forgets them.

        Returns:
            For each chained layer, the mean over examples of the log gain.
        """
        gains, self._log_gains = self._log_gains, {}
        return NamedValues.stack(gains)


def _log_gain(passage: _Passage, link: Link) -> Tensor:
    leaving = mean_square(activate(link.activation, passage.answer, link.negative_slope))
    # An all-zero example has no gain; it must not make the mean infinite.
    valid = (passage.arriving > 0).float()
    logs = torch.log(leaving / passage.arriving.clamp(min=torch.finfo(torch.float32).tiny))
    return torch.where(valid > 0, logs, 0.0).sum() / valid.sum()

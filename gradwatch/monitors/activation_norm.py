"""How the signal's norm changes from layer to layer."""

from collections.abc import Collection, Iterable, Iterator

import torch
from typing_extensions import override

from gradwatch.capture.model.facts import ROOT
from gradwatch.capture.view import NamedValues, StepView
from gradwatch.interfaces import Monitor
from gradwatch.monitors.gradient_norm import shortened
from gradwatch.numerics.reading import Reading
from gradwatch.records import ModelInfo
from gradwatch.theory.norm_preservation import norm_variance


class ActivationNorm(Monitor):
    """Norms of the layers' outputs, and the gains of chains of layers.

    `activation_norm` is the root mean square over examples of the L2 norm of a layer's output
    [A]; of very large outputs the first examples are taken.

    `activation_gain` is the factor by which a layer and its activation change the mean square of
    the signal, `exp(mean_i log((||phi(W h_i)||²/m) / (||h_i||²/n)))`, on the first 64 examples.
    It is measured where the layer is seen to feed another one through one known activation. The
    bias is left out: the law that it is compared with is about the weights.

    `activation_gain_cumulative` is the product of the gains from the start of the chain up to
    and including the layer. `gain_log_variance` is the variance that the logarithm of the whole
    chain's gain has between random initialisations, `V = sum_l kappa/m_l`, from the widths
    alone; its scope is the last layer of the chain.

    References:
        Arpit and Bengio 2019, "The Benefits of Over-parameterization at Initialization in Deep
        ReLU Networks", arXiv:1901.03611; Hanin and Rolnick 2018, arXiv:1803.01719 (the variance).
    """

    metrics = (
        "activation_norm",
        "activation_gain",
        "activation_gain_cumulative",
        "gain_log_variance",
    )
    needs = frozenset({"activations"})

    @override
    def read(self, view: StepView) -> Iterator[Reading]:
        norms, gains = view.activation_norms, view.activation_log_gains
        if view.activations_unavailable is not None:
            view.note(f"activation_norm: {view.activations_unavailable}")
            return
        if norms is None or not norms.names:
            view.note(
                "activation_norm: no training forward of the whole model was seen; a model that "
                "is called in parts, inside a compiled function, by a reentrant checkpoint or as "
                "replicas shows none"
            )
            return
        silent = _silent(view.model, norms.names, view.gradient_norms.names)
        if silent:
            view.note(
                f"activation_norm: {shortened(silent)} trained, but no output was seen; hooks see "
                "none of a compiled part, nor of weights that another module or a function uses"
            )
        yield Reading("activation_norm", norms.values, norms.names, unit="A")
        if gains is None or not gains.names:
            view.note(
                "activation_gain: no layer was seen to feed another one, each called once, through "
                "nothing but one known activation"
            )
        else:
            yield Reading("activation_gain", gains.values.exp(), gains.names)
            yield from _along_chains(view.model, gains)


def _silent(
    model: ModelInfo, seen: Collection[str], with_gradient: Iterable[str]
) -> tuple[str, ...]:
    """The layers that a gradient reached, but whose output no hook has shown."""
    trained = {_owner(name) for name in with_gradient}
    return tuple(
        layer.name for layer in model.layers if layer.name in trained and layer.name not in seen
    )


def _owner(parameter: str) -> str:
    """The layer that a parameter belongs to: "a.parametrizations.weight.original" is of "a"."""
    before, parametrized, _ = f".{parameter}".partition(".parametrizations.")
    owner = before if parametrized else before.rpartition(".")[0]
    return owner.removeprefix(".") or ROOT


def _along_chains(model: ModelInfo, gains: NamedValues) -> Iterator[Reading]:
    place = {name: index for index, name in enumerate(gains.names)}
    for chain in model.chains:
        names = tuple(layer.name for layer in chain)
        if not all(name in place for name in names):
            continue
        wanted = torch.tensor([place[name] for name in names]).to(gains.values.device)
        product = gains.values[wanted].cumsum(0).exp()
        yield Reading("activation_gain_cumulative", product, names)
        kappas = [layer.kappa or 0.0 for layer in chain]
        variance = norm_variance([layer.width for layer in chain], kappas)
        yield Reading("gain_log_variance", torch.tensor(variance), names[-1:])

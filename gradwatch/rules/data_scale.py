"""The knob `data_scale`: inputs whose mean makes the loss curved."""

from collections.abc import Iterable
from typing import Final

from typing_extensions import override

from gradwatch.interfaces import Rule
from gradwatch.records import History, Measurement, ModelInfo, Recommendation
from gradwatch.rules.recent import newest_value
from gradwatch.table import number

LEAST_SHARE: Final = 0.5
LARGEST_CLIPPED_SHARE: Final = 0.05
_SIGMAS: Final = 2.0


class DataScale(Rule):
    """Recommends to centre the inputs where their mean is what sets the curvature.

    `lambda_max(E x x^T) <= lambda_max(Cov x) + ||E x||²`: it fires if the mean is significantly
    more than half of the top eigenvalue. Centring allows a larger learning rate; at an unchanged
    learning rate a lower curvature alone does not train faster.

    Silent unless the inputs go straight into a linear layer with no normalisation before or right
    behind it, for other optimizers than SGD, and if more than 5 % of the steps were clipped.

    References:
        derived; that input statistics mediate the learning rate is the subject of Ithapu, Ravi and
        Singh 2017, arXiv:1702.08670.
    """

    @override
    def advise(self, history: History) -> Iterable[Recommendation]:
        share = newest_value(history, "input_mean_share")
        if share is None or history[-1].info.optimizer != "SGD" or _clipped(history):
            return
        if not _meets_the_inputs(history.model):
            return
        if share.value - _SIGMAS * (share.standard_error or 0.0) > LEAST_SHARE:
            yield _recommend(share, newest_value(history, "input_top_eigenvalue"))


def _meets_the_inputs(model: ModelInfo) -> bool:
    """Whether the first layer is linear and nothing takes the mean of the inputs away."""
    layers, normalisations = model.layers, set(model.normalisations)
    # Where a normalisation without parameters stands is not known: it may be the first module.
    hidden = normalisations - {layer.name for layer in layers}
    second = {layer.name for layer in layers[1:2]}
    return bool(layers) and layers[0].kind == "Linear" and not hidden | (second & normalisations)


def _clipped(history: History) -> bool:
    seen = [step.grads_clipped for report in history for step in report.steps]
    return sum(map(bool, seen)) > LARGEST_CLIPPED_SHARE * len(seen)


def _recommend(share: Measurement, eigenvalue: Measurement | None) -> Recommendation:
    size = f" of {number(eigenvalue.value)} A²" if eigenvalue is not None else ""
    error = share.standard_error
    shown = number(share.value) + (f" ± {number(error)}" if error else "")
    return Recommendation(
        knob="data_scale",
        scope="inputs",
        severity="info",
        reason=(
            f"the squared mean of the inputs is {shown} of the top eigenvalue{size} of their "
            "second moment, which the curvature follows; centre the inputs, and re-tune the "
            "learning rate upwards after L has been measured again: at an unchanged learning rate "
            "a lower curvature alone does not train faster"
        ),
        expected="smoothness falls, so that a larger learning rate is stable",
        source="derived; Ithapu, Ravi & Singh 2017, arXiv:1702.08670 (subject)",
    )

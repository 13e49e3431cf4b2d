"""The custom-scalars page: which curves stand in one chart, and under which question.

Every chart is a `Multiline`, never a `Margin`: TensorBoard draws a margin chart only where the
value and both of its edges have exactly the same steps, and shows an error in its place otherwise.
A value is measured more often than it is judged, and many bounds have one edge.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Final

from gradwatch.records import RunInfo
from gradwatch.tag import LEARNING_RATE, LOWER, UPPER, Tags
from gradwatch.theory.break_even import PRECONDITIONED

Layout = dict[str, dict[str, list[str | list[str]]]]
"""Question, then title of the chart, then its kind and the regular expressions of its tags."""

MORE: Final = "More"
QUESTIONS: Final[Mapping[str, tuple[str, ...]]] = {
    "Is it learning?": (
        "loss",
        "gradient_norm",
        "clip_coefficient",
        "parameter_norm",
        "nonfinite",
    ),
    "Is the learning rate right?": (
        LEARNING_RATE,
        "update_",
        "unmoved_",
        "lr_",
        "smoothness",
        "temperature",
        "batch_size",
    ),
    "How close is the edge of stability?": (
        "stability_",
        "sharpness",
        "preconditioned_sharpness",
        "batch_sharpness",
        "noise_stability_ratio",
        "smallest_eigenvalue",
        "rayleigh_quotient",
        "hessian_",
    ),
    "Do steps or noise limit it?": (
        "stationarity",
        "noise_",
        "gradient_square",
        "gradient_variance",
        "gradient_curvature",
        "gradient_scale",
        "stall_ratio",
        "dropout_",
        "microbatch",
        "covariance_",
    ),
    "Does the signal survive depth?": ("activation_", "gain_", "input_"),
}
"""How the metrics that answer each question begin; any other metric stands under `MORE`."""

_OF_THE_MODEL_ONLY: Final = frozenset(
    {LEARNING_RATE, "loss", "clip_coefficient", "batch_size", "update_norm", "temperature"}
    | {"lr_batch_ratio", "lr_batch_ratio_effective", "lr_curvature"}
    | {"smoothness", "smoothness_secant"}
    | {"microbatch_gradient_norm", "microbatches", "gradient_square", "gradient_variance"}
    | {"gradient_scale"}
    | {"noise_scale", "noise_scale_at_least", "noise_scale_curvature", "stall_ratio"}
    | {"gradient_curvature", "noise_curvature", "noise_floor", "noise_share"}
    | {"stationarity", "stationarity_recent", "stationarity_step_term", "stationarity_noise_term"}
    | {"dropout_variance", "dropout_variance_share", "dropout_variance_law"}
    | {"sharpness", "sharpness_variance", "sharpness_products", "preconditioned_sharpness"}
    | {"smallest_eigenvalue", "rayleigh_quotient", "batch_sharpness", "hessian_trace"}
    | {"stability_threshold", "stability_ratio", "noise_stability_ratio"}
    | {"covariance_trace", "covariance_top_eigenvalue", "covariance_ratio"}
    | {"input_mean_share", "input_mean_square", "input_top_eigenvalue"}
    | {"nonfinite_activation", "nonfinite_gradient", "nonfinite_parameter"}
)
_OF_LAYERS_ONLY: Final = frozenset(
    {"activation_norm", "activation_gain", "activation_gain_cumulative", "gain_log_variance"}
)
"""Metrics that would leave one of the two charts empty; any other one gets both."""


_BESIDE: Final[Mapping[str, tuple[str, ...]]] = {
    "stationarity": ("stationarity_step_term", "stationarity_noise_term"),
    "stationarity_recent": ("noise_floor",),
    "stability_ratio": ("noise_stability_ratio",),
}
"""Metrics that stand in the chart of another one: the parts that its bound is the sum of, or the
same for another reason."""

_THRESHOLD: Final = "stability_threshold"
"""Stands in the chart of the sharpness that the steps of the optimizer depend on. It takes the
place of the edges there, which are drawn only where a verdict is reached: not at the edge."""

_OF_SGD_ONLY: Final = frozenset({"sharpness_variance", "noise_stability_ratio"})
_IN_WORDS: Final = frozenset({"break_even_step"})
"""Metrics that are told as a text: their curve is a level line."""

_ALONG_CHAINS: Final = frozenset({"activation_gain_cumulative"})
"""Metrics that the last layer of a chain sums up, and so does its bound."""


def layout(run: RunInfo, tags: Tags, *, per_layer: bool, optimizer: str = "") -> Layout:
    """The whole page, as `SummaryWriter.add_custom_scalars` takes it.

    Args:
        run: its `metrics` get a chart each, those in `bounded` with their edges.
        tags: makes the tags of the run.
        per_layer: add a chart with the curves of all parameters, layers and blocks.
        optimizer: class name of the optimizer; "" if unknown.

    Returns:
        The charts of each question that has any.
    """
    page: Layout = {question: {} for question in (*QUESTIONS, MORE)}
    beside = _beside(run, optimizer)
    shown_beside = {item for owner in run.metrics for item in beside.get(owner, ())}
    for metric in dict.fromkeys((LEARNING_RATE, *run.metrics)):
        if metric in _IN_WORDS or _stays_empty(metric, run, optimizer):
            continue
        charts = page[_question(metric)]
        if metric not in _OF_LAYERS_ONLY | shown_beside:
            lines = _lines(metric, run, tags, beside.get(metric, ()))
            charts[metric] = ["Multiline", lines]
        if per_layer and metric not in _OF_THE_MODEL_ONLY:
            charts[f"{metric} per layer"] = ["Multiline", [_below(tags.group(metric))]]
        if per_layer and metric in _ALONG_CHAINS:
            for chain in run.model.chains:
                end, start = chain[-1].name, chain[0].name
                lines = [_exactly(tags.of(metric, end) + edge) for edge in ("", LOWER, UPPER)]
                charts[f"{metric} from {start} to {end}"] = ["Multiline", lines]
    return {question: charts for question, charts in page.items() if charts}


def _beside(run: RunInfo, optimizer: str) -> dict[str, tuple[str, ...]]:
    owner = "preconditioned_sharpness" if optimizer in PRECONDITIONED else "sharpness"
    found = {**_BESIDE, owner: (_THRESHOLD,)}
    return {
        metric: tuple(item for item in items if item in run.metrics)
        for metric, items in found.items()
    }


def _stays_empty(metric: str, run: RunInfo, optimizer: str) -> bool:
    if metric.startswith("dropout_"):
        return not run.model.dropouts
    if metric == "preconditioned_sharpness":
        return bool(optimizer) and optimizer not in PRECONDITIONED
    return metric in _OF_SGD_ONLY and optimizer not in {"", "SGD"}


def _lines(metric: str, run: RunInfo, tags: Tags, beside: Sequence[str]) -> list[str]:
    judged = metric in run.bounded and _THRESHOLD not in beside
    ends = ("", LOWER, UPPER) if judged else ("",)
    return [_exactly(tags.of(metric) + end) for end in ends] + [
        _exactly(tags.of(item)) for item in beside
    ]


def _question(metric: str) -> str:
    fitting = (question for question, starts in QUESTIONS.items() if metric.startswith(starts))
    return next(fitting, MORE)


def _exactly(tag: str) -> str:
    # TensorBoard matches at the start only: without the $, `loss` would catch `loss_scale`.
    return re.escape(tag) + "$"


def _below(group: str) -> str:
    # The edges of twenty layers would bury their values.
    return rf"{re.escape(group)}/.*(?<!{re.escape(LOWER)})(?<!{re.escape(UPPER)})$"

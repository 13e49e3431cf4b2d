"""The custom-scalars page: which curves stand in one chart, and under which question.

Every chart is a `Multiline`, never a `Margin`: TensorBoard draws a margin chart only where the
value and both of its edges have exactly the same steps, and shows an error in its place otherwise.
A value is measured more often than it is judged, and many bounds have one edge.
"""

import re
from collections.abc import Mapping
from typing import Final

from gradwatch.records import RunInfo
from gradwatch.tag import LEARNING_RATE, LOWER, UPPER, Tags

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
}
"""Metrics that stand in the chart of another one: the parts that its bound is the sum of."""

_ALONG_CHAINS: Final = frozenset({"activation_gain_cumulative"})
"""Metrics that the last layer of a chain sums up, and so does its bound."""


def layout(run: RunInfo, tags: Tags, *, per_layer: bool) -> Layout:
    """The whole page, as `SummaryWriter.add_custom_scalars` takes it.

    Args:
        run: its `metrics` get a chart each, those in `bounded` with their edges.
        tags: makes the tags of the run.
        per_layer: add a chart with the curves of all parameters, layers and blocks.

    Returns:
        The charts of each question that has any.
    """
    page: Layout = {question: {} for question in (*QUESTIONS, MORE)}
    shown_beside = {item for owner in run.metrics for item in _BESIDE.get(owner, ())}
    for metric in dict.fromkeys((LEARNING_RATE, *run.metrics)):
        if metric.startswith("dropout_") and not run.model.dropouts:
            continue  # the chart would stay empty
        charts = page[_question(metric)]
        if metric not in _OF_LAYERS_ONLY | shown_beside:
            charts[metric] = ["Multiline", _lines(metric, run, tags)]
        if per_layer and metric not in _OF_THE_MODEL_ONLY:
            charts[f"{metric} per layer"] = ["Multiline", [_below(tags.group(metric))]]
        if per_layer and metric in _ALONG_CHAINS:
            for chain in run.model.chains:
                end, start = chain[-1].name, chain[0].name
                lines = [_exactly(tags.of(metric, end) + edge) for edge in ("", LOWER, UPPER)]
                charts[f"{metric} from {start} to {end}"] = ["Multiline", lines]
    return {question: charts for question, charts in page.items() if charts}


def _lines(metric: str, run: RunInfo, tags: Tags) -> list[str]:
    ends = ("", LOWER, UPPER) if metric in run.bounded else ("",)
    beside = [item for item in _BESIDE.get(metric, ()) if item in run.metrics]
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

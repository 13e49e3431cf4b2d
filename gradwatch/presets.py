"""Ready-made lists of parts, to print, extend and slice."""

import os

from gradwatch.adapters import load_adapter
from gradwatch.bounds import (
    AllFinite,
    ChainNormPreservation,
    MinibatchEdge,
    NoiseFloor,
    NoiseStability,
    NormPreservation,
    RandomlyStoppedSgd,
    RatioLaw,
    StabilityThreshold,
    StableWidth,
    UnknownThreshold,
)
from gradwatch.errors import ConfigError, MissingExtraError
from gradwatch.interfaces import Bound, Monitor, Rule, Sink
from gradwatch.isolation import logger
from gradwatch.monitors import (
    ActivationNorm,
    BatchSharpness,
    DropoutNoise,
    EdgeOfStability,
    GradientCovariance,
    GradientNoise,
    GradientNorm,
    HessianTrace,
    InputStatistics,
    LossValue,
    LrBatchRatio,
    MicrobatchGradientNorm,
    NoiseCurvature,
    NonFinite,
    ParameterNorm,
    Sharpness,
    Smoothness,
    Stationarity,
    UpdateRatio,
)
from gradwatch.rules import (
    BatchSize,
    DataScale,
    Dropout,
    Initialisation,
    LearningRate,
    Momentum,
    Numerics,
    TrainingLength,
    Width,
)
from gradwatch.sinks import JsonlSink


def essentials() -> list[Monitor]:
    """The monitors that read gradients and settings only: no forward hooks on the layers.

    Returns:
        A new list of new monitors.

    Example:
        >>> [type(monitor).__name__ for monitor in essentials()]
        ['LossValue', 'GradientNorm', 'LrBatchRatio']
    """
    return [LossValue(), GradientNorm(), LrBatchRatio()]


def noise() -> list[Monitor]:
    """The monitors of the gradient's noise and of what it does: on steps, dropout and inputs.

    Those that run the model again do so within the budget of the watch.

    Returns:
        A new list of new monitors, each before those that use its values.
    """
    return [GradientNoise(), Smoothness(), Stationarity(), DropoutNoise(), InputStatistics()]


def curvature() -> list[Monitor]:
    """The monitors of the loss's curvature and of what the optimizer can stand of it.

    They run the model again, within the budget of the watch.

    Returns:
        A new list of new monitors, each before those that use its values.
    """
    return [Sharpness(), BatchSharpness(), EdgeOfStability()]


def standard() -> list[Monitor]:
    """The default monitors.

    Those of `essentials`, of `noise` and of `curvature`, parameters, updates, activations,
    non-finite values.

    Returns:
        A new list of new monitors, each before those that use its values.
    """
    return [
        LossValue(),
        GradientNorm(),
        *curvature(),
        *noise(),
        LrBatchRatio(),
        ParameterNorm(),
        UpdateRatio(),
        ActivationNorm(),
        NonFinite(),
    ]


def full() -> list[Monitor]:
    """All monitors: `standard`, and those that cost more.

    Returns:
        A new list of new monitors.
    """
    return [
        *standard(),
        NoiseCurvature(),
        HessianTrace(),
        GradientCovariance(),
        MicrobatchGradientNorm(),
    ]


def bounds() -> list[Bound]:
    """All bounds.

    Returns:
        A new list of new bounds.
    """
    return [
        AllFinite("nonfinite_activation"),
        AllFinite("nonfinite_gradient"),
        AllFinite("nonfinite_parameter"),
        NormPreservation(),
        ChainNormPreservation(),
        StableWidth(),
        RandomlyStoppedSgd(),
        NoiseFloor(),
        RatioLaw(),
        StabilityThreshold(),
        UnknownThreshold(),
        NoiseStability(),
        MinibatchEdge(),
    ]


def rules() -> list[Rule]:
    """All rules.

    Returns:
        A new list of new rules.
    """
    return [
        Numerics(),
        Initialisation(),
        Width(),
        LearningRate(),
        Momentum(),
        BatchSize(),
        TrainingLength(),
        Dropout(),
        DataScale(),
    ]


def files(logdir: str | os.PathLike[str] | None, tag_prefix: str = "gradwatch") -> list[Sink]:
    """The sinks of a folder: the record of the run and, where installed, TensorBoard.

    Args:
        logdir: the folder; None for no files.
        tag_prefix: first part of the TensorBoard tags.

    Returns:
        A new list of new sinks.

    Raises:
        ConfigError: if `logdir` is no path.
        RecordError: if the folder cannot be written.
    """
    if logdir is None:
        return []
    if not isinstance(logdir, (str, os.PathLike)) or not os.fspath(logdir):
        raise ConfigError(f"logdir must be a folder or None, got {logdir!r}")
    sinks: list[Sink] = [JsonlSink(logdir)]
    try:
        adapter = load_adapter(
            "gradwatch_tensorboard", feature="the TensorBoard page", extra="tensorboard"
        )
        sinks.append(adapter.TensorBoardSink(logdir, tag_prefix=tag_prefix))
    except MissingExtraError as missing:
        logger.info("%s; the run is recorded in %s without it", missing, logdir)
    return sinks

"""gradwatch watches a PyTorch training, compares it with theory and explains its advice.

    watch = gradwatch.watch(model, optimizer, logdir="runs/first")

and nothing else changes in the loop.
"""

from gradwatch import plan, presets
from gradwatch.capture.probe.view import ProbeView
from gradwatch.capture.view import NamedValues, StepView
from gradwatch.errors import (
    AdviceError,
    AttachError,
    ClosedError,
    ConfigError,
    GradwatchError,
    GradwatchWarning,
    MissingExtraError,
    RecordError,
)
from gradwatch.interfaces import Bound, Monitor, Rule, Sink
from gradwatch.numerics.reading import Reading
from gradwatch.records import (
    DropoutInfo,
    History,
    Interval,
    LayerInfo,
    Measurement,
    ModelInfo,
    ProbeUse,
    Recommendation,
    Report,
    RunInfo,
    StepInfo,
    Verdict,
)
from gradwatch.run_record import Run, read
from gradwatch.sinks import ConsoleSink, JsonlSink, MemorySink
from gradwatch.spectrum import SpectralDensity, spectral_density
from gradwatch.watch import Watch, watch

__all__ = [
    "AdviceError",
    "AttachError",
    "Bound",
    "ClosedError",
    "ConfigError",
    "ConsoleSink",
    "DropoutInfo",
    "GradwatchError",
    "GradwatchWarning",
    "History",
    "Interval",
    "JsonlSink",
    "LayerInfo",
    "Measurement",
    "MemorySink",
    "MissingExtraError",
    "ModelInfo",
    "Monitor",
    "NamedValues",
    "ProbeUse",
    "ProbeView",
    "Reading",
    "Recommendation",
    "RecordError",
    "Report",
    "Rule",
    "Run",
    "RunInfo",
    "Sink",
    "SpectralDensity",
    "StepInfo",
    "StepView",
    "Verdict",
    "Watch",
    "plan",
    "presets",
    "read",
    "spectral_density",
    "watch",
]

"""What travels between the parts of gradwatch: immutable records of plain Python values.

Units are written with [L] for the loss, [P] for a parameter and [A] for an activation: a
gradient is in L/P, a curvature in L/P², a learning rate in P²/L, so that learning rate x
curvature is a pure number, written "1".
"""

from gradwatch.records.advice import KNOBS, SEVERITIES, Knob, Recommendation, Severity
from gradwatch.records.judgement import MODEL, Interval, Kind, Measurement, Status, Verdict
from gradwatch.records.model import DropoutInfo, LayerInfo, ModelInfo
from gradwatch.records.probe_use import ProbeUse
from gradwatch.records.report import History, Report, RunInfo
from gradwatch.records.step import StepInfo

__all__ = [
    "KNOBS",
    "MODEL",
    "SEVERITIES",
    "DropoutInfo",
    "History",
    "Interval",
    "Kind",
    "Knob",
    "LayerInfo",
    "Measurement",
    "ModelInfo",
    "ProbeUse",
    "Recommendation",
    "Report",
    "RunInfo",
    "Severity",
    "Status",
    "StepInfo",
    "Verdict",
]

"""One theorem or criterion a file: what should the value be?"""

from gradwatch.bounds.all_finite import AllFinite
from gradwatch.bounds.minibatch_edge import MinibatchEdge
from gradwatch.bounds.noise_floor import NoiseFloor
from gradwatch.bounds.noise_stability import NoiseStability
from gradwatch.bounds.norm_preservation import (
    ChainNormPreservation,
    NormPreservation,
    StableWidth,
)
from gradwatch.bounds.randomly_stopped_sgd import RandomlyStoppedSgd
from gradwatch.bounds.ratio_law import RatioLaw
from gradwatch.bounds.stability_threshold import StabilityThreshold
from gradwatch.bounds.unknown_threshold import UnknownThreshold

__all__ = [
    "AllFinite",
    "ChainNormPreservation",
    "MinibatchEdge",
    "NoiseFloor",
    "NoiseStability",
    "NormPreservation",
    "RandomlyStoppedSgd",
    "RatioLaw",
    "StabilityThreshold",
    "StableWidth",
    "UnknownThreshold",
]

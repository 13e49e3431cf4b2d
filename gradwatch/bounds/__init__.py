"""One theorem or criterion a file: what should the value be?"""

from gradwatch.bounds.all_finite import AllFinite
from gradwatch.bounds.noise_floor import NoiseFloor
from gradwatch.bounds.norm_preservation import (
    ChainNormPreservation,
    NormPreservation,
    StableWidth,
)
from gradwatch.bounds.randomly_stopped_sgd import RandomlyStoppedSgd
from gradwatch.bounds.ratio_law import RatioLaw

__all__ = [
    "AllFinite",
    "ChainNormPreservation",
    "NoiseFloor",
    "NormPreservation",
    "RandomlyStoppedSgd",
    "RatioLaw",
    "StableWidth",
]

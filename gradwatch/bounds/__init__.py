"""One theorem or criterion a file: what should the value be?"""

from gradwatch.bounds.all_finite import AllFinite
from gradwatch.bounds.norm_preservation import (
    ChainNormPreservation,
    NormPreservation,
    StableWidth,
)

__all__ = ["AllFinite", "ChainNormPreservation", "NormPreservation", "StableWidth"]

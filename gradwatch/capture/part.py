"""The parts of the capture that can fail by themselves, as the user reads them."""

from typing import Final

CAPTURE: Final = "capture"
"""The whole of it: without it nothing is measured."""

REPORT: Final = "report"
"""What is done with a sample."""

RANKS: Final = "exchange between ranks"
"""What combines the values of several processes."""

LAYERS: Final = "layer hooks"
STRUCTURE: Final = "structure hooks"
INPUT: Final = "input hook"
OUTPUT: Final = "output hook"
MICROBATCHES: Final = "micro-batch norms"

OF_ALL_RANKS: Final = (CAPTURE, REPORT, LAYERS, STRUCTURE, INPUT, OUTPUT, MICROBATCHES)
"""Those that are switched off on all ranks if one of them fails on one."""

"""One knob a file: what should the user do?"""

from gradwatch.rules.initialisation import Initialisation
from gradwatch.rules.numerics import Numerics
from gradwatch.rules.width import Width

__all__ = ["Initialisation", "Numerics", "Width"]

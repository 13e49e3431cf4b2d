"""One knob a file: what should the user do?"""

from gradwatch.rules.batch_size import BatchSize
from gradwatch.rules.data_scale import DataScale
from gradwatch.rules.dropout import Dropout
from gradwatch.rules.initialisation import Initialisation
from gradwatch.rules.learning_rate import LearningRate
from gradwatch.rules.momentum import Momentum
from gradwatch.rules.numerics import Numerics
from gradwatch.rules.reliability import Reliability
from gradwatch.rules.training_length import TrainingLength
from gradwatch.rules.width import Width

__all__ = [
    "BatchSize",
    "DataScale",
    "Dropout",
    "Initialisation",
    "LearningRate",
    "Momentum",
    "Numerics",
    "Reliability",
    "TrainingLength",
    "Width",
]

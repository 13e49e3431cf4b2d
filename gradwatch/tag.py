"""The names under which values stand in TensorBoard and in every logger; users rely on them.

| tag                          | what                                                        |
|------------------------------|-------------------------------------------------------------|
| `gradwatch/<metric>`         | a value of the whole model                                  |
| `gradwatch/learning_rate`    | the largest learning rate of any parameter group            |
| `gradwatch_<metric>/<scope>` | a value of one parameter, layer or block                    |
| `<either>.lower`, `.upper`   | where theory says that the value lies, as far as it decides |
| `gradwatch_advice/<knob>`    | 0 nothing to do, 1 advice, 2 warning                        |
| `gradwatch/recommendations`  | text: what to change, and why                               |
| `gradwatch/not_measured`     | text: what could not be measured, and why                   |
| `gradwatch/break_even`       | text: when the steps came to their edge of stability        |

TensorBoard groups tags by what stands before the first slash.
"""

import re
from dataclasses import dataclass
from typing import Final

from gradwatch.records import MODEL

LOWER: Final = ".lower"
UPPER: Final = ".upper"
LEARNING_RATE: Final = "learning_rate"
"""A setting that is drawn like a metric."""

_UNUSUAL: Final = re.compile(r"[^A-Za-z0-9_./-]")


def readable(name: str) -> str:
    """A name with `_` for each character that some dashboard refuses.

    Args:
        name: of a metric, a scope or a knob.

    Returns:
        The name as it stands in a tag.

    Example:
        >>> readable("blocks.0.attn (q)")
        'blocks.0.attn__q_'
    """
    return _UNUSUAL.sub("_", name) or "_"


@dataclass(frozen=True, slots=True)
class Tags:
    """Makes the tags of one run.

    Attributes:
        prefix: what all of them begin with.

    Example:
        >>> tags = Tags("gradwatch")
        >>> tags.of("loss"), tags.of("gradient_norm", "fc.weight"), tags.advice("clip")
        ('gradwatch/loss', 'gradwatch_gradient_norm/fc.weight', 'gradwatch_advice/clip')
    """

    prefix: str

    def of(self, metric: str, scope: str = MODEL) -> str:
        """The tag of a value.

        Args:
            metric: its metric.
            scope: a parameter, a layer, a block, or "model".

        Returns:
            The tag.
        """
        if scope == MODEL:
            return f"{self.prefix}/{readable(metric)}"
        return f"{self.group(metric)}/{readable(scope)}"

    def group(self, metric: str) -> str:
        """What the tags of a metric's parameters, layers and blocks have before the slash."""
        return f"{self.prefix}_{readable(metric)}"

    def advice(self, knob: str) -> str:
        """The tag of what is advised about a knob."""
        return f"{self.prefix}_advice/{readable(knob)}"

    @property
    def recommendations(self) -> str:
        """The tag of the recommendations in words."""
        return f"{self.prefix}/recommendations"

    @property
    def not_measured(self) -> str:
        """The tag of what could not be measured."""
        return f"{self.prefix}/not_measured"

    @property
    def break_even(self) -> str:
        """The tag of when the steps came to their edge of stability, in words."""
        return f"{self.prefix}/break_even"

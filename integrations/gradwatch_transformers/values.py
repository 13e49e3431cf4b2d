"""What the reports say, kept until the Trainer logs."""

from typing import Any

from typing_extensions import override

from gradwatch import Report, RunInfo, Sink, markdown
from gradwatch.curve import Curves, by_step


class NewestValues(Sink):
    """Keeps the newest value of each curve until it is taken.

    Args:
        tag_prefix: what all names begin with.
        per_layer: also what is about single parameters, layers and blocks.

    Attributes:
        values: by name, of the reports since `take`.
    """

    def __init__(self, tag_prefix: str, *, per_layer: bool) -> None:
        self._tag_prefix = tag_prefix
        self._per_layer = per_layer
        self._curves = Curves(tag_prefix, per_layer=per_layer)
        self.values: dict[str, float] = {}
        self._texts: dict[str, str] = {}
        self._told: dict[str, str] = {}

    @override
    def open(self, run: RunInfo) -> None:
        self._curves = Curves(self._tag_prefix, per_layer=self._per_layer, advised=run.advised)
        self._texts = {}

    @override
    def write(self, report: Report) -> None:
        for values in by_step(self._curves.points(report)).values():
            self.values |= values
        self._texts |= markdown.texts(report, self._curves.tags)

    def take(self) -> dict[str, float]:
        """The values of the reports since the last call.

        Returns:
            A flat dictionary of Python floats.
        """
        taken, self.values = self.values, {}
        return taken

    def take_texts(self) -> dict[str, str]:
        """What the reports say in words, where it has changed.

        Returns:
            Markdown by name.
        """
        changed = {tag: text for tag, text in self._texts.items() if self._told.get(tag) != text}
        self._told |= changed
        return changed

    def state_dict(self) -> dict[str, Any]:
        """The values that nobody has taken yet."""
        return dict(self.values)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` returned."""
        self.values = {str(name): float(value) for name, value in state.items()}

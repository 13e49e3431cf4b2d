"""Reports for the loggers of a Trainer."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any, Final

from typing_extensions import override

from gradwatch.adapters import load_adapter
from gradwatch.curve import Curves, by_step
from gradwatch.errors import MissingExtraError
from gradwatch.interfaces import Sink
from gradwatch.isolation import logger as log
from gradwatch.options import Options
from gradwatch.records import Report, RunInfo
from gradwatch.tag import readable
from gradwatch_lightning.advice import AdviceLog, MlflowAdvice, WandbAdvice
from gradwatch_lightning.axis import Axis
from gradwatch_lightning.trainer_facts import is_a

AT_ONCE: Final = 1000
"""Values that MLflow takes in one call."""

_WRITES_TEXT: Final[dict[str, Callable[[Any], Sink]]] = {
    "WandbLogger": WandbAdvice,
    "MLFlowLogger": MlflowAdvice,
}


class LoggerSink(Sink):
    """Tells one logger, in its own words and on Lightning's x-axis.

    Args:
        logger: of Lightning.
        axis: where the steps stand.
        may_speak: False while the steps that are taken do not belong to the training.
        tag_prefix: what all tags begin with.
        per_layer: also what is about single parameters, layers and blocks.
    """

    def __init__(
        self,
        logger: Any,
        axis: Axis,
        may_speak: Callable[[], bool],
        *,
        tag_prefix: str,
        per_layer: bool,
    ) -> None:
        self._logger = logger
        self._axis = axis
        self._may_speak = may_speak
        self._tag_prefix = readable(tag_prefix)
        self._per_layer = per_layer

    @override
    def write(self, report: Report) -> None:
        if self._may_speak():
            self._draw(self._axis.moved(report))

    @abstractmethod
    def _draw(self, report: Report) -> None:
        """Hands a report to the logger, its steps being those of Lightning."""


class ScalarSink(LoggerSink):
    """Gives any logger one flat dictionary of Python floats a step."""

    @override
    def open(self, run: RunInfo) -> None:
        self._curves = Curves(self._tag_prefix, per_layer=self._per_layer, advised=run.advised)

    @override
    def _draw(self, report: Report) -> None:
        for step, row in by_step(self._curves.points(report)).items():
            values = iter(row.items())
            while part := dict(islice(values, AT_ONCE)):
                self._logger.log_metrics(part, step=step)


class PageSink(LoggerSink):
    """Draws the whole TensorBoard page, with text and layout, into the logger's own files."""

    @override
    def open(self, run: RunInfo) -> None:
        adapter = _tensorboard()
        self._page: Sink = adapter.TensorBoardSink(
            writer=self._logger.experiment,
            tag_prefix=self._tag_prefix,
            per_layer=self._per_layer,
        )
        self._page.open(run)

    @override
    def _draw(self, report: Report) -> None:
        self._page.write(report)


def logger_sinks(
    loggers: Sequence[Any], axis: Axis, may_speak: Callable[[], bool], options: Options
) -> list[Sink]:
    """What tells the loggers of a Trainer, one sink each so that one that fails stands alone.

    Args:
        loggers: `trainer.loggers`.
        axis: where the steps stand.
        may_speak: False while the steps that are taken do not belong to the training.
        options: of the callback.

    Returns:
        New sinks; if no logger shows text, recommendations go to the log of Python.
    """
    sinks: list[Sink] = []
    for logger in loggers:
        page = draws_page(logger)
        per_layer = page if options.per_layer is None else options.per_layer
        kind = PageSink if page else ScalarSink
        prefix = options.tag_prefix
        sinks.append(kind(logger, axis, may_speak, tag_prefix=prefix, per_layer=per_layer))
        sinks += [make(logger) for name, make in _WRITES_TEXT.items() if is_a(logger, name)]
    told_in_words = any(not isinstance(sink, ScalarSink) for sink in sinks)
    return sinks if told_in_words else [*sinks, AdviceLog()]


def draws_page(logger: Any) -> bool:
    """Whether a logger is one of TensorBoard and the page can be drawn into it.

    Args:
        logger: of Lightning.

    Returns:
        False also if tensorboard is not installed, as with tensorboardX.
    """
    if not is_a(logger, "TensorBoardLogger"):
        return False
    try:
        _tensorboard()
    except MissingExtraError as missing:
        log.info("%s; its values are drawn without it", missing)
        return False
    return True


def _tensorboard() -> Any:
    return load_adapter(
        "gradwatch_tensorboard", feature="the TensorBoard page", extra="tensorboard"
    )

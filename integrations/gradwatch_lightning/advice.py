"""Recommendations in words, where a logger or the log of Python shows them."""

import logging
from abc import abstractmethod
from typing import Any, Final

from typing_extensions import override

from gradwatch import markdown
from gradwatch.interfaces import Sink
from gradwatch.isolation import logger as log
from gradwatch.records import Recommendation, Report

_LEVELS: Final = {"info": logging.INFO, "advice": logging.WARNING, "warning": logging.WARNING}
_COLUMNS: Final = ("severity", "knob", "scope", "change", "reason", "expected", "source")


class AdviceSink(Sink):
    """Speaks when the recommendations have changed.

    Args:
        logger: of Lightning.
    """

    def __init__(self, logger: Any) -> None:
        self._logger = logger
        self._said: tuple[Recommendation, ...] = ()

    @override
    def write(self, report: Report) -> None:
        if report.recommendations != self._said:
            self._said = report.recommendations
            self._say(report.recommendations)

    @abstractmethod
    def _say(self, items: tuple[Recommendation, ...]) -> None:
        """Shows all that stand now."""


class WandbAdvice(AdviceSink):
    """A table in Weights & Biases, named `gradwatch/recommendations`."""

    @override
    def _say(self, items: tuple[Recommendation, ...]) -> None:
        rows = [[str(getattr(item, column)) for column in _COLUMNS] for item in items]
        self._logger.log_text("gradwatch/recommendations", columns=list(_COLUMNS), data=rows)


class MlflowAdvice(AdviceSink):
    """The artifact `gradwatch/recommendations.md` of the MLflow run."""

    @override
    def _say(self, items: tuple[Recommendation, ...]) -> None:
        text = markdown.recommendations(items)
        client, run = self._logger.experiment, self._logger.run_id
        client.log_text(run, text, "gradwatch/recommendations.md")


class AdviceLog(Sink):
    """The log of Python: each recommendation once, and again if its severity changes."""

    def __init__(self) -> None:
        self._said: set[tuple[str, str, str]] = set()

    @override
    def write(self, report: Report) -> None:
        for item in report.recommendations:
            key = (item.knob, item.scope, item.severity)
            if key not in self._said:
                self._said.add(key)
                log.log(
                    _LEVELS[item.severity],
                    "%s: %s of %s: %s. %s",
                    item.severity,
                    item.knob,
                    item.scope,
                    item.change,
                    item.reason,
                )

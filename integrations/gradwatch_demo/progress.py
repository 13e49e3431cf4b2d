"""The progress bar, with the headline values of each report."""

from collections.abc import Iterable
from typing import Any

from tqdm import tqdm
from typing_extensions import override

from gradwatch import Report, Sink


class ProgressSink(Sink):
    """Shows loss, gradient norm and the most severe advice beside a progress bar.

    A sink of one's own needs no more than this.

    Args:
        bar: the progress bar.
    """

    def __init__(self, bar: "tqdm[Any]") -> None:
        self._bar = bar

    @override
    def write(self, report: Report) -> None:
        self._bar.set_postfix_str(headline(report))


def headline(report: Report) -> str:
    """The most telling values of a report in a few characters.

    Args:
        report: the report.

    Returns:
        As in "loss 2.303, gradient norm 0.0961, advice: init (warning)".
    """
    named = {"loss": report.value("loss"), "gradient norm": report.value("gradient_norm")}
    values = [f"{name} {value:.3g}" for name, value in named.items() if value is not None]
    advice = [f"{item.knob} ({item.severity})" for item in report.recommendations[:1]]
    return ", ".join([*values, f"advice: {advice[0] if advice else 'none'}"])


def progress(items: Iterable[Any], *, total: int, title: str) -> "tqdm[Any]":
    """A progress bar over something, on standard error; silent where that is no terminal.

    Args:
        items: what to go through.
        total: how many they are.
        title: what stands before the bar.

    Returns:
        The bar, to be iterated over.
    """
    return tqdm(items, total=total, desc=title, unit="step", disable=None, dynamic_ncols=True)

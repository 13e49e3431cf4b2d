"""The sink that feeds TensorBoard."""

import importlib
import os
from pathlib import Path
from typing import Any, Final, Protocol

from typing_extensions import override

from gradwatch import markdown
from gradwatch.curve import Curves
from gradwatch.errors import ConfigError, MissingExtraError, RecordError
from gradwatch.interfaces import Sink
from gradwatch.records import Report, RunInfo
from gradwatch.tag import readable
from gradwatch_tensorboard.layout import layout
from gradwatch_tensorboard.point import draw_singly, draw_together

_FILE_SUFFIX: Final = ".gradwatch"
_ELSEWHERE: Final = "://"  # in addresses like s3://bucket/run, which tensorboard opens itself
_METHODS: Final = ("add_scalar", "add_text", "flush")


class Writer(Protocol):
    """What a writer must do; the `SummaryWriter` of torch and that of tensorboardX do it.

    If it also has `add_custom_scalars`, it gets the layout of the page.
    """

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any:
        """Draws a point."""

    def add_text(self, tag: str, text_string: str, global_step: int) -> Any:
        """Shows Markdown."""

    def flush(self) -> Any:
        """Hands everything to the operating system."""


class TensorBoardSink(Sink):
    """Draws measured values with their bounds, and the advice in words and as curves.

    The tags are listed in `gradwatch.tag`. Values and learning rates stand at the
    step they belong to; the edges of a bound stand beside the value it judged, if it came to
    "holds" or "violated". Each report can be seen at once.

    A run in a folder where gradwatch has drawn before hides the old points from its own first
    step on. TensorBoard hides the older points of other programs in that folder with them, so
    share their writer if they draw into the same folder.

    Args:
        logdir: folder of the event files; not needed with `writer`.
        tag_prefix: what all tags begin with.
        per_layer: also draw the values of single parameters, layers and blocks.
        writer: draw with this writer, which stays open at the end, instead of an own one. Its
            custom-scalars layout is replaced.

    Raises:
        MissingExtraError: if an own writer is needed and tensorboard is not installed.
        ConfigError: if neither `logdir` nor `writer` is given, `writer` lacks a method, or
            `tag_prefix` is empty.
        RecordError: if `logdir` is not a folder and cannot be made one.
    """

    def __init__(
        self,
        logdir: str | os.PathLike[str] | None = None,
        *,
        tag_prefix: str = "gradwatch",
        per_layer: bool = True,
        writer: Writer | None = None,
    ) -> None:
        if not tag_prefix:
            raise ConfigError('tag_prefix must not be empty, got ""; the default is "gradwatch"')
        if writer is None:
            _check_logdir(logdir)
        else:
            _check_writer(writer)
        self._logdir = os.fspath(logdir or "")
        self._given = writer
        self._writer: Writer | None = None
        self._tag_prefix = readable(tag_prefix)
        self._per_layer = per_layer
        self._curves = Curves(self._tag_prefix)
        self._texts: dict[str, str] = {}
        self._page_of: RunInfo | None = None

    @override
    def open(self, run: RunInfo) -> None:
        self.close()
        self._curves = Curves(self._tag_prefix, per_layer=self._per_layer, advised=run.advised)
        # That nothing is missing is no news at the start; that nothing is advised is.
        self._texts = {self._curves.tags.not_measured: markdown.notes(())}
        writer = self._given
        if writer is None:
            writer = _own_writer(self._logdir, run.first_step)
        self._writer = writer
        self._page_of = run if hasattr(writer, "add_custom_scalars") else None

    @override
    def write(self, report: Report) -> None:
        writer = self._writer
        if writer is None:
            raise RecordError("TensorBoardSink got a report while it was closed; call open(run)")
        self._lay_out(writer, report)
        values = self._curves.points(report)
        if self._given is None:
            draw_together(writer, values)
        else:
            draw_singly(writer, values)
        for tag, said in self._changed_texts(report).items():
            writer.add_text(tag, said, report.step)
        writer.flush()

    @override
    def close(self) -> None:
        writer, self._writer = self._writer, None
        if self._given is None and writer is not None:
            writer.close()  # type: ignore[attr-defined]  # an own writer has it

    def _lay_out(self, writer: Any, report: Report) -> None:
        # Once only: a second layout would take the place of the first. Not before the first
        # report, which knows the optimizer.
        run, self._page_of = self._page_of, None
        if run is not None:
            page = layout(
                run, self._curves.tags, per_layer=self._per_layer, optimizer=report.info.optimizer
            )
            writer.add_custom_scalars(page)

    def _changed_texts(self, report: Report) -> dict[str, str]:
        now = markdown.texts(report, self._curves.tags)
        changed = {tag: said for tag, said in now.items() if self._texts.get(tag) != said}
        self._texts |= changed
        return changed


def _check_writer(writer: Writer) -> None:
    missing = [name for name in _METHODS if not hasattr(writer, name)]
    if missing:
        raise ConfigError(
            f"writer must have {', '.join(_METHODS)}, got a {type(writer).__name__} without "
            f"{', '.join(missing)}; give a SummaryWriter"
        )


def _check_logdir(logdir: str | os.PathLike[str] | None) -> None:
    if logdir is None:
        raise ConfigError("logdir must be a folder, got None; give it, or a writer")
    try:
        importlib.import_module("torch.utils.tensorboard")
    except ImportError as error:
        raise MissingExtraError("TensorBoardSink", "tensorboard", error) from error
    if _ELSEWHERE in os.fspath(logdir):
        return
    try:
        Path(logdir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecordError(
            f"logdir must be a folder, got {logdir} ({error.strerror}); give another one"
        ) from error


def _own_writer(logdir: str, first_step: int) -> Writer:
    # Imported late: tensorboard is an extra.
    from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415

    # Only our own old files count: purging would hide the curves of others, too.
    drawn_before = _ELSEWHERE in logdir or any(Path(logdir).glob(f"*tfevents*{_FILE_SUFFIX}"))
    return SummaryWriter(
        logdir,
        purge_step=first_step if drawn_before else None,
        filename_suffix=_FILE_SUFFIX,
    )

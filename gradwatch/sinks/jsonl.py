"""The record of a run as a file of JSON lines."""

import os
from pathlib import Path
from typing import BinaryIO

from typing_extensions import override

from gradwatch.errors import RecordError
from gradwatch.interfaces import Sink
from gradwatch.records import Report, RunInfo
from gradwatch.run_record import FILE_NAME, header_line, report_line


class JsonlSink(Sink):
    """Appends each report to `logdir/gradwatch.jsonl`, where `run_record.read` finds it.

    Each line is handed to the operating system at once, so a killed training loses at most
    half a line. A failing power supply may take more: nothing waits for the disk.

    Args:
        logdir: the folder; it is made if it is not there. A run that is already recorded in it
            stays in the file, superseded from the first step of the new one on.

    Raises:
        RecordError: if the file cannot be written.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as logdir:
        ...     JsonlSink(logdir).path.name
        'gradwatch.jsonl'
    """

    def __init__(self, logdir: str | os.PathLike[str]) -> None:
        self.path = Path(logdir) / FILE_NAME
        self._file: BinaryIO | None = None
        _check(self.path)

    @override
    def open(self, run: RunInfo) -> None:
        self.close()
        try:
            self._file = self.path.open("a+b")
        except OSError as error:
            raise _cannot_write(self.path, error) from error
        # A killed run may have left half a line: it must not swallow the header.
        start = "\n" if _ends_in_half_a_line(self._file) else ""
        self._append(start + header_line(run))

    @override
    def write(self, report: Report) -> None:
        self._append(report_line(report))

    @override
    def close(self) -> None:
        file, self._file = self._file, None
        if file is None:
            return
        try:
            file.close()
        except OSError as error:
            raise _cannot_write(self.path, error) from error

    def _append(self, line: str) -> None:
        if self._file is None:
            raise RecordError(
                f"JsonlSink got a report while {self.path} was closed; call open(run)"
            )
        try:
            self._file.write(line.encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise _cannot_write(self.path, error) from error


def _check(path: Path) -> None:
    # Tries now what `open` will do later, and leaves no file behind.
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not path.exists()
        with path.open("ab"):
            pass
        if is_new:
            path.unlink(missing_ok=True)  # other ranks may be trying the same
    except OSError as error:
        raise _cannot_write(path, error) from error


def _cannot_write(path: Path, error: OSError) -> RecordError:
    return RecordError(f"cannot write {path}: {error.strerror}; give a logdir that can be written")


def _ends_in_half_a_line(file: BinaryIO) -> bool:
    if file.seek(0, os.SEEK_END) == 0:
        return False
    file.seek(-1, os.SEEK_END)
    return file.read(1) != b"\n"

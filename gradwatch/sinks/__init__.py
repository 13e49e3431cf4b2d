"""Who is told: a list in memory, a terminal, a file.

`MemorySink` keeps the reports for tests and notebooks, `ConsoleSink` writes a line a report,
`JsonlSink` writes the record that `gradwatch.run_record.read` reads back.
"""

from gradwatch.sinks.console import ConsoleSink
from gradwatch.sinks.jsonl import JsonlSink
from gradwatch.sinks.memory import MemorySink

__all__ = ["ConsoleSink", "JsonlSink", "MemorySink"]

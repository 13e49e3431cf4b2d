"""How long probes take, on the host or on a device, without waiting for either."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Stopwatch:
    """Adds up the seconds that named pieces of work take.

    On a device that works behind the host's back, events are put around the work; what is not
    finished when the sums are read counts next time.

    Args:
        device: where the work is done.
        now: the host's clock in seconds.
    """

    def __init__(self, device: torch.device, now: Callable[[], float] = time.perf_counter) -> None:
        self._events = device.type == "cuda"
        self._now = now
        self._begin = now()
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._running: list[tuple[str, Any, Any]] = []

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        """Measures what is done inside.

        Args:
            name: of the work.

        Yields:
            Nothing.
        """
        before, start = self._now(), self._event()
        try:
            yield
        finally:
            if start is None:
                self._seconds[name] += self._now() - before
            else:
                self._running.append((name, start, self._event()))

    @property
    def elapsed(self) -> float:
        """Seconds since this was made."""
        return self._now() - self._begin

    def seconds(self) -> dict[str, float]:
        """The sums so far, by name; does not wait."""
        finished = [item for item in self._running if item[2].query()]
        self._running = [item for item in self._running if item not in finished]
        for name, start, end in finished:
            self._seconds[name] += start.elapsed_time(end) / 1000
        return dict(self._seconds)

    def _event(self) -> Any:
        if not self._events:
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

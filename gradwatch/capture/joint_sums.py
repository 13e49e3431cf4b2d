"""Sums over the ranks in the middle of a probe, as many on each rank whatever happens there."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from typing import Final

import torch
from torch import Tensor

from gradwatch.errors import GradwatchError

CHUNK: Final = 2**20
"""Entries that are added up at a time: what is there for it from the start can never be missing."""

adding_up: Final = ContextVar("adding_up", default=False)
"""Set while the watch itself communicates within a probe."""


class JointSumError(GradwatchError):
    """A probe asked for another sum over the ranks than was agreed."""


class JointSums:
    """Adds up vectors of the ranks that probe together, in a series that was agreed before.

    A rank on which something fails takes part in the rest of the series with zeros and says so, and
    the others get NaN: nobody waits for ever, and nobody has to read a number on the host.

    Args:
        add_up: sums a tensor over the ranks, in place.
        ranks: their number.
        device: where the parameters are.

    Attributes:
        ranks: their number.
        share: gives the weight of a tensor's part on this rank in a sum over all ranks.
    """

    def __init__(
        self,
        add_up: Callable[[Tensor], Tensor],
        ranks: int,
        share: Callable[[Tensor], float],
        device: torch.device,
    ) -> None:
        self.ranks = ranks
        self.share = share
        self._add_up = add_up
        self._buffer = torch.zeros(CHUNK + 1, device=device)
        self._left: deque[int] = deque()
        self._failed = False

    def begin(self, lengths: Iterable[int]) -> None:
        """Begins a series; the same on all ranks.

        Args:
            lengths: number of entries of each sum.
        """
        self._left = deque(lengths)
        self._failed = False

    def sum(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """The next sum of the series.

        Args:
            parts: the tensors of this rank, of the shapes that they have on all ranks.

        Returns:
            The sums, NaN if a rank has failed.

        Raises:
            JointSumError: if it is not the one that was agreed; nothing has been added up then.
        """
        parts = [item.detach().contiguous() for item in parts]
        found = [item.new_empty(item.shape) for item in parts]
        length = sum(item.numel() for item in parts)
        if not self._left or self._left[0] != length:
            raise JointSumError(
                f"a probe on several ranks wants a sum of {length} entries, and "
                f"{self._left[0] if self._left else 'none'} was agreed; it must take as many sums "
                "as its joint_sums() says"
            )
        self._left.popleft()
        failures = self._run(length, parts, found)
        spoiled = torch.where(failures > 0, torch.nan, 0.0)
        return [item.add_(spoiled.to(item.dtype)) for item in found]

    def finish(self) -> None:
        """Takes part in what is left of the series, if a probe has ended before its time."""
        self._failed = bool(self._left)
        while self._left:
            self._run(self._left.popleft(), [], [])

    @torch.no_grad()
    def _run(self, length: int, parts: Sequence[Tensor], found: Sequence[Tensor]) -> Tensor:
        """Adds up chunk by chunk.

        Args:
            length: number of entries.
            parts: what to add; nothing for zeros.
            found: where to put the sums; nothing to leave them.

        Returns:
            () number of ranks that have failed.
        """
        failures = self._buffer.new_zeros(())
        token = adding_up.set(True)
        try:
            for start in range(0, length, CHUNK):
                size = min(CHUNK, length - start)
                chunk = self._buffer[: size + 1]
                chunk.zero_()
                for piece, place in _overlaps(parts, start, size):
                    chunk[place].copy_(piece)
                chunk[size].fill_(float(self._failed))
                self._add_up(chunk)
                for piece, place in _overlaps(found, start, size):
                    piece.copy_(chunk[place])
                failures += chunk[size]
        finally:
            adding_up.reset(token)
        return failures


def _overlaps(tensors: Sequence[Tensor], start: int, size: int) -> Iterator[tuple[Tensor, slice]]:
    """What of the tensors, laid end to end, lies in a chunk.

    Yields:
        Each piece, flat, and its place in the chunk.
    """
    begins = 0
    for item in tensors:
        ends = begins + item.numel()
        first, last = max(begins, start), min(ends, start + size)
        if first < last:
            yield item.view(-1)[first - begins : last - begins], slice(first - start, last - start)
        begins = ends

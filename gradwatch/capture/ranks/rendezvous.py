"""Whether all ranks will come, agreed before any of them waits.

A rank that waits for another one that does not come hangs the training. So the ranks meet only in
a sampled optimizer step, at its end and before it for a probe, where all of them come by; and only
if they have agreed on it through the store of their process group. The first one to write says what
the meeting is for; the others do the same, whatever they came for.
"""

import time
from collections.abc import Iterable, Mapping
from hashlib import sha256
from typing import Any, Final

from torch import Tensor
from torch import distributed as dist

from gradwatch.errors import GradwatchError

PATIENCE: Final = 15.0
"""How many seconds the first sampled step waits for the other ranks to be watched."""

STEP: Final = "come"
"""A meeting at the end of a step."""
CLOSED: Final = "closed"
"""A rank comes no more."""

_PAUSE: Final = 0.02
_NONE: Final = "none"


class ObstacleError(GradwatchError):
    """The ranks do not come together."""


_attached: dict[str, int] = {}
"""How many watches of the same parameters this process has made."""


class Rendezvous:
    """The meetings of the ranks that watch the same model.

    Args:
        group: the process group.
        parameters: the watched parameters by name, the same on all ranks.
    """

    def __init__(self, group: Any, parameters: Mapping[str, Tensor]) -> None:
        from torch.distributed import distributed_c10d  # noqa: PLC0415 - not in every build

        layout = _digest(f"{name} {tuple(item.shape)}" for name, item in parameters.items())
        _attached[layout] = _attached.get(layout, 0) + 1
        ranks = _digest(map(str, dist.get_process_group_ranks(group)))
        name = f"gradwatch/{ranks}/{layout}/{_attached[layout]}"
        self._rank = dist.get_rank(group)
        self._size = dist.get_world_size(group)
        self._store: Any = distributed_c10d.PrefixStore(name, distributed_c10d._get_default_store())
        self._meetings = 0

    def plan(self, plan: Iterable[object]) -> None:
        """Says when this rank will come, and what it will bring; again if that changes.

        Args:
            plan: what must be equal on all ranks, or else they would wait in vain.
        """
        self._store.set(f"attached/{self._rank}", _digest(map(str, plan)))

    def come(self, purpose: str = STEP) -> str:
        """This rank is at the place of the next meeting.

        The first time it waits a while for the others to be watched.

        Args:
            purpose: what it has come for, `STEP` or something else.

        Returns:
            What the meeting is for.

        Raises:
            ObstacleError: if the ranks do not come together, which holds for good.
        """
        if self._meetings == 0:
            # The first one to know writes it down for the others.
            found = self._store.compare_set("obstacle", "", self._difference() or _NONE)
            if found != _NONE.encode():
                raise ObstacleError(str(found.decode()))
        decided: str = self._store.compare_set(self._meeting(), "", purpose).decode()
        if decided == CLOSED:
            raise ObstacleError("the watch of another rank was closed")
        if decided != STEP or purpose == STEP:  # who came for a probe comes back at the end
            self._meetings += 1
        return decided

    def leave(self) -> str:
        """This rank comes no more.

        Returns:
            What another one waits for already, so that this rank must do it for a last time;
            `CLOSED` if none waits.
        """
        awaited: str = self._store.compare_set(self._meeting(), "", CLOSED).decode()
        if awaited != CLOSED:  # nobody can be further than that
            self._meetings += 1
            self._store.set(self._meeting(), CLOSED)
        return awaited

    def _meeting(self) -> str:
        return f"meeting/{self._meetings}"

    def _difference(self) -> str:
        keys = [f"attached/{rank}" for rank in range(self._size)]
        end = time.monotonic() + PATIENCE
        while not self._store.check(keys):  # the store's own wait fills the log
            if time.monotonic() > end:
                return "it is not watched on every rank"
            time.sleep(_PAUSE)
        if len({self._store.get(key) for key in keys}) > 1:
            return (
                "its watches differ between the ranks; give all of them the same monitors, bounds, "
                "rules and cadence, and load the state on all or none"
            )
        return ""


def _digest(lines: Iterable[str]) -> str:
    return sha256("\n".join(lines).encode()).hexdigest()[:16]

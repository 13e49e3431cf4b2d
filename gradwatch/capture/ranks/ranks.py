"""The processes that train one model together."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final

from torch import Tensor, nn
from torch import distributed as dist

from gradwatch.capture.joint_sums import JointSums
from gradwatch.capture.model.names import wrappers_of
from gradwatch.capture.ranks.rendezvous import CLOSED, STEP, ObstacleError, Rendezvous
from gradwatch.errors import ConfigError
from gradwatch.numerics.sharding import is_in_parts, is_sharded, share, world_size

NOTHING_IN_COMMON: Final = (
    "no DDP wrapper and no sharded parameter was found; pass distributed=True if the ranks train "
    "this model together"
)


class Ranks:
    """This process among those that train the model.

    Args:
        model: the model as the user passed it.
        distributed: whether all ranks of the process group train it together; None finds out.

    Attributes:
        size: number of processes that train together, 1 for a single one.
        rank: place of this one.
        replicas: number of different batches that a step is made of.
        sharded: parameters are `DTensor`s.
        in_parts: parameters lie on several ranks in parts.
        joint: values are combined over the ranks; the first sampled step finally decides.
        speaks: this rank tells the sinks.
        because: why they are not combined, or "".
        sums: over the ranks in the middle of a probe, or None.

    Raises:
        ConfigError: if `distributed` is True without a process group.
    """

    def __init__(self, model: nn.Module, distributed: bool | None = None) -> None:
        self.size, self.rank, self.because = 1, 0, ""
        self.sharded = any(map(is_sharded, model.parameters()))
        self.in_parts = any(is_in_parts(item) for item in model.parameters())
        everything = (*wrappers_of(model), *model.modules())
        self._wrapper = next(filter(_is_data_parallel, everything), None)
        self._rendezvous: Rendezvous | None = None
        self.sums: JointSums | None = None
        flat = any(type(item).__name__ == "FullyShardedDataParallel" for item in everything)
        if _wanted(distributed, self.sharded or flat or self._wrapper is not None):
            self._group = getattr(self._wrapper, "process_group", None) or dist.group.WORLD
            self.size = dist.get_world_size(self._group)
            self.rank = dist.get_rank(self._group)
        elif distributed is None and world_size() > 1:
            self.rank, self.because = dist.get_rank(), NOTHING_IN_COMMON
        self.joint = self.size > 1
        self.speaks = self.size == 1 or self.rank == 0
        if flat and self.joint:
            self.in_parts = True
            self.go_alone("FullyShardedDataParallel shows flat shards only; use fully_shard")
        self.replicas = data_parallel_size(model, self.size) if self.joint else 1

    @property
    def tensor_parallel(self) -> bool:
        """Ranks share the work on one batch, so a layer's output is only a part of it."""
        return self.size > 1 and self.replicas != self.size

    def attach(self, parameters: Mapping[str, Tensor]) -> bool:
        """Lets the other ranks know that this one is watched; does not wait for them.

        Args:
            parameters: the optimized parameters by name; they must be the same on all ranks.

        Returns:
            True.
        """
        self._rendezvous = Rendezvous(self._group, parameters)
        if not self.tensor_parallel:
            device = next(iter(parameters.values())).device
            self.sums = JointSums(self.sum, self.size, self.share, device)
        return True

    def plan(self, plan: Iterable[object]) -> None:
        """Says when this rank will come, and what it will bring; again if that changes.

        Args:
            plan: what must be equal on all ranks, or else they would wait in vain.
        """
        if self._rendezvous is not None:
            self._rendezvous.plan(plan)

    def share(self, parameter: Tensor) -> float:
        """The weight of this rank's part of a parameter in a sum over the ranks."""
        return share(parameter, self.size)

    def meet(self) -> bool:
        """Whether all ranks come to the end of this sampled step.

        The first time it waits a while for the others to be watched. All ranks come to the same
        answer: the first one to know writes it down for the others.

        Returns:
            True if `sum` may be called. False is for good.
        """
        while (purpose := self._come(STEP)) not in {STEP, CLOSED}:
            self._attend(purpose)  # the others probe in this step
        return self.joint

    def meet_for_sums(self, lengths: Sequence[int]) -> bool:
        """Whether all ranks come to the sums of a probe, before the end of this sampled step.

        Args:
            lengths: number of entries of each sum; the same on all ranks.

        Returns:
            True if all of them must be called now; False if the others do not probe in this step.
        """
        mine = " ".join(map(str, lengths))
        purpose = self._come(mine)
        if purpose == mine:
            return True
        if purpose not in {STEP, CLOSED}:
            self._attend(purpose)
        return False

    def _come(self, purpose: str) -> str:
        if getattr(getattr(self._wrapper, "_join_config", None), "enable", False):
            self.go_alone("DDP's join() lets ranks run out of data at different steps")
        if not self.joint or self._rendezvous is None:
            return CLOSED
        try:
            return self._rendezvous.come(purpose)
        except ObstacleError as obstacle:
            self.go_alone(str(obstacle))
            return CLOSED

    def _attend(self, lengths: str) -> None:
        """Takes part in sums to which this rank has nothing to say."""
        if self.sums is not None:
            self.sums.begin(map(int, lengths.split()))
            self.sums.finish()

    def sum(self, values: Tensor) -> Tensor:
        """Adds up over the ranks, in place; all of them must call it.

        Args:
            values: of the same shape on every rank.

        Returns:
            The sum, the same on all ranks.
        """
        dist.all_reduce(values, group=self._group)
        return values

    def leave(self) -> bool:
        """Tells the other ranks not to wait for this one any more.

        Returns:
            True if one of them waits already at the end of a step: this rank must call `sum` for a
            last time.
        """
        awaited = CLOSED
        if self.joint and self._rendezvous is not None and dist.is_initialized():
            with suppress(RuntimeError):  # at the end of a program the store may be gone
                awaited = self._rendezvous.leave()
        if awaited not in {STEP, CLOSED}:
            self._attend(awaited)
        self.joint = False
        self._wrapper = None
        return awaited == STEP

    def go_alone(self, because: str) -> None:
        """Goes on alone.

        Args:
            because: the reason, for the report.
        """
        self.joint = False
        self.because = because


def data_parallel_size(model: nn.Module, world_size: int) -> int:
    """Number of different batches that a step is made of.

    Args:
        model: the unwrapped model.
        world_size: number of ranks.

    Returns:
        The size of FSDP2's mesh; with tensor parallelism alone 1; otherwise `world_size`.
    """
    sizes = [size for module in model.modules() if (size := _fsdp_size(module)) is not None]
    if sizes:
        return max(sizes)
    return 1 if any(map(is_sharded, model.parameters())) else world_size


def _fsdp_size(module: nn.Module) -> int | None:
    get_state: Any = getattr(module, "_get_fsdp_state", None)
    state = None if get_state is None else get_state()
    group = getattr(state, "_fsdp_param_group", None)
    mesh = getattr(getattr(group, "mesh_info", None), "mesh", None)
    return None if mesh is None else int(mesh.size())


def _wanted(distributed: bool | None, found: bool) -> bool:
    running = dist.is_available() and dist.is_initialized()
    if distributed and not running:
        raise ConfigError(
            "distributed=True needs a process group, and there is none; call "
            "torch.distributed.init_process_group first, or leave distributed out"
        )
    return running and (found if distributed is None else distributed)


def _is_data_parallel(module: nn.Module) -> bool:
    return isinstance(module, nn.parallel.DistributedDataParallel)

"""The gradient of each backward under FSDP2, seen where it is about to be reduced.

`fully_shard` computes with unsharded copies, so hooks on the parameters never run; but the input
of its reduce-scatter is this rank's whole gradient of a group of parameters, padded with zeros.
"""

from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor, nn

from gradwatch.capture.part import MICROBATCHES
from gradwatch.capture.step.microbatch.record import MicrobatchRecord
from gradwatch.isolation import Isolation
from gradwatch.numerics.norms import norm

UNDIVIDED: Final = frozenset({torch.float32, torch.bfloat16})
"""FSDP2 divides gradients of other types before it reduces them."""

DIVIDED: Final = (
    "FSDP2 divides gradients of type {dtype} before it reduces them, by a factor that is not told; "
    "MixedPrecisionPolicy(reduce_dtype=torch.float32) avoids that"
)
NO_TAP: Final = (
    "this version of PyTorch does not let the gradients of FSDP2 be seen before they are reduced"
)
REPLACED: Final = "the reduce-scatter of FSDP2 was replaced after the watch was attached"
SEVERAL_MESHES: Final = "FSDP2 shards the parameters of one module over several meshes"
TENSOR_PARALLEL: Final = (
    "the parameters are sharded by more than FSDP2, so that no rank has the whole gradient of its "
    "micro-batch"
)


class ReduceScatterTap:
    """Stands before the reduce-scatter of one FSDP2 group and measures what goes in.

    Args:
        module: owns the group.
        group: FSDP2's own record of it.
        part: a name for it.
        record: takes the norms.
        isolation: what to do when measuring fails.
    """

    def __init__(
        self,
        module: Any,
        group: Any,
        part: str,
        record: MicrobatchRecord,
        isolation: Isolation,
    ) -> None:
        self._module = module
        self._group = group
        self._part = part
        self._record = record
        self._isolation = isolation
        self._inner = group._reduce_scatter_comm
        module.set_custom_reduce_scatter(self)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """FSDP2 refuses some of the user's settings for comms that are not of its own types."""
        inner: type = self._inner.__class__  # may be another watch's tap
        return inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_inner"], name)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Does the reduce-scatter."""
        if self._record.active:
            self._isolation.run(MICROBATCHES, self._measure, *arguments, **options)
        return self._inner(*arguments, **options)

    def remove(self) -> None:
        """Gives the group back what it had, unless the user has set something else since."""
        taps = self._chain()
        if self not in taps:
            return
        if taps[-1] is self:
            self._module.set_custom_reduce_scatter(self._inner)
        else:
            taps[taps.index(self) + 1]._inner = self._inner

    @property
    def group(self) -> Any:
        """FSDP2's own record of the group."""
        return self._group

    @property
    def in_place(self) -> bool:
        """Whether the group still calls this tap."""
        return self in self._chain()

    def _chain(self) -> "list[ReduceScatterTap]":
        """The taps before the group's own reduce-scatter, several watches' ones, outermost last."""
        found: list[ReduceScatterTap] = []
        comm = self._group._reduce_scatter_comm
        while type(comm) is ReduceScatterTap:
            found.insert(0, comm)
            comm = comm._inner
        return found

    def _measure(self, output_tensor: Tensor, input_tensor: Tensor, *_: Any, **__: Any) -> None:
        if input_tensor.dtype not in UNDIVIDED:
            self._record.spoil(DIVIDED.format(dtype=input_tensor.dtype))
            return
        accumulated = getattr(self._group, "_partial_reduce_output", None) is not None or any(
            item.sharded_param.grad is not None for item in self._group.fsdp_params
        )
        projection = self._record.projected(self._part, input_tensor)
        self._record.add(
            self._part, norm(input_tensor), continued=accumulated, projection=projection
        )


class ReduceScatterTaps:
    """The taps of all FSDP2 groups of a model, there until they are removed.

    Args:
        model: with its wrappers.
        record: takes the norms.
        isolation: what to do when measuring fails.

    Attributes:
        unavailable: why the model's gradients cannot be seen, or None.
    """

    def __init__(self, model: nn.Module, record: MicrobatchRecord, isolation: Isolation) -> None:
        self.unavailable: str | None = None
        self._record = record
        self._taps: list[ReduceScatterTap] = []
        places = list(_groups(model))
        self._sharded = frozenset(
            id(item.sharded_param) for _, group in places for item in group.fsdp_params
        )
        self.unavailable = next(filter(None, (_obstacle(*place) for place in places)), None)
        if self.unavailable is None:
            self._taps = [
                ReduceScatterTap(module, group, f"group {number}", record, isolation)
                for number, (module, group) in enumerate(places)
            ]

    @property
    def averages(self) -> bool:
        """Whether the gradients of the ranks are averaged; the user may set another divisor."""
        factors = (getattr(tap.group, "gradient_divide_factor", None) for tap in self._taps)
        return all(factor is None for factor in factors)

    def manages(self, parameter: Tensor) -> bool:
        """Whether FSDP2 shards a parameter."""
        return id(parameter) in self._sharded

    def check_complete(self) -> None:
        """Spoils the step if a group is reduced in a way that no tap sees."""
        if not all(tap.in_place for tap in self._taps):
            self._record.spoil(REPLACED)

    def remove(self) -> None:
        """Takes the taps out; may be called again."""
        while self._taps:
            self._taps.pop().remove()


def _groups(model: nn.Module) -> Iterator[tuple[Any, Any]]:
    """Finds the FSDP2 groups.

    Yields:
        A module that owns the group, and the group; each group once.
    """
    found: set[int] = set()
    for module in model.modules():
        for group in _groups_of(module) if hasattr(module, "_get_fsdp_state") else []:
            if id(group) not in found:
                found.add(id(group))
                yield module, group


def _groups_of(module: Any) -> list[Any]:
    state = module._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    group = state._fsdp_param_group  # its name before a module could have several
    return [] if group is None else [group]


def _obstacle(module: Any, group: Any) -> str | None:
    if not hasattr(module, "set_custom_reduce_scatter"):
        return NO_TAP
    if len(_groups_of(module)) > 1:
        return SEVERAL_MESHES
    for item in group.fsdp_params:
        *replicated, sharded = item.sharded_param.placements
        if not sharded.is_shard() or not all(place.is_replicate() for place in replicated):
            return TENSOR_PARALLEL
    return None

"""The batch of the step under way, held by reference until the step ends."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from gradwatch.capture.forward.gate import batch_size, tensors_in
from gradwatch.errors import GradwatchError


class ObjectiveError(GradwatchError):
    """The training loss cannot be evaluated again."""


@dataclass(frozen=True, slots=True)
class Call:
    """What a model was called with.

    Attributes:
        args: its positional arguments.
        kwargs: its keyword arguments.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def fresh(self, rows: slice | None = None) -> "Call":
        """The same call with copies of the tensors, perhaps of some of the examples only.

        Args:
            rows: which examples; None for all.
        """
        args, kwargs = fresh((self.args, self.kwargs), rows)
        return Call(args, kwargs)


class LastBatch:
    """What the model was last called with, and what the loop said the batch is.

    It holds no copy and nothing past `release`, so its owner must release it when the step ends.
    A batch that is changed in place after the forward is noticed.
    """

    def __init__(self) -> None:
        self.release()

    def release(self) -> None:
        """Lets go of the batch."""
        self._call: Call | None = None
        self._told: Any = None
        self._call_versions: list[int] = []
        self._told_versions: list[int] = []

    def called(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A training forward begins.

        Args:
            args: the positional arguments of the model.
            kwargs: its keyword arguments.
        """
        self._call = Call(args, dict(kwargs))
        self._call_versions = _versions((args, kwargs))

    def tell(self, batch: Any) -> None:
        """Says what the batch is, where the model is called with a part of it only.

        Args:
            batch: as the loss function takes it.
        """
        self._told = batch
        self._told_versions = _versions(batch)

    @property
    def is_told(self) -> bool:
        """Whether the loop said what the batch is."""
        return self._told is not None

    @property
    def call(self) -> Call:
        """What the model was called with.

        Raises:
            ObjectiveError: if it has not been called in this step.
        """
        if self._call is None:
            raise ObjectiveError("no training forward of the model was seen in this step")
        _check_unchanged((self._call.args, self._call.kwargs), self._call_versions)
        return self._call

    @property
    def batch(self) -> Any:
        """The batch as it was told; else the model's only argument, or its keyword arguments.

        Raises:
            ObjectiveError: if neither is known.
        """
        if self._told is not None:
            _check_unchanged(self._told, self._told_versions)
            return self._told
        call = self.call
        if len(call.args) == 1 and not call.kwargs:
            return call.args[0]
        if call.kwargs and not call.args:
            return call.kwargs
        raise ObjectiveError(
            f"the model was called with {len(call.args)} positional and {len(call.kwargs)} keyword "
            "arguments, from which the batch of the loss function cannot be told; call "
            "watch.observe(batch=batch) before the optimizer steps"
        )


def _versions(values: Any) -> list[int]:
    # Tensors made in inference mode have no count of their changes.
    return [0 if item.is_inference() else item._version for item in tensors_in(values)]


def _check_unchanged(values: Any, versions: list[int]) -> None:
    if _versions(values) != versions:
        raise ObjectiveError(
            "the batch was changed in place after the forward, so its loss cannot be evaluated "
            "again; give a probe_batch"
        )


def fresh(batch: Any, rows: slice | None = None) -> Any:
    """A batch for one evaluation of a loss, which may do with it what it likes.

    Args:
        batch: a tensor or nested tuples, lists and mappings of them. Tensors are copied, and every
            one whose first dimension is the batch size is cut; everything else stays.
        rows: which examples; None for all.

    Returns:
        The same structure, anew.

    Raises:
        ObjectiveError: if some examples are wanted and the batch shows none.

    Example:
        >>> import torch
        >>> fresh({"x": torch.arange(4), "n": 3}, slice(2))
        {'x': tensor([0, 1]), 'n': 3}
    """
    size = batch_size(batch)
    if rows is not None and size == 0:
        raise ObjectiveError("the batch holds no tensor whose first dimension counts examples")
    return _copied(batch, rows, size)


def _copied(values: Any, rows: slice | None, size: int) -> Any:
    if isinstance(values, Tensor):
        cut = values.dim() > 0 and values.shape[0] == size and rows is not None
        part = values[rows] if cut else values
        return part.detach().clone().requires_grad_(values.requires_grad)
    if isinstance(values, PackedSequence) and rows is not None:
        raise ObjectiveError("the examples of a PackedSequence cannot be told apart")
    if isinstance(values, Mapping):
        copies = {key: _copied(value, rows, size) for key, value in values.items()}
        return copies if type(values) is dict else type(values)(copies)  # type: ignore[call-arg]
    if isinstance(values, tuple) and hasattr(values, "_fields"):
        return type(values)(*(_copied(value, rows, size) for value in values))
    if isinstance(values, (tuple, list)):
        return type(values)(_copied(value, rows, size) for value in values)
    unknown = isinstance(values, Sequence) and not isinstance(values, (str, bytes))
    if unknown and rows is not None:
        raise ObjectiveError(f"the examples of a {type(values).__name__} cannot be told apart")
    return values

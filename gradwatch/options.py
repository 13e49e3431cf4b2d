"""The arguments of a watch before there is a model: for adapters that attach it later."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Final

import torch
from torch import nn

from gradwatch import presets
from gradwatch.announce import OnRecommendation
from gradwatch.arguments import typed
from gradwatch.capture.probe.probes import LossFn
from gradwatch.errors import ConfigError
from gradwatch.interfaces import Bound, Monitor, Rule, Sink
from gradwatch.isolation import OnError
from gradwatch.watch import Watch

PARTS: Final[dict[str, Any]] = {
    "monitors": Monitor,
    "bounds": Bound,
    "rules": Rule,
    "sinks": Sink,
}
"""The options that are lists of live objects."""

LIVE: Final = (*PARTS, "loss_fn", "probe_batch")
"""The options that cannot be written as plain values."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The arguments of a framework's callback, which documents them.

    All are those of `Watch` but for `per_layer`: whether the framework's own loggers get the values
    of single parameters, layers and blocks, too; None leaves it to the adapter.
    """

    logdir: str | os.PathLike[str] | None = None
    monitors: Iterable[Monitor] | None = None
    bounds: Iterable[Bound] | None = None
    rules: Iterable[Rule] | None = None
    sinks: Iterable[Sink] = ()
    every_n_steps: int = 50
    log_every_n_steps: int = 50
    include: Sequence[str] | None = None
    exclude: Sequence[str] | None = None
    train_size: int | None = None
    planned_steps: int | None = None
    tag_prefix: str = "gradwatch"
    per_layer: bool | None = None
    loss_fn: LossFn | None = None
    probe_batch: Any = None
    budget: float | None = 0.02
    on_recommendation: OnRecommendation = "collect"
    on_error: OnError = "disable"

    def checked(self) -> "Options":
        """Finds mistakes now, hours before the training begins.

        Returns:
            The options, with lists that can be read more than once.

        Raises:
            ConfigError: if one of them cannot work.
            RecordError: if `logdir` cannot be written.
        """
        if self.per_layer is not None and not isinstance(self.per_layer, bool):
            raise ConfigError(f"per_layer must be True, False or None, got {self.per_layer!r}")
        if not isinstance(self.tag_prefix, str) or not self.tag_prefix:
            raise ConfigError(
                f'tag_prefix must be a name, got {self.tag_prefix!r}; the default is "gradwatch"'
            )
        given = {name: getattr(self, name) for name in PARTS}
        read: dict[str, Any] = {
            name: typed(name, PARTS[name], items)
            for name, items in given.items()
            if items is not None or name == "sinks"
        }
        options = replace(self, **read)
        if os.environ.get("RANK", "0") == "0":  # the only process that writes
            presets.files(options.logdir, options.tag_prefix)
        # The watch itself checks the rest, on a model of one weight that is thrown away.
        weight = nn.ParameterList([nn.Parameter(torch.zeros(()))])
        optimizer = torch.optim.SGD(weight.parameters(), lr=0.0)
        rehearsal = options.for_watch() | {"logdir": None, "sinks": ()}
        Watch(weight, optimizer, distributed=False, **rehearsal).close()
        return options

    def for_watch(self) -> dict[str, Any]:
        """Those that are arguments of `Watch`."""
        names = [item.name for item in fields(self) if item.name != "per_layer"]
        return {name: getattr(self, name) for name in names}

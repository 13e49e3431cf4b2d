"""What the user chose, checked before any training, and as far as possible as plain values."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final

import torch
from torch import nn

import gradwatch
from gradwatch.announce import OnRecommendation
from gradwatch.arguments import typed
from gradwatch.errors import ConfigError
from gradwatch.isolation import OnError
from gradwatch.presets import files

_OF_THE_ADAPTER: Final = ("per_layer",)


@dataclass(frozen=True, slots=True)
class Options:
    """The arguments of `GradwatchCallback`, which documents them."""

    logdir: str | os.PathLike[str] | None = None
    monitors: Iterable[gradwatch.Monitor] | None = None
    bounds: Iterable[gradwatch.Bound] | None = None
    rules: Iterable[gradwatch.Rule] | None = None
    sinks: Iterable[gradwatch.Sink] = ()
    every_n_steps: int = 50
    log_every_n_steps: int = 50
    include: Sequence[str] | None = None
    exclude: Sequence[str] | None = None
    train_size: int | None = None
    planned_steps: int | None = None
    tag_prefix: str = "gradwatch"
    per_layer: bool = False
    on_recommendation: OnRecommendation = "collect"
    on_error: OnError = "disable"

    @classmethod
    def checked(cls, given: Mapping[str, Any]) -> "Options":
        """Takes arguments that may be wrong.

        Args:
            given: arguments of the callback by name.

        Returns:
            Options that `gradwatch.watch` will accept.

        Raises:
            ConfigError: if one of them cannot work.
            RecordError: if `logdir` cannot be written.
        """
        settings = dict(given)
        for name, kind in _PARTS.items():
            if settings[name] is not None:
                settings[name] = typed(name, kind, settings[name])
        if not isinstance(settings["per_layer"], bool):
            raise ConfigError(f"per_layer must be True or False, got {settings['per_layer']!r}")
        options = cls(**settings)
        if os.environ.get("RANK", "0") == "0":  # the only process that writes
            files(options.logdir, options.tag_prefix)
        # The checks are those of the watch itself, on a model of one weight that is thrown away.
        weight = nn.ParameterList([nn.Parameter(torch.zeros(()))])
        optimizer = torch.optim.SGD(weight.parameters(), lr=0.0)
        rehearsal = options.for_watch() | {"logdir": None, "sinks": ()}
        gradwatch.watch(weight, optimizer, **rehearsal).close()
        return options

    def for_watch(self) -> dict[str, Any]:
        """The arguments of `gradwatch.watch`."""
        return {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if field.name not in _OF_THE_ADAPTER
        }

    def plain(self) -> dict[str, Any]:
        """Those that a checkpoint can hold as JSON: all but live objects and functions."""
        kept = {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if field.name not in _PARTS
        }
        kept["logdir"] = None if self.logdir is None else os.fspath(self.logdir)
        if callable(self.on_recommendation):
            kept["on_recommendation"] = "collect"
        return {
            name: list(value) if isinstance(value, (tuple, list)) else value
            for name, value in kept.items()
        }


_PARTS: Final[dict[str, Any]] = {
    "monitors": gradwatch.Monitor,
    "bounds": gradwatch.Bound,
    "rules": gradwatch.Rule,
    "sinks": gradwatch.Sink,
}

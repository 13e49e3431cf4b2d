"""What the user chose, checked before any training."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import nn

import gradwatch
from gradwatch import presets
from gradwatch.announce import OnRecommendation
from gradwatch.arguments import typed
from gradwatch.errors import ConfigError
from gradwatch.isolation import OnError


@dataclass(frozen=True, slots=True, kw_only=True)
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
    per_layer: bool | None = None
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
        if self.per_layer not in {None, True, False}:
            raise ConfigError(f"per_layer must be True, False or None, got {self.per_layer!r}")
        if not isinstance(self.tag_prefix, str) or not self.tag_prefix:
            raise ConfigError(
                f'tag_prefix must be a name, got {self.tag_prefix!r}; the default is "gradwatch"'
            )
        given: dict[str, Any] = {
            name: typed(name, kind, getattr(self, name))
            for name, kind in _PARTS.items()
            if getattr(self, name) is not None
        }
        options = replace(self, **given)
        presets.files(options.logdir, options.tag_prefix)
        _rehearse(options)
        return options

    def for_watch(self) -> dict[str, Any]:
        """Those that are arguments of `gradwatch.watch`."""
        names = [item.name for item in fields(self) if item.name != "per_layer"]
        return {name: getattr(self, name) for name in names}


_PARTS: dict[str, Any] = {
    "monitors": gradwatch.Monitor,
    "bounds": gradwatch.Bound,
    "rules": gradwatch.Rule,
    "sinks": gradwatch.Sink,
}


def _rehearse(options: Options) -> None:
    """Lets the watch itself check the rest, on a model of one weight that is thrown away."""
    weight = nn.ParameterList([nn.Parameter(torch.zeros(()))])
    optimizer = torch.optim.SGD(weight.parameters(), lr=0.0)
    arguments = options.for_watch() | {"logdir": None, "sinks": ()}
    gradwatch.watch(weight, optimizer, **arguments).close()

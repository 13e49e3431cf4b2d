"""What a checkpoint of the Trainer can hold of the options."""

import os
from dataclasses import fields
from typing import Any

from gradwatch.options import LIVE, Options


def plain_options(options: Options) -> dict[str, Any]:
    """Those that are JSON: all but live objects and functions.

    Args:
        options: of a callback.

    Returns:
        Arguments of the callback by name.
    """
    kept = {
        item.name: getattr(options, item.name) for item in fields(options) if item.name not in LIVE
    }
    kept["logdir"] = None if options.logdir is None else os.fspath(options.logdir)
    if callable(options.on_recommendation):
        kept["on_recommendation"] = "collect"
    return {
        name: list(value) if isinstance(value, (tuple, list)) else value
        for name, value in kept.items()
    }

"""The base class that the user's Trainer asks for, of whichever package it comes from.

`lightning.pytorch` and `pytorch_lightning` have the same content, but their `Callback` classes are
unrelated, and importing one of them takes seconds. So the base is chosen when a callback is made:
by then the user has imported theirs.
"""

import importlib
import sys
from functools import cache
from typing import Any, Final

from gradwatch.errors import MissingExtraError

PACKAGES: Final = ("lightning.pytorch", "pytorch_lightning")


def with_lightning_base(cls: type) -> type:
    """The class joined to the `Callback` of every Lightning package that is in use.

    Args:
        cls: a class without a base of Lightning; one that has been joined comes back as it is.

    Returns:
        A subclass of it and of one or two `Callback` classes, with the same name.

    Raises:
        MissingExtraError: if neither package is installed.
    """
    public = getattr(cls, "_public_class", None)
    return cls if public is not None else _joined(cls, _callback_classes())


@cache
def _joined(cls: type, bases: tuple[type, ...]) -> type:
    names = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "_public_class": cls,  # the one that can be imported by its name
    }
    return type(cls.__name__, (cls, *bases), names)


def _callback_classes() -> tuple[type, ...]:
    in_use = [sys.modules[name] for name in PACKAGES if name in sys.modules]
    found: list[Any] = [module.Callback for module in in_use if hasattr(module, "Callback")]
    return tuple(found) or (_import_one().Callback,)


def _import_one() -> Any:
    reason: ImportError | None = None
    for name in PACKAGES:
        try:
            return importlib.import_module(name)
        except ImportError as error:
            reason = reason or error
    raise MissingExtraError("GradwatchCallback", "lightning", reason) from reason

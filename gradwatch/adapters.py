"""Finds the adapters of this distribution by name, and says which extra one needs.

The core imports no framework. An adapter is a package of its own beside the core; the command
line and the `logdir` option load it only when it is asked for.
"""

from importlib import import_module
from types import ModuleType

from gradwatch.errors import MissingExtraError


def load_adapter(name: str, *, feature: str, extra: str) -> ModuleType:
    """Imports an adapter package.

    Args:
        name: of the import package, as in "gradwatch_tensorboard".
        feature: what the user asked for, for the message.
        extra: the extra that brings what it needs.

    Returns:
        The package.

    Raises:
        MissingExtraError: if something it imports is not installed.
    """
    try:
        return import_module(name)
    except MissingExtraError:
        raise
    except ImportError as error:
        raise MissingExtraError(feature, extra, error) from error

"""Frozen dataclasses to plain JSON values and back, driven by their annotations.

JSON has no NaN and no infinity; they travel as the strings "nan", "inf" and "-inf", so that
strict readers in other languages accept the files.
"""

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Final, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from gradwatch.errors import ConfigError, RecordError

RecordT = TypeVar("RecordT")

_NON_FINITE: Final = ("nan", "inf", "-inf")


def to_json(value: Any) -> Any:
    """Turns a record (or a container of records) into what `json.dumps` accepts.

    Args:
        value: a dataclass, tuple, list, mapping with string keys, number, string or None.

    Returns:
        The same content as dictionaries, lists, strings, numbers and None.

    Raises:
        TypeError: if something inside has another type.

    Example:
        >>> to_json((1, float("nan")))
        [1, 'nan']
    """
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [to_json(item) for item in value]
    raise TypeError(
        f"cannot write a {type(value).__name__} as JSON; records hold plain values only"
    )


def from_json(kind: type[RecordT], data: Any) -> RecordT:
    """Builds a record of the class `kind` from what `to_json` made of one.

    Unknown keys are ignored and missing ones take their defaults, so that a newer and an older
    version can read each other's files.

    Args:
        kind: the dataclass to build.
        data: the dictionary.

    Returns:
        The record.

    Raises:
        RecordError: if `data` does not describe such a record.
    """
    if not isinstance(data, Mapping):
        raise RecordError(f"a {kind.__name__} must be an object, got {type(data).__name__}")
    hints = _hints(kind)  # type: ignore[arg-type]  # mypy does not know that classes hash
    known = {key: _build(hints[key], item) for key, item in data.items() if key in hints}
    try:
        return kind(**known)
    except (TypeError, ConfigError) as error:
        raise RecordError(f"not a complete {kind.__name__}: {error}") from error


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _build(hint: Any, value: Any) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in {Union, UnionType}:
        if value is None and NoneType in arguments:
            return None
        return _build(next(item for item in arguments if item is not NoneType), value)
    if origin is tuple and isinstance(value, (tuple, list)):
        return tuple(_build(arguments[0], item) for item in value)
    if origin is Mapping and isinstance(value, Mapping):
        return {key: _build(arguments[1], item) for key, item in value.items()}
    if is_dataclass(hint) and isinstance(hint, type):
        return from_json(hint, value)
    return _plain(hint, value)


def _plain(hint: Any, value: Any) -> Any:
    if hint is float and (type(value) in {int, float} or value in _NON_FINITE):
        return float(value)
    if hint is Any or get_origin(hint) is Literal:
        return value
    if isinstance(hint, type) and isinstance(value, hint):
        return value
    raise RecordError(f"expected {getattr(hint, '__name__', hint)}, got {value!r}")

"""How does a frozen configuration become JSON, and come back equal?"""

from __future__ import annotations

import json
import math
import types
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from lben.values import plain

T = TypeVar("T")


def to_json(value: Any, *, indent: int | None = 2) -> str:
    """Return a value as strict JSON, the form of every file of this library.

    A dataclass becomes an object of its fields, with its class as "kind" if it extends or is
    extended by another dataclass. Tuples become lists, numbers of numpy and torch plain numbers.
    Infinity and NaN become null, as JSON has neither.

    Args:
        value: a dataclass, or plain values.
        indent: spaces per level; None for one line.

    Raises:
        TypeError: for values that JSON has no form of.
    """
    return json.dumps(to_plain(value), indent=indent, allow_nan=False)


def to_plain(value: Any) -> Any:
    """Return the content that `to_json` writes, as dictionaries, lists and plain values.

    Args:
        value: a dataclass, or plain values.
    """
    value = plain(value)
    if is_dataclass(value) and not isinstance(value, type):
        kind = {"kind": type(value).__name__} if _has_relatives(type(value)) else {}
        return kind | {f.name: to_plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def from_json(cls: type[T], text: str | bytes) -> T:
    """Return the frozen dataclass that `to_json` wrote.

    A null stands for infinity if the annotation of its field is a number without None.

    Args:
        cls: the dataclass.
        text: JSON.

    Raises:
        ValueError: if the text is not JSON, lacks a field or has one too many, or a value is not
            of the annotated kind.
    """
    try:
        return _revive(json.loads(text), cls)
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"this is no {cls.__name__}: {error}") from error


def _revive(value: Any, hint: Any) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and types.NoneType in arguments:
            return None
        kinds = [a for a in arguments if a is not types.NoneType]
        return _revive(value, kinds[0]) if len(kinds) == 1 else value
    if origin is tuple:
        if not isinstance(value, list):
            raise TypeError(f"expected a list, got {value!r}")
        each = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        return tuple(_revive(item, kind) for item, kind in zip(value, each, strict=True))
    if is_dataclass(hint):
        if isinstance(value, dict) and "kind" in value:
            value = dict(value)
            hint = _find_relative(hint, value.pop("kind"))
        hints, names = get_type_hints(hint), {f.name for f in fields(hint)}
        if not isinstance(value, dict) or not set(value) <= names:
            raise TypeError(f"expected an object with the fields {', '.join(sorted(names))}")
        return hint(**{name: _revive(item, hints[name]) for name, item in value.items()})
    if hint is float:
        return math.inf if value is None else _check_kind(value, (int, float), float)
    return _check_kind(value, hint, hint) if hint in (int, str, bool) else value


def _has_relatives(cls: type) -> bool:
    """Return whether a dataclass extends another or is extended: then a record names its kind."""
    return any(map(is_dataclass, cls.__mro__[1:])) or bool(cls.__subclasses__())


def _find_relative(cls: Any, kind: object) -> Any:
    """Return the class of this name among a dataclass and those that extend it."""
    if cls.__name__ == kind:
        return cls
    for other in cls.__subclasses__():
        with suppress(TypeError):
            return _find_relative(other, kind)
    raise TypeError(f"{kind} is no {cls.__name__}")


def _check_kind(value: Any, kinds: Any, cls: Any) -> Any:
    if not isinstance(value, kinds) or (isinstance(value, bool) and cls is not bool):
        raise TypeError(f"expected {cls.__name__}, got {value!r}")
    return cls(value)


def encode(value: Any) -> Any:
    """Return plain values for JSON: {"kind": class name, field: value, …} for a dataclass.

    Args:
        value: a dataclass, or plain values.
    """
    if is_dataclass(value):
        content = {f.name: encode(getattr(value, f.name)) for f in fields(value)}
        return {"kind": type(value).__name__, **content}
    return [encode(item) for item in value] if isinstance(value, tuple) else value


def decode(record: Mapping[str, Any], kinds: Mapping[str, type]) -> Any:
    """Return the configuration from which `encode` made the record.

    Args:
        record: read from JSON.
        kinds: the allowed classes by name; annotations give the classes of nested records.

    Raises:
        ValueError: if it is of no such kind, or a value is refused by the class.
        TypeError: if it lacks a field or has one too many.
    """
    content = dict(record)
    kind = content.pop("kind", None)
    if kind not in kinds:
        raise ValueError(f"unknown kind {kind!r}, expected {' or '.join(kinds)}")
    hints = get_type_hints(kinds[kind])

    def value(name: str, plain: Any) -> Any:
        if isinstance(plain, list):
            return tuple(value(name, item) for item in plain)
        if isinstance(plain, dict):
            hint = hints.get(name, object)
            return decode(plain, by_name(*(get_args(hint) or (hint,))))
        return plain

    return kinds[kind](**{name: value(name, plain) for name, plain in content.items()})


def by_name(*classes: type) -> dict[str, type]:
    """Return classes under the names that `encode` gives them."""
    return {cls.__name__: cls for cls in classes}

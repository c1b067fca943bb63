"""How does a frozen configuration become JSON, and come back equal?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_type_hints


def encode(value: Any) -> Any:
    """Return plain values for JSON: {"kind": class name, field: value, …} for a dataclass."""
    if is_dataclass(value):
        content = {f.name: encode(getattr(value, f.name)) for f in fields(value)}
        return {"kind": type(value).__name__, **content}
    return [encode(item) for item in value] if isinstance(value, tuple) else value


def decode(record: Mapping[str, Any], kinds: Mapping[str, type]) -> Any:
    """Return the configuration that `encode` made the record of.

    Args:
        record: read from JSON.
        kinds: what it may be, by name; nested records are of the classes in the annotations.

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

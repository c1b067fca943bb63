"""Which values does a frozen configuration hold? Plain Python values, converted when it is made.

A caller may pass numbers of numpy or torch, a `Path` for text, or a list or array for a tuple.
`conform` converts each value to the type in the field's annotation. Therefore every configuration
can be compared, printed as Python and written as JSON. A value of another kind raises an error that
names the field.
"""

from __future__ import annotations

import math
import os
import types
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
import torch
from torch import Tensor


def conform(config: Any) -> None:
    """Replace every value of a frozen dataclass by a plain value of the annotated type.

    It converts int, float, bool, str, Literal, tuples of them, dataclasses, and unions. Values with
    other annotations stay as they are. Strings and truth values do not count as numbers. The class
    itself checks which numbers are allowed, NaN and infinity included.

    Args:
        config: the instance, in its `__post_init__`.

    Raises:
        ValueError: naming the field, what it must be, and what was given.
    """
    hints = get_type_hints(type(config))
    for f in fields(config):
        value, hint = getattr(config, f.name), hints[f.name]
        try:
            object.__setattr__(config, f.name, _convert(value, hint))
        except _Refused:
            raise ValueError(f"{f.name} must be {_describe(hint)}, got {_show(value)}") from None


def check_positive(config: Any, *names: str) -> None:
    """Refuse fields that are not above 0; None passes, and every number of a tuple is checked.

    Args:
        config: the instance.
        names: of its fields.

    Raises:
        ValueError: naming the field.
    """
    for name in names:
        value = getattr(config, name)
        numbers = value if isinstance(value, tuple) else () if value is None else (value,)
        if not all(0 < number < math.inf for number in numbers):
            raise ValueError(f"{name} must be positive and finite, got {value}")


def check_tol(tol: float | None) -> None:
    """Refuse a relative tolerance of 1 or more, which accepts every state; None passes.

    Args:
        tol: relative tolerance, or None.

    Raises:
        ValueError: saying so.
    """
    if tol is not None and not tol < 1:
        raise ValueError(f"tol must be below 1 (it is relative: 1 accepts anything), got {tol}")


def plain(value: Any) -> Any:
    """Return numbers of numpy and torch as Python numbers, arrays as nested lists, paths as text.

    Other values are returned unchanged.

    Args:
        value: of any type.
    """
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        return value.to(torch.float32).tolist() if value.dtype == torch.bfloat16 else value.tolist()
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return str(value) if isinstance(value, torch.device) else value


class _Refused(Exception):
    pass


def _convert(value: Any, hint: Any) -> Any:
    """Return a value converted to its annotation, or raise _Refused."""
    origin = get_origin(hint)
    known = origin in (Union, types.UnionType, Literal, tuple) or hint in _WORDS
    if not known and not (isinstance(hint, type) and is_dataclass(hint)):
        return value
    value = plain(value)
    if origin in (Union, types.UnionType):
        return _convert_to_first(value, get_args(hint))
    if origin is Literal:
        return _choose(value, get_args(hint))
    if origin is tuple:
        return _convert_tuple(value, get_args(hint))
    if hint in (bool, str, types.NoneType):
        return _check_instance(value, hint)
    return _convert_number(value, hint) if hint in (int, float) else _check_instance(value, hint)


def _convert_to_first(value: Any, hints: Sequence[Any]) -> Any:
    for hint in hints:
        try:
            return _convert(value, hint)
        except _Refused:
            continue
    raise _Refused


def _choose(value: Any, choices: Sequence[Any]) -> Any:
    # A value that equals a choice, such as text of numpy, becomes the choice itself.
    for choice in choices:
        if type(value) is not bool and isinstance(value, type(choice)) and value == choice:
            return choice
    raise _Refused


def _convert_tuple(value: Any, hints: Sequence[Any]) -> tuple[Any, ...]:
    if isinstance(value, str | bytes | dict | set) or not hasattr(value, "__iter__"):
        raise _Refused
    items = tuple(value)
    if len(hints) == 2 and hints[1] is Ellipsis:
        hints = [hints[0]] * len(items)
    if len(items) != len(hints):
        raise _Refused
    return tuple(_convert(item, hint) for item, hint in zip(items, hints, strict=True))


def _check_instance(value: Any, cls: type) -> Any:
    if not isinstance(value, cls):
        raise _Refused
    return str(value) if cls is str else value


def _convert_number(value: Any, cls: type) -> Any:
    kinds = int if cls is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise _Refused
    try:
        return cls(value)
    except OverflowError:  # an integer beyond all floats
        raise _Refused from None


_WORDS = {
    int: "an integer", float: "a number", bool: "True or False", str: "text",
    types.NoneType: "None",
}  # fmt: skip


def _describe(hint: Any) -> str:
    """Say in words what an annotation asks for."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(map(_describe, arguments))
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin is tuple:
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return f"a tuple, every entry {_describe(arguments[0])}"
        entry = _describe(arguments[0]) if len(set(arguments)) == 1 else "of the right kind"
        return f"a tuple of {len(arguments)}, every entry {entry}"
    return _WORDS.get(hint) or f"a {getattr(hint, '__name__', hint)}"


def _show(value: Any) -> str:
    text = repr(value)
    text = text if len(text) <= 60 else f"{text[:57]}…"
    return f"{' '.join(text.split())} ({type(value).__name__})"

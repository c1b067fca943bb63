"""Which values does a frozen configuration hold? Plain Python ones, converted when it is made.

Numbers come from numpy, from torch and from files; paths are `Path`s, tuples are lists or arrays.
`conform` makes of each value what the field's annotation says, so that a configuration compares,
prints as Python and becomes JSON, whatever it was made from. A value of another kind is refused
there and then, by the name of its field.
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
    """Replace every value of a frozen dataclass by a plain one of the kind that is annotated.

    int, float, bool, str, Literal, tuples of them, dataclasses, and unions; other annotations are
    left alone. Numbers are never strings or truth values; which numbers are allowed, NaN and
    infinity among them, is for the class to say.

    Args:
        config: the instance, in its `__post_init__`.

    Raises:
        ValueError: naming the field, what it must be, and what was given.
    """
    hints = get_type_hints(type(config))
    for f in fields(config):
        value, hint = getattr(config, f.name), hints[f.name]
        try:
            object.__setattr__(config, f.name, _converted(value, hint))
        except _Refused:
            raise ValueError(f"{f.name} must be {_described(hint)}, got {_shown(value)}") from None


def check_positive(config: Any, *names: str) -> None:
    """Refuse fields that are not above 0; None passes, of a tuple all numbers are checked.

    Raises:
        ValueError: naming the field.
    """
    for name in names:
        value = getattr(config, name)
        numbers = value if isinstance(value, tuple) else () if value is None else (value,)
        if not all(0 < number < math.inf for number in numbers):
            raise ValueError(f"{name} must be positive and finite, got {value}")


def check_tol(tol: float | None) -> None:
    """Refuse a relative tolerance of 1 or more, which accepts whatever there is; None passes.

    Raises:
        ValueError: saying so.
    """
    if tol is not None and not tol < 1:
        raise ValueError(f"tol must be below 1 (it is relative: 1 accepts anything), got {tol}")


def plain(value: Any) -> Any:
    """Return numbers of numpy and torch as Python numbers, arrays as nested lists, paths as text.

    What is none of these comes back as it is.
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


def _converted(value: Any, hint: Any) -> Any:
    """Return a value as the annotation has it, or raise _Refused."""
    origin = get_origin(hint)
    known = origin in (Union, types.UnionType, Literal, tuple) or hint in _WORDS
    if not known and not (isinstance(hint, type) and is_dataclass(hint)):
        return value
    value = plain(value)
    if origin in (Union, types.UnionType):
        return _first(value, get_args(hint))
    if origin is Literal:
        return _one_of(value, get_args(hint))
    if origin is tuple:
        return _tuple(value, get_args(hint))
    if hint in (bool, str, types.NoneType):
        return _instance(value, hint)
    return _number(value, hint) if hint in (int, float) else _instance(value, hint)


def _first(value: Any, hints: Sequence[Any]) -> Any:
    for hint in hints:
        try:
            return _converted(value, hint)
        except _Refused:
            continue
    raise _Refused


def _one_of(value: Any, choices: Sequence[Any]) -> Any:
    # A name that is only equal, as numpy's text is, becomes the choice itself.
    for choice in choices:
        if type(value) is not bool and isinstance(value, type(choice)) and value == choice:
            return choice
    raise _Refused


def _tuple(value: Any, hints: Sequence[Any]) -> tuple[Any, ...]:
    if isinstance(value, str | bytes | dict | set) or not hasattr(value, "__iter__"):
        raise _Refused
    items = tuple(value)
    if len(hints) == 2 and hints[1] is Ellipsis:
        hints = [hints[0]] * len(items)
    if len(items) != len(hints):
        raise _Refused
    return tuple(_converted(item, hint) for item, hint in zip(items, hints, strict=True))


def _instance(value: Any, cls: type) -> Any:
    if not isinstance(value, cls):
        raise _Refused
    return str(value) if cls is str else value


def _number(value: Any, cls: type) -> Any:
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


def _described(hint: Any) -> str:
    """Say in words what an annotation asks for."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(map(_described, arguments))
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin is tuple:
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return f"a tuple, every entry {_described(arguments[0])}"
        entry = _described(arguments[0]) if len(set(arguments)) == 1 else "of the right kind"
        return f"a tuple of {len(arguments)}, every entry {entry}"
    return _WORDS.get(hint) or f"a {getattr(hint, '__name__', hint)}"


def _shown(value: Any) -> str:
    text = repr(value)
    text = text if len(text) <= 60 else f"{text[:57]}…"
    return f"{' '.join(text.split())} ({type(value).__name__})"

"""Every annotation of both packages is checked while the tests run.

jaxtyping's hook gives dimensions of one call one size each, and beartype checks the rest. beartype
knows Self only where it decorates classes, and the hook decorates functions: annotations that
mention Self are left out.
"""

from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype

_check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float, as for mypy


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function whose arguments and result are checked."""
    hints = getattr(function, "__annotations__", {})
    function.__annotations__ = {k: v for k, v in hints.items() if "Self" not in str(v)}
    return _check(function)

"""Annotations of both packages are checked while the tests run with LBEN_CHECK_ANNOTATIONS=1.

jaxtyping's hook gives dimensions of one call one size each, and beartype checks the rest. A call
that breaks an annotation either raises an error of its own or fails the test: functions refuse
other kinds and shapes with messages that say more, and tests read these.
"""

import functools
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

import numpy as np
import torch
from beartype import BeartypeConf, FrozenDict, beartype
from jaxtyping import install_import_hook

# An int is a float, as for mypy; NumPy's numbers are taken wherever Python's are.
_NUMBERS = {int: int | np.integer, float: float | int | np.integer | np.floating}
_check = beartype(conf=BeartypeConf(hint_overrides=FrozenDict(_NUMBERS)))


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that checks the arguments and the result of a call.

    Args:
        function: jaxtyping's stand-in for the function of a package. There are two: one is called
            before the function and is not checked, the other afterwards, with the result as ret0
            beside the arguments.
    """
    if "ret0" not in function.__annotations__:
        return function
    # beartype knows Self only where it decorates a class, and what torch passes as ctx is a class
    # that it makes: the annotation lists the attributes that a function puts there.
    hints = {
        k: v for k, v in function.__annotations__.items() if k != "ctx" and "Self" not in str(v)
    }
    function.__annotations__ = hints
    checked = _check(function)

    @functools.wraps(function)
    def unless_traced(*args: Any, **kwargs: Any) -> Any:
        # In a graph sizes are symbols, no integers.
        traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
        return kwargs["ret0"] if traced else checked(*args, **kwargs)

    return unless_traced


class _Kernels(MetaPathFinder):
    """Finds Triton's kernels, which Triton compiles from their source: nothing may wrap them."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return PathFinder.find_spec(name, path, target) if name.endswith("_kernels") else None


def install() -> None:
    """Check the modules of both packages that are imported from now on."""
    install_import_hook(["lben", "solvers"], f"{__name__}.check")
    sys.meta_path.insert(0, _Kernels())

"""Docstrings are true: their examples print what they say, and everything public has one."""

import doctest
import importlib
import inspect
from types import ModuleType

import pytest

from benchmarks import imports

CHECKED = (
    "solvers",
    "lben",
    "lben.weights",
    "lben.parameterizations",
    "lben.certificates",
    "lben.tightening",
    "lben.layers",
    "lben.models",
    "lben.interop",
    "lben.data",
    "lben.training",
    "lben.evaluation",
)
"""Packages whose `__init__` exports nothing without an example."""
NEED_TRITON = ("solvers.backends.triton_kernels", "solvers.backends.pointwise_kernels")


def public_names(package: str) -> list[tuple[str, str]]:
    """Return the names that a package exports."""
    return [(package, name) for name in importlib.import_module(package).__all__]


def examples_of(module: ModuleType) -> list[doctest.DocTest]:
    finder = doctest.DocTestFinder(exclude_empty=True)
    return [test for test in finder.find(module, module.__name__) if test.examples]


@pytest.mark.parametrize("name", [m for m in sorted(imports.modules()) if m != "lben.__main__"])
def test_examples_print_what_they_say(name):
    if name in NEED_TRITON:
        pytest.importorskip("triton")
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    told: list[str] = []
    for test in examples_of(importlib.import_module(name)):
        runner.run(test, out=told.append)
    assert not told, "".join(told)


@pytest.mark.parametrize(
    ("package", "name"), [pair for package in CHECKED for pair in public_names(package)]
)
def test_everything_public_has_a_docstring_with_an_example(package, name):
    value = getattr(importlib.import_module(package), name)
    if not (inspect.isclass(value) or inspect.isroutine(value)):
        return  # a type alias or a constant: the module documents it
    assert value.__doc__ is not None, f"{package}.{name} has no docstring"
    assert ">>>" in value.__doc__, f"{package}.{name} has no example"


def test_a_wrong_example_is_found():
    module = ModuleType("wrong")
    module.__doc__ = ">>> 1 + 1\n3\n"
    runner, told = doctest.DocTestRunner(), []
    for test in examples_of(module):
        runner.run(test, out=told.append)
    assert "Expected:\n    3\nGot:\n    2" in "".join(told)

"""Do the Triton kernels keep to what their compiler, and their interpreter, get right?

Read from the source, so that no Triton is needed.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[3]
# Whose names begin so may multiply matrices with `tl.dot` and round to bfloat16: Triton's
# interpreter multiplies the bits of bfloat16 as integers and truncates where the device rounds, and
# these helpers are right in both.
HELPERS = ("_dot", "_bf16")
FILES = sorted((ROOT / "solvers").rglob("*.py"))


def kernels(source: str) -> Iterator[ast.FunctionDef]:
    """Return the functions that Triton compiles."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            marks = [
                mark.func if isinstance(mark, ast.Call) else mark for mark in node.decorator_list
            ]
            if any(ast.unparse(mark) in ("triton.jit", "jit") for mark in marks):
                yield node


def underscores(function: ast.FunctionDef) -> list[int]:
    """Return the lines that use `_` as a variable: it keeps its type from loop to loop."""
    return [
        node.lineno
        for node in ast.walk(function)
        if isinstance(node, (ast.Name, ast.arg))
        and (node.id if isinstance(node, ast.Name) else node.arg) == "_"
    ]


def bare_products(function: ast.FunctionDef) -> list[int]:
    """Return the lines outside the helpers that call `tl.dot` or speak of bfloat16."""
    if function.name.startswith(HELPERS):
        return []
    found = []
    for node in ast.walk(function):
        called = isinstance(node, ast.Call) and ast.unparse(node.func)
        if called in ("tl.dot", "tl.dot_scaled") or (
            isinstance(node, ast.Attribute) and ast.unparse(node) == "tl.bfloat16"
        ):
            found.append(node.lineno)
    return found


def broken(rule) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{line} in {function.name}"
        for path in FILES
        for function in kernels(path.read_text())
        for line in rule(function)
    ]


def test_there_are_kernels():
    assert sum(len(list(kernels(path.read_text()))) for path in FILES) >= 5


def test_no_kernel_uses_an_underscore_as_a_variable():
    assert broken(underscores) == []


def test_products_and_bfloat16_stay_in_their_helpers():
    assert broken(bare_products) == []


SOURCE = """
@triton.jit
def {name}(x, y):
    for {counter} in range(3):
        x = tl.dot(x, y)
    return x.to(tl.bfloat16)
@triton.jit(do_not_specialize=["y"])
def _sound(x, y):
    return _dot(x, y)
def _(_): return _
"""


def test_the_rules_find_what_they_look_for():
    one, other = kernels(SOURCE.format(name="own", counter="_"))
    assert underscores(one) == [4]
    assert bare_products(one) == [5, 6]
    assert underscores(other) == bare_products(other) == []
    helper, _other = kernels(SOURCE.format(name="_dot_parts", counter="count"))
    assert underscores(helper) == bare_products(helper) == []

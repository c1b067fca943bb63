"""Imports only point down, also inside functions; importing is light."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Each room may import those that stand before it in its own row (and lben all of solvers).
ROOMS = {
    "solvers": (
        "precision dependencies activations compiled elimination operators solution step_size "
        "acceptance inclusion method loop fused splitting mixed acceleration flow newton sweep "
        "auto solve interop gradient implicit budget graphs"
    ),
    "lben": (
        "_companion values records precision weights convolutional rigorous inequality spectrum "
        "parameterizations certificates tightening certified radii local layers models data losses "
        "augmentation optimization recipes checkpoints progress attacks parallel training "
        "evaluation certification reports cli __main__"
    ),
}
FILES = [path for package in ROOMS for path in sorted((ROOT / package).rglob("*.py"))]


def room(path: Path) -> tuple[str, str]:
    package, *rest = path.relative_to(ROOT).with_suffix("").parts
    return package, rest[0]


def imported(path: Path) -> set[tuple[str, ...]]:
    found: set[tuple[str, ...]] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {tuple(alias.name.split(".")) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = tuple((node.module or "").split("."))
            found |= (
                {(*module, alias.name) for alias in node.names} if len(module) == 1 else {module}
            )
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    package, own = room(path)
    if own == "__init__":
        return
    order = ROOMS[package].split()
    assert own in order, f"{own} has no place in the house yet"
    for target in imported(path):
        assert target[0] not in ("tests", "benchmarks")
        if package == "solvers":
            assert target[0] != "lben"
        if target[0] == package and len(target) > 1 and target[1] in order:
            assert order.index(target[1]) <= order.index(own), f"{own} imports {'.'.join(target)}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_file_says_what_it_answers(path):
    assert ast.get_docstring(ast.parse(path.read_text()))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_precision_has_one_setting(path):
    """torch refuses to read its older settings where the newer one was written."""
    code = path.read_text()
    for older in ("allow_tf32", "set_float32_matmul_precision", "get_float32_matmul_precision"):
        assert older not in code, f"{older}: take fp32_precision"


def python(code: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": ""}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, env=environment
    )


def test_importing_is_light():
    code = """
import sys, time
import torch
start = time.perf_counter()
import lben
seconds = time.perf_counter() - start
heavy = {"matplotlib", "cvxpy", "flint", "tensorboard", "onnx", "sklearn"}
print(seconds, sorted(heavy & set(sys.modules)))
"""
    best = min(
        (python(code).stdout.split(maxsplit=1) for _ in range(3)), key=lambda words: float(words[0])
    )
    assert best[1].strip() == "[]"
    assert float(best[0]) < 1.0  # 0.5 s on an idle machine


def test_another_folder_named_solvers_is_named_as_the_culprit(tmp_path):
    (tmp_path / "solvers").mkdir()
    (tmp_path / "solvers" / "__init__.py").touch()
    error = python("import lben", tmp_path).stderr
    assert "a folder named solvers at" in error
    assert "shadows the package of that name" in error

"""Imports only point down, also inside functions; importing is light."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import imports

ROOT = imports.ROOT
FILES = list(imports.modules().values())
MOST = 67
"""Arrows between the rooms of a package."""


def test_imports_point_down():
    wrong = imports.upward(imports.arrows(), imports.order())
    assert not [f"{arrow.source} imports {arrow.target}" for arrow in wrong]


def test_the_map_names_every_file_and_no_other():
    known = imports.order()
    named = {name for names in known.values() for name in names} | set(imports.PACKAGES)
    assert named == set(imports.modules()), named ^ set(imports.modules())


def test_packages_import_neither_tests_nor_benchmarks():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            module = getattr(node, "module", None) or ""
            assert module.split(".")[0] not in ("tests", "benchmarks"), path


@pytest.mark.parametrize("package", imports.PACKAGES)
def test_rooms_know_few_others(package):
    assert sum(map(len, imports.between_rooms(imports.arrows(), package).values())) <= MOST


def test_an_arrow_that_runs_up_is_found():
    known = {"lben": ["lben.a", "lben.b"], "lben.b": ["lben.b.one", "lben.b.two"]}
    down, up = imports.Arrow("lben.b.two", "lben.a"), imports.Arrow("lben.a", "lben.b.one")
    inside = imports.Arrow("lben.b.one", "lben.b.two")
    assert imports.upward([down, up, inside], known) == [up, inside]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_file_says_what_it_answers(path):
    assert ast.get_docstring(ast.parse(path.read_text()))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_precision_has_one_setting(path):
    """torch refuses to read its older settings where the newer one was written."""
    code = path.read_text()
    for older in ("allow_tf32", "set_float32_matmul_precision", "get_float32_matmul_precision"):
        assert older not in code, f"{older}: take fp32_precision"


TESTED_ELSEWHERE = {
    "lben/_solvers.py": "tests/test_architecture.py",
    "solvers/backends/pointwise_kernels.py": "tests/solvers/backends/test_pointwise.py",
    "solvers/backends/triton_kernels.py": "tests/solvers/backends/test_triton.py",
}
"""Files without a test file of their own, and where they are tested."""


def untested(package: str) -> list[str]:
    """Return the source files whose test file is not where one looks for it."""
    missing = []
    for path in sorted((ROOT / package).rglob("*.py")):
        name = path.relative_to(ROOT)
        test = ROOT / "tests" / name.parent / f"test_{name.name}"
        if name.name not in ("__init__.py", "__main__.py") and not test.exists():
            missing.append(name.as_posix())
    return [
        n for n in missing if not (n in TESTED_ELSEWHERE and (ROOT / TESTED_ELSEWHERE[n]).exists())
    ]


@pytest.mark.parametrize("package", imports.PACKAGES)
def test_every_file_has_its_tests_where_one_looks_for_them(package):
    assert not untested(package)


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

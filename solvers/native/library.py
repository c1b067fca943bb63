"""How are the C++ kernels built, and what happens if they cannot be?

At their first use the sources beside this file are compiled for the processor at hand. The compiler
is the command in $CXX, or else c++, g++ or clang++. It takes about three seconds, once per machine,
processor and version; the result is stored in $XDG_CACHE_HOME/lben (by default ~/.cache/lben).
Without a compiler every solve runs in PyTorch, with the same result to rounding. `status()` says
which of both it is and why, and each solution names the loop that ran.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

_FOLDER = Path(__file__).parent
_SOURCES = sorted(_FOLDER.glob("*.cpp"))
_FLAGS = (
    "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-std=c++17", "-shared",
    "-fPIC", "-fopenmp",
)  # fmt: skip
_SECONDS = 120


@dataclass(frozen=True)
class Build:
    """Hold the outcome of a build.

    Attributes:
        kernels: the loaded library; None if there is none.
        message: the path of the library, or why there is none.

    Example:
        >>> Build(kernels=None, message="no compiled kernels: no C++ compiler found")
        Build(kernels=None, message='no compiled kernels: no C++ compiler found')
    """

    kernels: ctypes.PyDLL | None
    message: str


def status() -> str:
    """Return where the compiled kernels are, or why there are none.

    Example:
        >>> "compiled kernels" in status()
        True
    """
    return build().message


@functools.cache
def build() -> Build:
    """Load the compiled kernels, and compile them first if this machine has not done so before.

    Example:
        >>> build().message == status()
        True
    """
    try:
        compiler = _compiler()
        if not compiler:
            return Build(
                None, "no compiled kernels: no C++ compiler found (install g++ or set CXX)"
            )
        path = _cache_folder() / f"kernels-{_fingerprint(compiler)}.so"
        if not _is_intact(path):
            _compile(compiler, path)
        return Build(_load(path), f"compiled kernels: {path}")
    except subprocess.CalledProcessError as error:
        lines = (error.stderr or "").strip().splitlines() or ["no message"]
        return Build(None, f"no compiled kernels: {shlex.join(compiler)} failed: {lines[0]}")
    # ValueError: quotes in CXX that do not close; RuntimeError: no home directory.
    except (OSError, ValueError, RuntimeError, subprocess.TimeoutExpired) as error:
        return Build(None, f"no compiled kernels: {error}")


def _load(path: Path) -> ctypes.PyDLL:
    """Load the library, and give it the functions of Python that its kernels call.

    Kernels release the interpreter's lock while they run, and check for signals. So an exception of
    a signal's handler, such as KeyboardInterrupt, ends a kernel and is raised by the call.
    """
    kernels, python = ctypes.PyDLL(str(path)), ctypes.pythonapi
    functions = (python.PyEval_SaveThread, python.PyEval_RestoreThread, python.PyErr_CheckSignals)
    kernels.lben_python.restype = None
    kernels.lben_python(*(ctypes.cast(function, ctypes.c_void_p) for function in functions))
    return kernels


def _compiler() -> list[str]:
    named = shlex.split(os.environ.get("CXX", ""))
    candidates = [named] if named else [["c++"], ["g++"], ["clang++"]]
    return next(([found, *rest] for name, *rest in candidates if (found := shutil.which(name))), [])


def _cache_folder() -> Path:
    folder = os.environ.get("XDG_CACHE_HOME")
    path = (Path(folder) if folder else Path.home() / ".cache") / "lben"
    path.mkdir(parents=True, exist_ok=True)
    return path


def _fingerprint(compiler: list[str]) -> str:
    """Return a hash of all that the kernels depend on: sources, compiler and processor."""
    command = shlex.join([*compiler, *_FLAGS])
    version = _run([*compiler, "--version"])
    sources = [path.read_text("utf-8") for path in (*_SOURCES, *sorted(_FOLDER.glob("*.h")))]
    parts = [*sources, version, command, platform.machine(), _processor()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _compile(compiler: list[str], path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        fresh = Path(folder) / path.name
        _run([*compiler, *_FLAGS, *map(str, _SOURCES), "-o", str(fresh)])
        kernels = fresh.read_bytes()
        fresh.write_bytes(kernels + hashlib.sha256(kernels).digest())  # loaders ignore the suffix
        fresh.replace(path)  # atomic: two processes may build at once


def _is_intact(path: Path) -> bool:
    """Say whether the file exists and is complete: loading a truncated one ends the process."""
    if not path.exists():
        return False
    content = path.read_bytes()
    return hashlib.sha256(content[:-32]).digest() == content[-32:]


def _run(command: list[str]) -> str:
    return subprocess.run(
        command, capture_output=True, text=True, errors="replace", check=True, timeout=_SECONDS
    ).stdout

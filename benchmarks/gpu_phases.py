"""How many increments, bases and checks does a solve on a GPU make, in Triton's interpreter?

    python -m benchmarks.gpu_phases [--out FILE]

64 random samples, Peaceman–Rachford with its own step size, monotonicity m. 80 units are solved in
one launch, 300 in one launch per step.
"""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported

import torch

from benchmarks.common import finish
from solvers import DenseOperator, Inclusion, PeacemanRachford, ReLU, backends, solve
from solvers.backends import triton as device
from solvers.backends.triton_steps import Steps
from solvers.backends.triton_tiles import kernels

SAMPLES = 64


def random_problem(n: int, m: float) -> Inclusion:
    """Return I − W = VᵀV + S + mI with random V and a random skew S."""
    generator = torch.Generator().manual_seed(0)
    V, S = torch.randn(2, n, n, generator=generator) / n**0.5
    W = (1 - m) * torch.eye(n) - V.T @ V - (S - S.T)
    v = torch.randn(SAMPLES, n, generator=generator)
    return Inclusion(DenseOperator(W), v, ReLU())


def counted(n: int, m: float, tol: float) -> dict[str, Any]:
    """Solve once, and return how often each phase took place."""
    counts: Counter[str] = Counter()
    with _counting(counts):
        stats = solve(random_problem(n, m), PeacemanRachford(), tol=tol).stats
    checks = stats.checks
    return {
        "n": n, "m": m, "tol": tol, "steps": stats.max_steps, "checks": checks,
        "bases": counts["exact"] - checks * (n <= 256), "increments": counts["increment"],
    }  # fmt: skip


class _Counted:
    """A kernel's helper that counts its calls."""

    def __init__(self, own: Any, call: Callable[[], None]) -> None:
        self._own, self._call = own, call

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self._call()
        return self._own(*arguments, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)


@contextmanager
def _counting(counts: Counter[str]) -> Iterator[None]:
    def of(own: Any, name: str) -> _Counted:
        return _Counted(own, lambda: counts.update([name]))

    def method(name: str, kind: str) -> Any:
        own = getattr(Steps, name)

        def call(self: Steps, *arguments: Any) -> Any:
            counts.update([kind])
            return own(self, *arguments)

        return mock.patch.object(Steps, name, call)

    module = kernels()
    with (
        mock.patch.object(backends, "_backend", return_value=device),
        mock.patch.object(module, "_exactly", of(module._exactly, "exact")),
        mock.patch.object(module, "_product", of(module._product, "increment")),
        method("base", "exact"), method("increment", "increment"),
    ):  # fmt: skip
        yield


def main() -> None:
    """Count and print."""
    options = argparse.ArgumentParser(description="phases of solves on a GPU, interpreted")
    options.add_argument("--out", type=Path, help="also write the JSON object to this file")
    out = options.parse_args().out
    rows = []
    for n in (80, 300):
        for m in (0.3, 0.1, 0.03):
            for tol in (1e-3, 1e-4, 1e-5):
                rows.append(counted(n, m, tol))
                print(rows[-1], flush=True)
    finish({"solves": rows}, out)


if __name__ == "__main__":
    main()

"""How long do solves, training steps and evaluations take, here and in another checkout?

    python -m benchmarks.compare OTHER [--quick] [--out FILE]

OTHER is a folder that holds another version of both packages, for example a git worktree of an
earlier commit. One process per version answers in turns, so that both see the same machine; the
ratio of a case is the median over rounds of time(here) / time(there).
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import finish, parser

_CALLS = "calls"


def main() -> None:
    """Run both versions in turns."""
    if sys.argv[1:] == [_CALLS]:
        return _answer()
    options = parser("time of this version ÷ time of another")
    options.add_argument("other", type=Path, help="a folder with the other version's packages")
    arguments = options.parse_args()
    rounds = 7 if arguments.quick else 31
    here = Path(__file__).resolve().parent.parent
    workers = {"here": _worker(here), "there": _worker(arguments.other.resolve())}
    names, _ = (json.loads(_line(w)) for w in workers.values())
    figures: dict[str, Any] = {}
    for name in names:
        seconds: dict[str, list[float]] = {version: [] for version in workers}
        for index in range(rounds + 2):
            for version, worker in workers.items():
                found = _ask(worker, name)
                if index >= 2:
                    seconds[version].append(found)
        pairs = zip(seconds["here"], seconds["there"], strict=True)
        figures[name] = {
            "ratio": round(statistics.median(a / b for a, b in pairs), 3),
            **{f"ms {v}": round(1e3 * statistics.median(s), 3) for v, s in seconds.items()},
        }
        print(name, figures[name], flush=True)
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    finish(figures, arguments.out, rounds=rounds, other=_commit_of(arguments.other))
    return None


def _commit_of(folder: Path) -> str:
    words = ["git", "-C", str(folder), "rev-parse", "--short=12", "HEAD"]
    return subprocess.run(words, capture_output=True, text=True).stdout.strip()


def _worker(folder: Path) -> Any:
    """Start this file against the packages of a folder."""
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.Popen(
        [sys.executable, "-P", "-W", "ignore", __file__, _CALLS], cwd=folder, env=environment,
        text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip


def _line(worker: Any) -> str:
    line: str = worker.stdout.readline()
    if not line:
        sys.exit("benchmarks.compare: a process ended early")
    return line


def _ask(worker: Any, name: str) -> float:
    worker.stdin.write(name + "\n")
    worker.stdin.flush()
    return float(_line(worker))


def _answer() -> None:
    """Time a case by name, again and again, as asked on standard input."""
    calls = dict(_cases())
    print(json.dumps(list(calls)), flush=True)
    for line in sys.stdin:
        call = calls[line.strip()]
        call()
        count, start = 0, time.perf_counter()
        while count < 3 or time.perf_counter() - start < 0.05:
            call()
            count += 1
        print((time.perf_counter() - start) / count, flush=True)


def _cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield what is timed: names and functions, of names that both versions have."""
    from lben import EquilibriumConv2d, EquilibriumLinear, SLLConv2d, SLLLinear
    from solvers import DenseOperator, Inclusion, ReLU, solve

    def step(layer: torch.nn.Module, x: torch.Tensor) -> Callable[[], object]:
        optimizer = torch.optim.SGD(layer.parameters(), lr=1e-6)

        def run() -> None:
            optimizer.zero_grad()
            layer(x).square().mean().backward()
            optimizer.step()

        return run

    def evaluation(layer: torch.nn.Module, x: torch.Tensor) -> Callable[[], object]:
        def run() -> None:
            with torch.no_grad():
                layer(x)

        return run

    for n in (80, 400):
        torch.manual_seed(0)
        layer = EquilibriumLinear(784, n, 10, gamma=1.0)
        x = torch.randn(128, 784)
        yield f"training step, n = {n}", step(layer, x)
        yield f"evaluation, n = {n}", evaluation(EquilibriumLinear(784, n, 10).eval(), x)
        weights = layer.weights().apply(torch.Tensor.detach)
        v = torch.randn(128, n)
        for tol in (1e-3, 1e-5):
            problem = Inclusion(DenseOperator(weights.W, weights.Lambda), v, ReLU())
            yield f"solve, n = {n}, tol {tol:g}", partial(solve, problem, tol=tol)
        doubles = weights.to(torch.float64)
        problem = Inclusion(DenseOperator(doubles.W, doubles.Lambda), v.double(), ReLU())
        yield f"solve, n = {n}, float64, tol 1e-8", partial(solve, problem, tol=1e-8)
    torch.manual_seed(0)
    images = torch.randn(32, 16, 16, 16)
    yield "training step, convolution", step(EquilibriumConv2d(16, 24, 16, image=(16, 16)), images)
    yield "training step, SLL dense", step(SLLLinear(1024, 1024), torch.randn(64, 1024))
    yield "training step, SLL convolution", step(SLLConv2d(16, 24), images)
    yield "evaluation, SLL dense", evaluation(SLLLinear(1024, 1024).eval(), torch.randn(64, 1024))
    yield "evaluation, SLL convolution", evaluation(SLLConv2d(16, 24).eval(), images)


if __name__ == "__main__":
    main()

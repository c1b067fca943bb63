"""How fast are solves on a CUDA device, against the ceilings of the chip and against peers?"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.case import quietly
from benchmarks.common import interleaved
from solvers import (
    DenseOperator,
    Graphed,
    Inclusion,
    MixedPrecision,
    PeacemanRachford,
    ReLU,
    Solution,
    budgeted_equilibrium,
    equilibrium,
    solve,
)
from solvers.interop import TorchDEQ
from solvers.operators.dense import DenseMap
from solvers.step_size import resolve

SIZES = (80, 256, 512, 1024, 4096)
BATCHES = (128, 1024, 8192, 65536)
TOL = 1e-4
ROUNDS = 7
_TORCHDEQ: tuple[Literal["fixed_point_iter", "anderson"], ...] = ("fixed_point_iter", "anderson")
_STEPS = (1.0, 0.5, 0.25, 0.1)
_FRESH = 0.25
"""Seconds: who takes longer is timed in fewer rounds."""


def ceilings(device: str, n: int = 8192) -> dict[str, float]:
    """Measure bytes per second of a copy, and operations per second of matrix products."""
    found = {}
    source = torch.empty(4 * n * n, device=device)
    target = torch.empty_like(source)
    seconds = _median(lambda: target.copy_(source))
    found["copy, B/s"] = 2 * source.nbytes / seconds
    before = torch.backends.cuda.matmul.allow_tf32
    for name, dtype, tf32 in (
        ("float32", torch.float32, False), ("tf32", torch.float32, True),
        ("bfloat16", torch.bfloat16, False), ("float64", torch.float64, False),
    ):  # fmt: skip
        a = torch.randn(n, n, device=device).to(dtype)
        torch.backends.cuda.matmul.allow_tf32 = tf32
        try:
            found[f"{name}, 1/s"] = 2 * n**3 / _median(partial(torch.mm, a, a))
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before
    return found


def speed(
    n: int, batches: Sequence[int], ceiling: dict[str, float], device: str
) -> list[dict[str, Any]]:
    """Time forward and backward solves of n units in float32, milliseconds.

    `share` is the time of the floor ÷ that of the forward solve, the floor being the larger of the
    bytes of v and z at the rate of a copy, and the products of all steps at that of float32.
    """
    rows = []
    for batch in batches:
        problem = device_problem(n, batch, device)
        own = solve(problem, PeacemanRachford(compiled=True), tol=TOL, on_failure="raise")
        steps = own.stats.steps
        seconds = _timed(_candidates(problem, own))
        by_bytes = 8 * n * batch / ceiling["copy, B/s"]
        by_products = 2 * n * n * float(steps.double().sum()) / ceiling["float32, 1/s"]
        rows.append(
            {"n": n, "batch": batch, "steps": own.stats.max_steps, "checks": own.stats.checks}
            | {name: 1e3 * value for name, value in seconds.items()}
            | {"floor, bytes": 1e3 * by_bytes, "floor, products": 1e3 * by_products}
            | {"share": max(by_bytes, by_products) / seconds["lben"]}
            | {"backward / forward": seconds["both"] / seconds["lben"] - 1}
        )
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in rows[-1].items()})
    return rows


def device_problem(n: int, batch: int, device: str) -> Inclusion:
    """Return a problem with m ≥ 0.1 and a skew part of norm near 1, made on the device."""
    g = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device=device)

    V, N = normal(n, n) / n**0.5, normal(n, n) / (2 * math.sqrt(2 * n))
    identity = torch.eye(n, device=device)
    return Inclusion(DenseOperator(0.9 * identity - V.T @ V - N + N.T), normal(batch, n), ReLU())


def _candidates(problem: Inclusion, own: Solution) -> dict[str, Callable[[], object]]:
    """Return lben's solves and all others that arrive; weights are kept, as at inference."""
    operator, steps = problem.operator, own.stats.max_steps
    W, v = operator.tensors[0], problem.bias.clone().requires_grad_()
    method = PeacemanRachford(compiled=True)
    plain = PeacemanRachford(compiled=False)
    alpha = resolve(method.step_size, operator)
    x, map_ = v.detach() * alpha, method.iteration(problem).map
    assert isinstance(map_, DenseMap)
    M = map_.matrix
    torch.compiler.reset()  # every cell has another number of steps: not an eager loop at the ninth
    compiled = torch.compile(_loop)
    graph = Graphed(partial(budgeted_equilibrium, activation=ReLU(), step_size=alpha, steps=steps))

    def both() -> None:
        z = equilibrium(Inclusion(operator, v, ReLU()), method, tol=TOL).value
        torch.autograd.grad(z.sum(), v)

    candidates: dict[str, Callable[[], object]] = {
        "lben": lambda: solve(problem, method, tol=TOL),
        "both": both,
        "unfused": lambda: solve(problem, plain, tol=TOL),
        "torch.compile": lambda: compiled(x, x + x @ M, M, steps),
        "mixed": lambda: solve(problem, MixedPrecision(), tol=TOL),
        "graph, new W": lambda: graph(W, v.detach()),
    }
    peer = _torchdeq(problem)
    if peer is not None:
        candidates["torchdeq"] = peer
    return candidates


def _loop(x: Tensor, shift: Tensor, M: Tensor, steps: int) -> Tensor:
    """Peaceman–Rachford for ReLU, stopped by an oracle."""
    for _ in range(steps):
        x = torch.addmm(shift, x.abs(), M)
    return x.relu()


def _torchdeq(problem: Inclusion) -> Callable[[], object] | None:
    """Return torchdeq's fastest solver with its best step, if one arrives."""
    best: tuple[float, Callable[[], object]] | None = None
    for name in _TORCHDEQ:
        for alpha in _STEPS:
            peer = TorchDEQ(solver=name, step_size=alpha)
            call = partial(solve, problem, peer, tol=TOL, max_steps=300, require_monotone=False)
            solution = quietly(call)
            if not solution.converged:
                continue
            call = partial(quietly, partial(call, max_steps=2 * solution.stats.max_steps))
            start = time.perf_counter()
            finished(call)
            seconds = time.perf_counter() - start
            if best is None or seconds < best[0]:
                best = seconds, call
    return None if best is None else best[1]


def _timed(candidates: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Return medians of interleaved calls; the slow ones take part in three rounds."""
    waiting = {name: partial(finished, call) for name, call in candidates.items()}
    once = interleaved(waiting, 1, warmup=2)
    slow = {name for name, times in once.items() if times[0] > _FRESH}
    found = interleaved({n: c for n, c in waiting.items() if n not in slow}, ROUNDS, warmup=1)
    found |= interleaved({n: waiting[n] for n in sorted(slow)}, 3, warmup=0)
    return {name: statistics.median(found[name]) for name in candidates}


def finished(call: Callable[[], object]) -> None:
    """Call, and wait for the device."""
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _median(call: Callable[[], object]) -> float:
    return statistics.median(interleaved({"": partial(finished, call)}, ROUNDS)[""])

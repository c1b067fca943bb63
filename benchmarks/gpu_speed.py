"""How fast are solves on a CUDA device, against the ceilings of the chip and against peers?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks import gpu_model
from benchmarks.gpu_timing import ROUNDS, Timing, between_events, timed
from solvers import (
    DenseOperator,
    GraphedCallable,
    Inclusion,
    MixedPrecision,
    PeacemanRachford,
    ReLU,
    equilibrium,
    fixed_step_equilibrium,
    solve,
)
from solvers.methods.step_size import choose_step_size
from solvers.operators.matrix import DenseMap

Row = dict[str, Any]
Solver = Literal["fixed_point_iter", "anderson"]

CELLS = ((80, 65536), (512, 65536), (256, 65536), (1024, 65536), (80, 128), (4096, 8192))
"""n and batch, in the order of their value."""
PEERS = ((80, 65536), (512, 65536))
"""Where torch.compile and torchdeq are timed."""
TOL = 1e-4
SETTING: tuple[Solver, float] = ("fixed_point_iter", 0.5)
"""torchdeq's fastest solver and step size at 80 and at 512 units, found by `search` on a CPU."""
_SOLVERS: tuple[Solver, ...] = ("fixed_point_iter", "anderson")
_STEP_SIZES = (1.0, 0.5, 0.25, 0.1)


def ceilings(device: str, n: int = 8192) -> dict[str, float]:
    """Measure bytes per second of a copy, and operations per second of n × n matrix products.

    `precise` is the best rate of a product at float32's accuracy: outside the tensor cores, or of
    three products of TF32 or six of bfloat16 on them.
    """
    found = {}
    source = torch.randn(4 * n * n, device=device)
    target = torch.empty_like(source)
    found["copy, B/s"] = 2 * source.nbytes / _median(lambda: target.copy_(source), device)
    del source, target
    for name, dtype, precision in (
        ("float32", torch.float32, "ieee"), ("tf32", torch.float32, "tf32"),
        ("bfloat16", torch.bfloat16, "ieee"), ("float64", torch.float64, "ieee"),
    ):  # fmt: skip
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        with fp32_precision(precision):
            found[f"{name}, 1/s"] = 2 * n**3 / _median(partial(torch.mm, a, b), device)
    rates = (found["float32, 1/s"], found["tf32, 1/s"] / 3, found["bfloat16, 1/s"] / 6)
    found["precise, 1/s"] = max(rates)
    return found


@contextmanager
def fp32_precision(name: str) -> Iterator[None]:
    """Let float32 products on CUDA run in "ieee" or "tf32" within the block."""
    setting = torch.backends.cuda.matmul
    before = setting.fp32_precision
    setting.fp32_precision = name
    try:
        yield
    finally:
        setting.fp32_precision = before


def _median(call: Callable[[], object], device: str) -> float:
    return timed({"": call}, device)[""].events


def speed(n: int, batch: int, ceiling: dict[str, float], device: str) -> list[Row]:
    """Time forward and backward solves of n units in float32: a row per candidate.

    Each share is the time of the floor ÷ that of the forward solve, on the device or until the host
    has the result. The floor is the larger of two times: the bytes of v, z and W at the rate of a
    copy, and 2n² operations per sample for every step and every check, at the rate that the share
    names: float32 outside the tensor cores, or `precise`.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    problem = device_problem(n, batch, device)
    method = PeacemanRachford(compiled=True)
    own = solve(problem, method, tol=TOL, on_failure="raise")
    stats = own.stats
    found = timed(_candidates(problem, device), device)
    head: Row = {"n": n, "batch": batch}
    rows = [{**head, "who": name, **timing.row()} for name, timing in found.items()]
    products = float(stats.steps.double().sum()) + stats.checks * batch
    by_bytes = (8 * n * batch + 4 * n * n) / ceiling["copy, B/s"]
    chip = gpu_model.chip(torch.cuda.get_device_name() if device == "cuda" else "")
    lben = found["lben"]
    for row in rows:
        timing = found[row["who"]]
        row["÷ lben, device"] = timing.device / lben.device
        row["÷ lben, wall"] = timing.wall / lben.wall
        who = _PREDICTED.get(row["who"])
        if who is not None:
            row["predicted, ms"] = (
                1e-3
                * gpu_model.predict(
                    who,
                    n,
                    batch,
                    steps=stats.max_steps,
                    checks=stats.checks if who == "lben" else None,
                    chip=chip,
                ).microseconds
            )
            row["measured ÷ predicted"] = 1e3 * timing.device / row["predicted, ms"]
    first = rows[0]
    first |= {"steps": stats.max_steps, "checks": stats.checks, "loop": stats.loop}
    for rate in ("float32", "precise"):
        floor = max(by_bytes, 2 * n * n * products / ceiling[f"{rate}, 1/s"])
        first[f"floor, {rate}, ms"] = 1e3 * floor
        first[f"share of {rate}, device"] = floor / lben.device
        first[f"share of {rate}, wall"] = floor / lben.wall
    first["backward ÷ forward, wall"] = found["forward and backward"].wall / lben.wall - 1
    if device == "cuda":
        first["memory, GB"] = torch.cuda.max_memory_allocated() / 1e9
    return rows


_PREDICTED: dict[str, gpu_model.Who] = {"lben": "lben", "unfused": "unfused"}


def _candidates(problem: Inclusion, device: str) -> dict[str, Callable[[], object]]:
    """Return the solves to time; what depends on W alone is kept, as at inference."""
    operator = problem.operator
    v = problem.bias.clone().requires_grad_()
    method, plain = PeacemanRachford(compiled=True), PeacemanRachford(compiled=False)

    def both() -> None:
        z = equilibrium(Inclusion(operator, v, ReLU()), method, tol=TOL).value
        torch.autograd.grad(z.sum(), v)

    return {
        "lben": lambda: solve(problem, method, tol=TOL),
        "forward and backward": both,
        "unfused": lambda: solve(problem, plain, tol=TOL),
        "low precision": lambda: solve(problem, MixedPrecision(), tol=TOL),
    }


def compiled_loop(n: int, batch: int, device: str) -> list[Row]:
    """Time Peaceman–Rachford's loop as torch.compile makes it, stopped by an oracle."""
    problem = device_problem(n, batch, device)
    method = PeacemanRachford(compiled=True)
    own = solve(problem, method, tol=TOL, on_failure="raise")
    x = problem.bias * choose_step_size(method.step_size, problem.operator)
    map_ = method.iteration(problem).map
    assert isinstance(map_, DenseMap)
    M, steps = map_.matrix, own.stats.max_steps
    loop = torch.compile(_loop)
    return _beside_lben(
        {"torch.compile": lambda: loop(x, x + x @ M, M, steps)}, problem, n, batch, device
    )


def _loop(x: Tensor, shift: Tensor, M: Tensor, steps: int) -> Tensor:
    """Peaceman–Rachford for ReLU without checks."""
    for _ in range(steps):
        x = torch.addmm(shift, x.abs(), M)
    return x.relu()


def torchdeq(n: int, batch: int, device: str) -> list[Row]:
    """Time torchdeq's solver with the setting that `search` has found."""
    from solvers.torchdeq import TorchDEQ  # imports the package on use only

    problem = device_problem(n, batch, device)
    solver, step_size = SETTING
    peer = TorchDEQ(solver=solver, step_size=step_size)
    try:
        return _beside_lben({f"torchdeq, {solver}, α = {step_size}": lambda: solve(
            problem, peer, tol=TOL, max_steps=1000, require_monotone=False, on_failure="raise"
        )}, problem, n, batch, device)  # fmt: skip
    except ImportError as error:
        return [{"n": n, "batch": batch, "not installed": str(error)}]


def search(n: int, batch: int = 1024) -> tuple[str, float]:
    """Return torchdeq's solver and step size that take the least time on a CPU."""
    from benchmarks.case import quietly
    from solvers.torchdeq import TorchDEQ

    problem, best = device_problem(n, batch, "cpu"), (math.inf, "", 0.0)
    for solver in _SOLVERS:
        for step_size in _STEP_SIZES:
            peer = TorchDEQ(solver=solver, step_size=step_size)
            call = partial(solve, problem, peer, tol=TOL, max_steps=300, require_monotone=False)
            if quietly(call).converged:
                seconds = min(between_events(partial(quietly, call), 1, "cpu") for _ in range(3))
                best = min(best, (seconds, solver, step_size))
    return best[1:]


def graphed(n: int, batch: int, device: str) -> list[Row]:
    """Time a solve of new weights with a budget of steps, replayed as a CUDA graph."""
    problem = device_problem(n, batch, device)
    method = PeacemanRachford(compiled=True)
    steps = solve(problem, method, tol=TOL, on_failure="raise").stats.max_steps
    alpha = choose_step_size(method.step_size, problem.operator)
    graph = GraphedCallable(
        partial(fixed_step_equilibrium, activation=ReLU(), step_size=alpha, steps=steps)
    )
    W, v = problem.operator.tensors[0], problem.bias
    rows = _beside_lben({"graph, new W": lambda: graph(W, v)}, problem, n, batch, device)
    return [{**row, "status": graph.status} for row in rows]


def _beside_lben(
    others: dict[str, Callable[[], object]], problem: Inclusion, n: int, batch: int, device: str
) -> list[Row]:
    method = PeacemanRachford(compiled=True)
    lben: dict[str, Callable[[], object]] = {"lben": lambda: solve(problem, method, tol=TOL)}
    found: dict[str, Timing] = timed({**lben, **others}, device, ROUNDS)
    return [
        {"n": n, "batch": batch, "who": name, **found[name].row(),
         "÷ lben, device": found[name].device / found["lben"].device,
         "÷ lben, wall": found[name].wall / found["lben"].wall}
        for name in others
    ]  # fmt: skip


def device_problem(n: int, batch: int, device: str) -> Inclusion:
    """Return a problem with m ≥ 0.1 and a skew part of norm near 1, made on the device."""
    g = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device=device)

    V, N = normal(n, n) / n**0.5, normal(n, n) / (2 * math.sqrt(2 * n))
    identity = torch.eye(n, device=device)
    return Inclusion(DenseOperator(0.9 * identity - V.T @ V - N + N.T), normal(batch, n), ReLU())

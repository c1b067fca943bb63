"""Are solves on a device within their proven error of float64 on the CPU, for fresh problems?

    python -m benchmarks.gpu_correctness kernel N DTYPE [--device cpu]
    python -m benchmarks.gpu_correctness first N BATCH [--device cpu]
    python -m benchmarks.gpu_correctness capture
    python -m benchmarks.gpu_correctness small N DTYPE

each end with a line in JSON. Kernels compile, and crash, in a process of their own, and several
processes compile at a time.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_speed import TOL, device_problem
from solvers import (
    DenseOperator,
    DouglasRachford,
    ForwardBackward,
    GraphedCallable,
    Inclusion,
    LeakyReLU,
    LinearSlope,
    MixedPrecision,
    PeacemanRachford,
    ProximalActivation,
    ReLU,
    equilibrium,
    fixed_step_equilibrium,
    solve,
)
from solvers.backends import triton as loop
from solvers.backends.step import Outcome, Request

SIZES = (80, 512, 256, 700, 128, 300, 7, 129)
"""Units, in the order of their value: each kernel, with full tiles and with ragged ones."""
SAMPLES = 304
"""A multiple of 16, for which kernels are specialised, and of no number of rows per program."""
ROOT = Path(__file__).parent.parent
Iterated = PeacemanRachford | DouglasRachford | ForwardBackward
METHODS: tuple[Iterated, ...] = (PeacemanRachford(), DouglasRachford(), ForwardBackward())


def kernel(n: int, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Solve problems that no one has seen before, forward and backward."""
    seed = secrets.randbits(32)
    generator = torch.Generator().manual_seed(seed)
    problem = random_inclusion(n, SAMPLES if device == "cuda" else 5, dtype, generator)
    methods, activations = METHODS, _activations(problem)
    if device == "cpu" and n > 64:  # minutes in the interpreter
        methods, activations = methods[:1], activations[::2]
    checks = {
        f"forward, {type(a).__name__}": forward(problem, a, device, methods) for a in activations
    }
    checks["backward"] = backward(problem, device)
    failed = [name for name, holds in checks.items() if not holds]
    return {"correct": not failed, "checks": len(checks), "failed": failed, "seed": seed}


def first(n: int, batch: int, device: str) -> dict[str, Any]:
    """Compile what `benchmarks.gpu_speed.speed` will time, forward and backward."""
    problem = device_problem(n, batch, device)
    v, method = problem.bias.clone().requires_grad_(), PeacemanRachford(compiled=True)
    start = time.perf_counter()
    own = Inclusion(problem.operator, v, ReLU())
    solution = equilibrium(own, method, tol=TOL, on_failure="raise")
    torch.autograd.grad(solution.value.sum(), v)
    if device == "cuda":
        torch.cuda.synchronize()
    return {
        "n": n, "batch": batch, "loop": solution.stats.loop, "steps": solution.stats.max_steps,
        "checks": solution.stats.checks, "first call, s": time.perf_counter() - start,
    }  # fmt: skip


def capture(device: str) -> dict[str, Any]:
    """Compare a replayed graph of a solve, its weights factored within, with the same eagerly."""
    problem = device_problem(80, 128, device)
    function = partial(fixed_step_equilibrium, activation=ReLU(), step_size=1.0, steps=40)
    graph, far = GraphedCallable(function), 0.0
    for scale in (1.0, 0.9):
        W = (scale * problem.operator.tensors[0]).requires_grad_()
        v = problem.bias.clone().requires_grad_()
        pairs = []
        for call in (graph, function):
            z, _ = call(W, v)
            pairs.append((z.detach(), *torch.autograd.grad(z.sin().sum(), (W, v))))
        for a, b in zip(*pairs, strict=True):
            far = max(far, float((a - b).abs().amax() / b.abs().amax()))
    return {"correct": far < 1e-3, "status": graph.status, "difference": far}


def small(n: int, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Solve one small problem on the device, for a checker of memory."""
    problem = _moved(random_inclusion(n, 37, dtype, torch.Generator().manual_seed(0)), device)
    found = solve(problem, PeacemanRachford(compiled=True), tol=1e-4)
    return {"correct": found.converged, "loop": found.stats.loop}


def memcheck(n: int, dtype: str, limit: float) -> dict[str, Any]:
    """Run `small` under compute-sanitizer's memcheck, where it is and can use the device."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return {"correct": None, "not run": "compute-sanitizer is not installed"}
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", *_command("small", n, dtype)]
    environment = {**_environment(), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        ended = subprocess.run(
            command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False,
            timeout=limit, errors="replace",
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"correct": None, "not run": f"not ended after {limit:.0f} s"}
    text = ended.stdout + ended.stderr
    if "not supported" in text or "ERROR SUMMARY" not in text:
        return {"correct": None, "not run": _last(text)}
    lines = [line for line in text.splitlines() if "ERROR SUMMARY" in line]
    wrong = [line for line in text.splitlines() if "Invalid" in line][:5]
    return {"correct": ended.returncode == 0, "summary": lines[-1].strip("= "), "errors": wrong}


def in_a_process(limit: float, *words: object) -> dict[str, Any]:
    """Run a command of this file in a process of its own, and return its line.

    Raises:
        RuntimeError: if it ends without one.
        TimeoutError: if it has not ended after so many seconds.
    """
    try:
        ended = subprocess.run(
            _command(*words), env=_environment(), cwd=ROOT, capture_output=True, text=True,
            check=False, timeout=limit, errors="replace",
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise TimeoutError(f"not ended after {limit:.0f} s") from error
    if ended.returncode != 0:
        raise RuntimeError(f"ended with status {ended.returncode}: {_last(ended.stderr)}")
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return found


def _command(*words: object) -> list[str]:
    return [sys.executable, "-m", "benchmarks.gpu_correctness", *map(str, words)]


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "2"}


def _last(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (lines or ["no output"])[-1][:500]


def random_inclusion(
    n: int, batch: int, dtype: torch.dtype, generator: torch.Generator
) -> Inclusion:
    """Return a problem on the CPU with m ≥ 0.5 in a metric that is not the identity."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    V, N = normal(n, n) / n**0.5, normal(n, n) / n**0.5
    metric = torch.exp(0.5 * normal(n))
    root = metric.sqrt()
    H = 0.5 * torch.eye(n, dtype=torch.float64) + V.T @ V + N - N.T
    W = torch.eye(n, dtype=torch.float64) - H / root[:, None] * root
    operator = DenseOperator(W.to(dtype), metric.to(dtype))
    return Inclusion(operator, normal(batch, n).to(dtype), ReLU())


def _activations(problem: Inclusion) -> tuple[ProximalActivation, ...]:
    slopes = (problem.bias > 0).to(problem.bias.dtype)
    return ReLU(), LeakyReLU(0.1), LinearSlope(slopes)


def forward(
    problem: Inclusion,
    activation: ProximalActivation,
    device: str,
    methods: Sequence[Iterated] = METHODS,
) -> bool:
    """Compare every splitting's loop on the device with a reference in float64."""
    problem = Inclusion(problem.operator, problem.bias, activation)
    exact = problem.to(torch.float64)
    reference = solve(exact, PeacemanRachford(), tol=1e-12, max_steps=20000)
    there = _moved(problem, device)
    request = Request(tol=1e-3, max_steps=3000)
    holds = True
    for method in methods:
        found = loop.run(there, method.iteration(there), request)
        assert isinstance(found, Outcome), found
        error = exact.operator.norm(found.value.cpu().double() - reference.value)
        bound = exact.error_bound(found.value.cpu()) + reference.error_bound
        holds &= bool((found.residual <= request.tol).all()) and bool((error <= bound).all())
    low = solve(there, MixedPrecision(), tol=1e-5 if problem.bias.dtype == torch.float32 else 1e-9)
    error = exact.operator.norm(low.value.cpu().double() - reference.value)
    return holds and bool((error <= low.error_bound.cpu() + reference.error_bound).all())


def backward(problem: Inclusion, device: str) -> bool:
    """Compare the gradients of W and v with those of float64 on the CPU."""
    tol = 1e-5 if problem.bias.dtype == torch.float32 else 1e-10
    gradients = []
    for own, tol_ in ((_moved(problem, device), tol), (problem.to(torch.float64), 1e-12)):
        W, v = (t.clone().requires_grad_() for t in (own.operator.tensors[0], own.bias))
        operator = DenseOperator(W, own.metric)
        z = equilibrium(Inclusion(operator, v, ReLU()), PeacemanRachford(), tol=tol_).value
        gradients.append([g.cpu().double() for g in torch.autograd.grad(z.sin().sum(), (W, v))])
    # An active unit at rounding from its kink may be counted as inactive: few entries may differ.
    pairs = zip(*gradients, strict=True)
    near = [((a - b).abs() <= 1e3 * tol * b.abs().amax()).double().mean() for a, b in pairs]
    return bool(min(near) > 0.999)


def _moved(problem: Inclusion, device: str) -> Inclusion:
    operator, activation = problem.operator, problem.activation
    if isinstance(activation, LinearSlope):
        activation = LinearSlope(activation.d.to(device))
    W = DenseOperator(operator.tensors[0].to(device), operator.metric.to(device))
    return Inclusion(W, problem.bias.to(device), activation)


def main() -> None:
    """Run one check and print its line."""
    options = argparse.ArgumentParser(description="one check of the kernels")
    options.add_argument("what", choices=("kernel", "first", "capture", "small"))
    options.add_argument("words", nargs="*")
    options.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    arguments = options.parse_args()
    device, words = arguments.device, arguments.words
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported
    found: dict[str, Any]
    if arguments.what == "capture":
        found = capture(device)
    elif arguments.what == "first":
        found = first(int(words[0]), int(words[1]), device)
    else:
        call = kernel if arguments.what == "kernel" else small
        found = call(int(words[0]), getattr(torch, words[1]), device)
    print(json.dumps(found))


if __name__ == "__main__":
    main()

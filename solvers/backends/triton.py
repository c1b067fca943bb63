"""Which problems does the loop on a CUDA device solve, and how are they handed to it?

Dense W on a CUDA device, a piecewise linear activation, float32 or float64. A float32 product runs
on the tensor cores as three products of TF32 or six of bfloat16, with the error of float32. Most
steps of a solve take one product of bfloat16 (Note [Increments] of `triton_kernels`). If the
environment asks for Triton's interpreter (TRITON_INTERPRET=1), problems in host memory run there,
slowly.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from solvers.activations import PIECEWISE_LINEAR
from solvers.backends.step import FIRST_CHECK, Iteration, Outcome, Request, materialize
from solvers.backends.triton_launch import has_triton, try_launch
from solvers.backends.triton_steps import run_stepwise
from solvers.backends.triton_tiles import Loop, is_interpreted, kernels
from solvers.inclusion import Inclusion
from solvers.operators import DenseOperator

MOST_STEPS = 2**31 - 1
"""The largest step limit: kernels count steps in 32 bits."""


def find_obstacle(problem: Inclusion) -> str | None:
    """Return why the loop on the device cannot solve this problem, or None if it can."""
    operator, v = problem.operator, problem.bias
    if type(operator) is not DenseOperator:
        return f"the operator is a {type(operator).__name__}, not a DenseOperator"
    if v.device.type != "cuda" and not is_interpreted():
        return f"the problem is on {v.device}, not on a CUDA device"
    if v.dtype not in (torch.float32, torch.float64):
        return f"the problem is {v.dtype}, neither float32 nor float64"
    if type(problem.activation) not in PIECEWISE_LINEAR:
        return f"{problem.activation!r} is not piecewise linear"
    if not has_triton():
        return "Triton is not installed (pip install triton)"
    try:
        v.data_ptr(), operator.W.data_ptr()
    except RuntimeError:
        return "a function transform (torch.func) hides the memory of its tensors"
    return None


def run(problem: Inclusion, iteration: Iteration, request: Request) -> Outcome | str:
    """Solve a problem for which `find_obstacle` returned None.

    Returns:
        The outcome, or why the kernels cannot run on this device.
    """
    request = replace(request, max_steps=min(request.max_steps, MOST_STEPS))
    if problem.bias.shape[0] == 0:
        v = problem.bias
        none = v.new_empty(0)
        return Outcome(
            value=torch.empty_like(v), residual=none, steps=none.long(), checks=0, loop="device"
        )
    loop = Loop.prepare(problem, iteration)
    if loop.cut.resident:
        return _run_resident(loop, request)
    return run_stepwise(problem, loop, request)


def run_fixed_steps(
    problem: Inclusion, iteration: Iteration, steps: int
) -> tuple[Tensor, Tensor] | None:
    """Take a number of steps in one launch without waiting, as `solvers.backends` says.

    Returns:
        z and its relative residual per sample, or None if no kernel does all steps in one launch.
    """
    if find_obstacle(problem) is not None or len(problem.bias) == 0 or steps > MOST_STEPS:
        return None
    if not Loop.choose_cut(problem).resident:
        return None
    out_of_reach = 2.0**-20 * torch.finfo(problem.bias.dtype).eps
    request = Request(tol=out_of_reach, max_steps=steps)
    found = _launch(Loop.prepare(problem, iteration), request, budget=True)
    return None if isinstance(found, str) else (found.z, found.residual)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Result:
    """Hold the tensors that the kernel writes."""

    z: Tensor
    residual: Tensor
    steps: Tensor
    summary: Tensor


def _run_resident(loop: Loop, request: Request) -> Outcome | str:
    found = _launch(loop, request)
    if isinstance(found, str):
        return found
    bits, checks = found.summary.tolist()  # the one wait for the device
    (worst,) = struct.unpack("d", struct.pack("q", bits))
    return Outcome(
        value=found.z, residual=found.residual, steps=found.steps, checks=checks, loop="device",
        worst=worst,
    )  # fmt: skip


def _launch(loop: Loop, request: Request, *, budget: bool = False) -> _Result | str:
    v, cut, own = loop.v, loop.cut, loop.prepared
    samples, n = v.shape
    found = _Result(
        z=torch.empty_like(v), residual=v.new_empty(samples),
        steps=v.new_empty(samples, dtype=torch.int64),
        summary=v.new_zeros(2, dtype=torch.int64),
    )  # fmt: skip
    programs = -(-samples // cut.rows)
    start = None if request.z0 is None else materialize(request.z0)
    memory = aside = v  # scratch of the programs; not needed by those that hold all matrices
    if cut.held < 2:
        memory = own.map.new_empty(programs * cut.rows, own.parts, cut.width)
    if cut.held == 0 and own.parts == 3:
        aside = v.new_empty(programs * cut.rows, cut.width)
    reason = try_launch(
        kernels().resident, (programs,),
        v, v if start is None else start, own.map, own.weights, own.alpha, own.root, own.reach,
        v if loop.slope is None else loop.slope, own.size, found.z, found.residual, found.steps,
        found.summary, memory, aside,
        samples, n, loop.numbers(request.tol, permanent=budget), request.max_steps, FIRST_CHECK,
        DONE=loop.iteration.initial_steps, WARM=start is not None, ROWS=cut.rows, BLOCKS=cut.blocks,
        WIDTH=cut.width, DEPTH=cut.depth, PARTS=own.parts, HELD=cut.held,
        BUDGET=budget, num_warps=cut.warps, **loop.flags,
    )  # fmt: skip
    return found if reason is None else reason

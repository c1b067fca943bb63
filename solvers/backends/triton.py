"""Which problems does the loop on a CUDA device solve, and how are they handed to it?

Dense W on a CUDA device, an activation that is linear on either side of zero or linear per sample,
float32 or float64. Products of float32 run on the tensor cores in three TF32 or six bfloat16
products, whose error is that of float32, and most steps of a solve in one of bfloat16
(Note [Increments] of `device_kernels`). Where the environment asks for Triton's interpreter
(TRITON_INTERPRET=1), problems in the memory of the processor run there, slowly.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from solvers.activations import PIECEWISE_LINEAR
from solvers.backends.step import FIRST_CHECK, Iteration, Outcome, Request, plain
from solvers.backends.triton_launch import has_triton, launch_or_fall_back
from solvers.backends.triton_steps import run_stepwise
from solvers.backends.triton_tiles import Loop, interpreted, kernels
from solvers.inclusion import Inclusion
from solvers.operators import DenseOperator

MOST_STEPS = 2**31 - 1
"""Kernels count in 32 bits."""


def supports(problem: Inclusion) -> str | None:
    """Return why the loop on the device cannot solve this problem, or None when it can."""
    operator, v = problem.operator, problem.bias
    if type(operator) is not DenseOperator:
        return f"the operator is a {type(operator).__name__}, not a DenseOperator"
    if v.device.type != "cuda" and not interpreted():
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
    """Solve a flat problem that `supports` accepts, or say why its kernel cannot run here."""
    request = replace(request, max_steps=min(request.max_steps, MOST_STEPS))
    if problem.bias.shape[0] == 0:
        v = problem.bias
        none = v.new_empty(0)
        return Outcome(
            value=torch.empty_like(v), residual=none, steps=none.long(), checks=0, loop="device"
        )
    loop = Loop.of(problem, iteration)
    if loop.cut.resident:
        return _run_resident(loop, request)
    return run_stepwise(problem, loop, request)


def run_fixed_steps(
    problem: Inclusion, iteration: Iteration, steps: int
) -> tuple[Tensor, Tensor] | None:
    """Return z and its relative residual after some steps, or at rest, and never wait.

    None where no kernel solves the problem in one launch.
    """
    if supports(problem) is not None or len(problem.bias) == 0 or steps > MOST_STEPS:
        return None
    if not Loop.cut_of(problem).resident:
        return None
    out_of_reach = 2.0**-20 * torch.finfo(problem.bias.dtype).eps
    request = Request(tol=out_of_reach, max_steps=steps)
    found = _launch(Loop.of(problem, iteration), request, budget=True)
    return None if isinstance(found, str) else (found.z, found.residual)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Found:
    """What the kernel writes."""

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


def _launch(loop: Loop, request: Request, *, budget: bool = False) -> _Found | str:
    v, cut, own = loop.v, loop.cut, loop.prepared
    samples, n = v.shape
    found = _Found(
        z=torch.empty_like(v), residual=v.new_empty(samples),
        steps=v.new_empty(samples, dtype=torch.int64),
        summary=v.new_zeros(2, dtype=torch.int64),
    )  # fmt: skip
    programs = -(-samples // cut.rows)
    start = None if request.z0 is None else plain(request.z0)
    memory = aside = v  # of the programs' own: not of those that hold all matrices
    if cut.held < 2:
        memory = own.map.new_empty(programs * cut.rows, own.parts, cut.width)
    if cut.held == 0 and own.parts == 3:
        aside = v.new_empty(programs * cut.rows, cut.width)
    reason = launch_or_fall_back(
        kernels().resident, (programs,),
        v, v if start is None else start, own.map, own.weights, own.alpha, own.root, own.reach,
        v if loop.slope is None else loop.slope, own.size, found.z, found.residual, found.steps,
        found.summary, memory, aside,
        samples, n, loop.numbers(request.tol, lasting=budget), request.max_steps, FIRST_CHECK,
        DONE=loop.iteration.done, WARM=start is not None, ROWS=cut.rows, BLOCKS=cut.blocks,
        WIDTH=cut.width, DEPTH=cut.depth, PARTS=own.parts, HELD=cut.held,
        BUDGET=budget, num_warps=cut.warps, **loop.flags,
    )  # fmt: skip
    return found if reason is None else reason

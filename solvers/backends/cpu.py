"""Which problems does the compiled loop solve, and how are they handed to it?

Dense W in host memory, a piecewise linear activation, float32 or float64. A float64 problem
iterates mostly in float32: at every check its residual is evaluated in float64, and the float32
iteration computes a correction from it.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from solvers.activations import PIECEWISE_LINEAR
from solvers.backends.step import Iteration, Outcome, Request, materialize, slope_coefficients
from solvers.inclusion import Inclusion
from solvers.native import Build, build
from solvers.operators import DenseOperator
from solvers.operators.matrix import DenseMap

_KINDS = {torch.float32: "float", torch.float64: "double"}


class _Problem(ctypes.Structure):
    """Mirror `Problem<T>` of splitting.cpp, field by field."""

    _fields_ = [
        ("n", ctypes.c_int64), ("samples", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in (
            "map", "rough", "weights", "bias", "start", "alpha", "root", "slope"
        )),
        ("negative", ctypes.c_double), ("reflected", ctypes.c_int64),
        ("max_steps", ctypes.c_int64), ("threads", ctypes.c_int64),
        *((name, ctypes.c_double) for name in ("theta", "tol", "noise")),
        ("done", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("z", "residual", "steps", "checks")),
    ]  # fmt: skip


def find_obstacle(problem: Inclusion) -> str | None:
    """Return why the compiled loop cannot solve this problem, or None if it can."""
    operator, v = problem.operator, problem.bias
    if type(operator) is not DenseOperator:
        return f"the operator is a {type(operator).__name__}, not a DenseOperator"
    if v.device.type != "cpu":
        return f"the problem is on {v.device}, not on the CPU"
    if v.dtype not in _KINDS:
        return f"the problem is {v.dtype}, neither float32 nor float64"
    if type(problem.activation) not in PIECEWISE_LINEAR:
        return f"{problem.activation!r} is not piecewise linear"
    try:
        v.data_ptr(), operator.W.data_ptr()
    except RuntimeError:
        return "a function transform (torch.func) hides the memory of its tensors"
    result = build()
    return None if result.kernels is not None else result.message


def run(problem: Inclusion, iteration: Iteration, request: Request) -> Outcome:
    """Solve a problem for which `find_obstacle` returned None.

    Raises:
        MemoryError: if there is no memory for the loop.
    """
    kernels = _kernels()
    operator, v = problem.operator, materialize(problem.bias)
    assert isinstance(operator, DenseOperator)
    prepared = operator.memo(("compiled", iteration.map), lambda: _prepare(operator, iteration))
    samples = v.shape[0]
    z = torch.empty_like(v)
    residual = v.new_empty(samples)
    steps, checks = v.new_empty(samples, dtype=torch.int64), ctypes.c_int64()
    slope, negative = slope_coefficients(problem.activation)
    start = None if request.z0 is None else materialize(request.z0)
    arguments = _Problem(
        n=operator.n, samples=samples, map=prepared.map.data_ptr(),
        rough=_pointer(prepared.rough), weights=prepared.weights.data_ptr(), bias=v.data_ptr(),
        start=_pointer(start), alpha=prepared.alpha.data_ptr(), root=prepared.root.data_ptr(),
        slope=_pointer(slope), negative=negative, reflected=iteration.reflected,
        max_steps=request.max_steps - iteration.initial_steps, threads=torch.get_num_threads(),
        theta=iteration.relaxation, tol=request.tol, noise=problem.roundoff_share,
        done=iteration.initial_steps, z=z.data_ptr(), residual=residual.data_ptr(),
        steps=steps.data_ptr(), checks=ctypes.addressof(checks),
    )  # fmt: skip
    if getattr(kernels, f"lben_solve_{_KINDS[v.dtype]}")(ctypes.byref(arguments)) != 0:
        raise MemoryError(f"the compiled loop found no memory for {operator.n} units")
    return Outcome(value=z, residual=residual, steps=steps, checks=checks.value, loop="compiled")


@dataclass(frozen=True, eq=False)
class _Prepared:
    map: Tensor
    rough: Tensor | None
    weights: Tensor
    alpha: Tensor
    root: Tensor


def _prepare(operator: DenseOperator, iteration: Iteration) -> _Prepared:
    W = operator.W.detach()
    alpha = (
        torch.as_tensor(iteration.alpha, dtype=W.dtype, device=W.device)
        .expand(operator.n)
        .contiguous()
    )
    assert isinstance(iteration.map, DenseMap)
    matrix = iteration.map.matrix
    return _Prepared(
        map=_pack(matrix),
        rough=_pack(matrix.float()) if W.dtype == torch.float64 else None,
        weights=_pack(W.T),
        alpha=alpha,
        root=operator.root_metric.contiguous(),
    )


def _pack(matrix: Tensor) -> Tensor:
    """Return the columns of a matrix in panels, in the order that the compiled product reads."""
    kernels, kind, n = _kernels(), _KINDS[matrix.dtype], matrix.shape[0]
    lanes = getattr(kernels, f"lben_lanes_{kind}")()
    packed = matrix.new_empty(n * (n + -n % lanes))
    getattr(kernels, f"lben_pack_{kind}")(
        ctypes.c_void_p(matrix.data_ptr()),
        *map(ctypes.c_int64, (*matrix.stride(), n, torch.get_num_threads())),
        ctypes.c_void_p(packed.data_ptr()),
    )
    return packed


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _kernels() -> ctypes.PyDLL:
    result: Build = build()
    assert result.kernels is not None, result.message
    return result.kernels

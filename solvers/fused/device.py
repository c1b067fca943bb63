"""Which problems does the loop on a CUDA device solve, and how are they handed to it?

Dense W on a CUDA device, an activation that is linear on either side of zero or linear per sample,
float32 or float64; products run in that precision. Where the environment asks for Triton's
interpreter (TRITON_INTERPRET=1), problems in the memory of the processor run there, slowly.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
import os
from dataclasses import dataclass, replace
from types import ModuleType

import torch
from torch import Tensor

from solvers.activations import PIECEWISE_LINEAR
from solvers.fused.iteration import Iteration, coefficients, plain
from solvers.inclusion import Inclusion
from solvers.loop import FIRST_CHECK, STALL, Splitting, State, drive
from solvers.method import Outcome, Request
from solvers.operators import DenseOperator
from solvers.operators.dense import DenseMap

RESIDENT, TILED = 128, 512
"""The most units that `resident` and `tiled` are given."""


@dataclass(frozen=True)
class Shape:
    """How a kernel is cut: samples and units per program, depth of a product, warps."""

    rows: int
    units: int
    depth: int
    warps: int


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
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    try:
        v.data_ptr(), operator.W.data_ptr()
    except RuntimeError:
        return "a function transform (torch.func) hides the memory of its tensors"
    return None


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def run(problem: Inclusion, iteration: Iteration, request: Request) -> Outcome:
    """Solve a flat problem that `supports` accepts."""
    if problem.operator.n > TILED:
        left = replace(request, max_steps=request.max_steps - iteration.done)
        found = drive(problem, _Advanced(iteration=iteration), left)
        return replace(found, steps=found.steps + iteration.done, loop="device")
    samples, n = problem.bias.shape
    loop = _Loop.of(problem, iteration)
    shape = _shape(n, problem.bias.dtype)
    z = torch.empty_like(loop.v)
    residual, steps = z.new_zeros(samples), z.new_zeros(samples, dtype=torch.int64)
    programs = -(-samples // shape.rows)
    checks = steps.new_zeros(programs)
    start = None if request.z0 is None else plain(request.z0)
    scratch: tuple[Tensor, ...] = ()
    sizes: dict[str, int] = {"ROWS": shape.rows, "UNITS": shape.units}
    if n > RESIDENT:
        scratch = (z.new_empty(samples, 2, n), torch.empty_like(z))
        sizes["DEPTH"] = shape.depth
    kernel = _kernels().tiled if scratch else _kernels().resident
    if samples:
        kernel[(programs,)](
            loop.v, loop.v if start is None else start, loop.map, loop.W, loop.alpha, loop.root,
            loop.v if loop.slope is None else loop.slope, z, residual, steps, checks, *scratch,
            samples, n, *loop.map.stride(), *loop.W.stride(), loop.numbers(request.tol),
            request.max_steps, FIRST_CHECK, DONE=iteration.done, REFLECTED=iteration.reflected,
            SLOPES=loop.slope is not None, WARM=start is not None, PRECISION="ieee",
            num_warps=shape.warps, **sizes,
        )  # fmt: skip
    return Outcome(
        value=z, residual=residual, steps=steps, loop="device",
        checks=int(checks.max()) if samples else 0,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)
class _Loop:
    """The tensors of one solve, in order in memory except the matrices."""

    v: Tensor
    map: Tensor
    W: Tensor
    alpha: Tensor
    root: Tensor
    slope: Tensor | None
    negative: float
    theta: float
    noise: float
    size: float

    @staticmethod
    def of(problem: Inclusion, iteration: Iteration) -> _Loop:
        operator = problem.operator
        assert isinstance(operator, DenseOperator)
        assert isinstance(iteration.map, DenseMap)
        v = plain(problem.bias)
        slope, negative = coefficients(problem.activation)
        alpha = torch.as_tensor(iteration.alpha, dtype=v.dtype, device=v.device)
        return _Loop(
            v=v, map=iteration.map.matrix.detach().resolve_neg(),
            W=operator.W.detach().resolve_neg(), alpha=alpha.expand(operator.n).contiguous(),
            root=operator.metric.detach().sqrt().contiguous(), slope=slope, negative=negative,
            theta=iteration.relaxation, noise=problem.noise_factor, size=_size(operator),
        )  # fmt: skip

    def numbers(self, tol: float) -> Tensor:
        """Return `NUMBERS` of the kernels."""
        finfo = torch.finfo(self.v.dtype)
        values = {
            "negative": self.negative, "theta": self.theta, "tol": tol, "noise": self.noise,
            "limit": STALL * finfo.eps, "one": 1.0, "infinity": math.inf,
            "size": self.size,
            "own": 16 * finfo.eps if self.v.dtype == torch.float32 else 0.0,
            "least": 4 * finfo.tiny, "most": 0.25 / finfo.tiny,
        }  # fmt: skip
        return self.v.new_tensor([values[name] for name in _kernels().NUMBERS])


def _size(operator: DenseOperator) -> float:
    """Return Frobenius' norm of Λ^½WΛ^(−½): rounding of a product is relative to it."""

    def evaluate() -> float:
        root = operator.root_metric
        return float(torch.linalg.matrix_norm(operator.W.detach() * root[:, None] / root))

    return operator.memo(("size", operator.transposed), evaluate)


@dataclass(frozen=True, kw_only=True, repr=False)
class _Advanced(Splitting):
    """One launch per step, checks by `solvers.loop`: for matrices too large for the cache."""

    iteration: Iteration

    def init(self, problem: Inclusion, z0: Tensor | None) -> State:
        loop, it = _Loop.of(problem, self.iteration), self.iteration
        x = loop.v * loop.alpha
        shift = it.map.add(x, x, None) if it.reflected else x
        if z0 is not None and it.reflected:
            x = z0 + loop.alpha * (problem.operator.affine(z0, loop.v) - z0)
        elif z0 is not None:
            x = it.map.add(z0, x, None)
        shape, numbers = _shape(x.shape[1], x.dtype), loop.numbers(1.0)

        def advance(x: Tensor) -> Tensor:
            (samples, n), out = x.shape, torch.empty_like(x)
            _kernels().advance[(-(-samples // shape.rows), -(-n // shape.units))](
                x, shift, out, loop.map, loop.alpha, x if loop.slope is None else loop.slope,
                samples, n, *loop.map.stride(), numbers, REFLECTED=it.reflected,
                SLOPES=loop.slope is not None, ROWS=shape.rows, UNITS=shape.units,
                DEPTH=shape.depth, PRECISION="ieee", num_warps=shape.warps,
            )  # fmt: skip
            return out

        return State(x, it.map, shift, advance, x)

    def step(self, problem: Inclusion, state: State) -> State:
        state.x = state.apply(state.x)
        return state

    def value(self, problem: Inclusion, state: State) -> Tensor:
        return problem.activation.prox(state.x, self.iteration.alpha)


def _shape(n: int, dtype: torch.dtype) -> Shape:
    """Return how kernels are cut for n units: what fits the registers of a multiprocessor."""
    double = dtype == torch.float64
    if n <= RESIDENT:
        units = max(16, 1 << (n - 1).bit_length())
        return Shape(rows=16 if double else 32, units=units, depth=units, warps=8)
    if n <= TILED:
        return Shape(rows=16 if double else 32, units=64 if double else 128, depth=32, warps=8)
    return Shape(rows=64 if double else 128, units=64 if double else 128, depth=32, warps=8)


@functools.cache
def _kernels() -> ModuleType:
    return importlib.import_module("solvers.fused.device_kernels")

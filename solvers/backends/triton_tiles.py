"""How is a problem cut into tiles for a CUDA device, and which tensors do its kernels get?

A `Cut` gives the tiles, `Prepared` the padded matrices, and a `Loop` all that one solve is given.
"""

from __future__ import annotations

import functools
import importlib
import math
import os
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from solvers.backends.step import STALL, Iteration, materialize, slope_coefficients
from solvers.inclusion import Inclusion
from solvers.operators import DenseOperator
from solvers.operators.matrix import DenseMap


def is_interpreted() -> bool:
    """Say whether kernels run in Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class Cut:
    """Hold how a problem is cut for a kernel.

    Attributes:
        blocks: units of each tile; their sum is the width to which matrices are padded.
        rows: samples per program.
        depth: units that a product reads at a time from a matrix that is not on the chip.
        warps: warps per program.
        resident: whether one launch solves the problem, with x and M on the chip; else one launch
            takes one step.
        held: how many matrices are wholly on the chip, with all their parts: 2 (M and W), 1 (M) or
            0.
    """

    blocks: tuple[int, ...]
    rows: int
    depth: int
    warps: int
    resident: bool = True
    held: int = 0

    @property
    def width(self) -> int:
        """Return the number of units with padding."""
        return sum(self.blocks)


def choose_cut(n: int, dtype: torch.dtype, most: int = 256) -> Cut:
    """Return the tiles for n units that fit the registers and memory of a multiprocessor.

    The limits were found from the compiled kernels (`benchmarks.gpu_compiled`).

    Args:
        n: number of units.
        dtype: of the problem.
        most: how many units may stay on the chip in float32; see `most_resident`.
    """
    if dtype == torch.float64:
        for blocks in ((16,), (32,), (64,), (64, 64)):
            if n <= sum(blocks):
                return Cut(blocks, rows=32, depth=16, warps=8)
        return Cut(_tiles(n, 64), rows=64, depth=16, warps=4, resident=False)
    for blocks in ((32,), (64,), (64, 16)):
        if n <= sum(blocks) <= most:
            return Cut(blocks, rows=64, depth=16, warps=4, held=2)
    for width, depth in ((128, 32), (256, 16)):
        if n <= width <= most:
            held = int(width == 128 and most == 256)
            return Cut((width,), rows=64, depth=depth, warps=8, held=held)
    return Cut(_tiles(n, 128), rows=128, depth=32, warps=8, resident=False)


def most_resident(capability: tuple[int, int]) -> int:
    """Return how many units of float32 stay on the chip, for a device's compute capability.

    A block has 227 KiB of shared memory on 9.0, 163 KiB on 8.0, and 99 KiB on 8.6 and 8.9. From
    10.0 on products use tensor memory, and Triton 3.6 does not compile the loop for it.
    """
    if capability >= (10, 0):
        return 0
    return {(9, 0): 256, (8, 0): 128}.get(capability, 80)


def _capability(device: torch.device) -> tuple[int, int]:
    if is_interpreted():
        return 9, 0
    return torch.cuda.get_device_capability(device if device.type == "cuda" else None)


def _tiles(n: int, units: int) -> tuple[int, ...]:
    return (units,) * -(-n // units)


@dataclass(frozen=True, kw_only=True, eq=False)
class Prepared:
    """Hold all that is computed from W once: matrices, padded with zeros to the width of the tiles.

    Attributes:
        map: M, or its three parts if it stays on the chip in float32; see Note [Six products] of
            `triton_kernels`.
        low: M rounded to bfloat16, which is the first of the parts; None in float64.
        weights: Wᵀ, stored as `map` is.
        parts: number of parts, 1 or 3.
        alpha: step sizes α, padded with 1.
        root, reach: Λ^½ and Λ^½/α, padded with 0.
        size: Frobenius norm of Λ^½WΛ^(−½), one number.
    """

    map: Tensor
    low: Tensor | None
    weights: Tensor
    parts: int
    alpha: Tensor
    root: Tensor
    reach: Tensor
    size: Tensor

    @staticmethod
    def pad(operator: DenseOperator, iteration: Iteration, cut: Cut) -> Prepared:
        W, root, n = operator.W.detach(), operator.root_metric, operator.n
        assert isinstance(iteration.map, DenseMap)
        line = (0, cut.width - n)
        parts = 3 if cut.resident and W.dtype == torch.float32 else 1

        def pad_matrix(matrix: Tensor) -> Tensor:
            whole = nn.functional.pad(matrix.resolve_neg(), 2 * line).contiguous()
            return whole if parts == 1 else torch.stack(_split_bfloat16(whole, parts))

        alpha = iteration.alpha  # a number is not copied from the host: that would wait
        alpha = (alpha if isinstance(alpha, Tensor) else W.new_full((), alpha)).expand(n)
        M, low = pad_matrix(iteration.map.matrix.detach()), None
        if W.dtype == torch.float32:
            low = M[0] if parts == 3 else _split_bfloat16(M, 1)[0]
        return Prepared(
            map=M, low=low, weights=pad_matrix(W.T), parts=parts,
            alpha=nn.functional.pad(alpha, line, value=1.0), root=nn.functional.pad(root, line),
            reach=nn.functional.pad(root / alpha, line),
            size=torch.linalg.matrix_norm(W * root[:, None] / root).reshape(1),
        )  # fmt: skip


def _split_bfloat16(matrix: Tensor, count: int) -> list[Tensor]:
    """Return matrices of bfloat16 numbers that sum up to a matrix, the largest first.

    They are stored in float32 for Triton's interpreter, which multiplies the bits of bfloat16 as
    integers.
    """
    parts = []
    for _ in range(count):
        part = matrix.bfloat16()
        matrix = matrix - part.float()
        parts.append(part.float() if is_interpreted() else part)
    return parts


@dataclass(frozen=True, kw_only=True, eq=False)
class Loop:
    """Hold the tensors of one solve."""

    v: Tensor
    slope: Tensor | None
    negative: float
    iteration: Iteration
    prepared: Prepared
    cut: Cut

    @staticmethod
    def prepare(problem: Inclusion, iteration: Iteration) -> Loop:
        operator = problem.operator
        assert isinstance(operator, DenseOperator)
        slope, negative = slope_coefficients(problem.activation)
        size = Loop.choose_cut(problem)
        return Loop(
            v=materialize(problem.bias), slope=slope, negative=negative, iteration=iteration,
            cut=size,
            prepared=operator.memo(
                ("device", iteration.map, size),
                lambda: Prepared.pad(operator, iteration, size),
            ),
        )  # fmt: skip

    @staticmethod
    def choose_cut(problem: Inclusion) -> Cut:
        """Return the tiles of a problem on its device."""
        operator = problem.operator
        return choose_cut(operator.n, operator.dtype, most_resident(_capability(operator.device)))

    @property
    def precision(self) -> str:
        """Return the name of Triton's precision for float32 products.

        On CUDA's tensor cores a product is three of TF32. Triton's interpreter and AMD's devices
        multiply in float32.
        """
        whole = self.v.dtype == torch.float64 or is_interpreted() or torch.version.hip is not None
        return "ieee" if whole else "tf32x3"

    @property
    def flags(self) -> dict[str, Any]:
        """Return the constants that kernels are compiled for."""
        kind = "linear" if self.slope is not None else "sides"
        if self.iteration.reflected and self.slope is None and self.negative == 0:
            kind = "abs"
        return {
            "REFLECTED": self.iteration.reflected, "RELAXED": self.iteration.relaxation != 1.0,
            "KIND": kind,
        }  # fmt: skip

    def numbers(self, tol: float, *, permanent: bool = False) -> Tensor:
        """Return `NUMBERS` of the kernels, cached: copying them from the host waits for the device.

        Args:
            tol: relative tolerance in the Λ norm.
            permanent: whether they are cached for ever, because a captured graph reads them at
                their address; else the last few hundred are cached.
        """
        make_numbers = _permanent_numbers if permanent else _numbers
        theta, v = self.iteration.relaxation, self.v
        return make_numbers(self.negative, theta, tol, v.dtype, v.device)


def _new_numbers(
    negative: float, theta: float, tol: float, dtype: torch.dtype, device: torch.device
) -> Tensor:
    finfo = torch.finfo(dtype)
    values = {
        "negative": negative, "theta": theta, "tol": tol, "noise": 16 * finfo.eps,
        "limit": STALL * finfo.eps, "one": 1.0, "infinity": math.inf,
        "own": 16 * finfo.eps if dtype == torch.float32 else 0.0,
        "least": 4 * finfo.tiny, "most": 0.25 / finfo.tiny,
    }  # fmt: skip
    return torch.tensor([values[name] for name in kernels().NUMBERS], dtype=dtype, device=device)


_numbers = functools.lru_cache(maxsize=256)(_new_numbers)
_permanent_numbers = functools.cache(_new_numbers)


@functools.cache
def kernels() -> ModuleType:
    """Return the kernels, which need Triton."""
    return importlib.import_module("solvers.backends.triton_kernels")

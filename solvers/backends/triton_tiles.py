"""What is a solve on a CUDA device given: tiles, padded matrices, numbers?"""

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

from solvers.backends.step import STALL, Iteration, coefficients, plain
from solvers.inclusion import Inclusion
from solvers.operators import DenseOperator
from solvers.operators.matrix import DenseMap


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class Cut:
    """How a problem is cut for a kernel.

    Attributes:
        blocks: units of each tile; their sum is the width to which matrices are padded.
        rows: samples of a program.
        depth: of a product that is streamed.
        warps: of a program.
        resident: whether x and M stay on the chip, else one launch makes one step.
        held: matrices of which all parts do: M and W, M alone, or none.
    """

    blocks: tuple[int, ...]
    rows: int
    depth: int
    warps: int
    resident: bool = True
    held: int = 0

    @property
    def width(self) -> int:
        """Units with padding."""
        return sum(self.blocks)


def cut(n: int, dtype: torch.dtype, most: int = 256) -> Cut:
    """Return how n units are cut: what fits the registers and the memory of a multiprocessor.

    Counted in instructions and bytes of the compiled kernels (`benchmarks.gpu_compiled`).

    Args:
        n: units.
        dtype: of the problem.
        most: units that may stay on the chip in float32, as `most_resident` says.
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
    """Return how many units of float32 stay on the chip, given a device's compute capability.

    A block has 227 KiB of shared memory on 9.0, 163 on 8.0 and 99 on 8.6 and 8.9. From 10.0 on
    products take tensor memory, and Triton 3.6 does not compile the loop with them.
    """
    if capability >= (10, 0):
        return 0
    return {(9, 0): 256, (8, 0): 128}.get(capability, 80)


def _capability(device: torch.device) -> tuple[int, int]:
    if interpreted():
        return 9, 0
    return torch.cuda.get_device_capability(device if device.type == "cuda" else None)


def _tiles(n: int, units: int) -> tuple[int, ...]:
    return (units,) * -(-n // units)


@dataclass(frozen=True, kw_only=True, eq=False)
class Prepared:
    """What is made of W once: matrices padded with zeros to the width of their tiles, in order.

    Attributes:
        map: M, or where it stays on the chip in float32 its three parts, see Note [Six products] of
            `device_kernels`.
        low: M rounded to bfloat16, the first of the parts; None in float64.
        weights: Wᵀ, as `map`.
        parts: how many there are, 1 or 3.
        alpha, root, reach: step sizes α, padded with 1, Λ^½ and Λ^½/α, with 0.
        size: Frobenius' norm of Λ^½WΛ^(−½), one number.
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
    def of(operator: DenseOperator, iteration: Iteration, cut: Cut) -> Prepared:
        W, root, n = operator.W.detach(), operator.root_metric, operator.n
        assert isinstance(iteration.map, DenseMap)
        line = (0, cut.width - n)
        parts = 3 if cut.resident and W.dtype == torch.float32 else 1

        def padded(matrix: Tensor) -> Tensor:
            whole = nn.functional.pad(matrix.resolve_neg(), 2 * line).contiguous()
            return whole if parts == 1 else torch.stack(_parts(whole, parts))

        alpha = iteration.alpha  # a number is not copied from the host: that would wait
        alpha = (alpha if isinstance(alpha, Tensor) else W.new_full((), alpha)).expand(n)
        M, low = padded(iteration.map.matrix.detach()), None
        if W.dtype == torch.float32:
            low = M[0] if parts == 3 else _parts(M, 1)[0]
        return Prepared(
            map=M, low=low, weights=padded(W.T), parts=parts,
            alpha=nn.functional.pad(alpha, line, value=1.0), root=nn.functional.pad(root, line),
            reach=nn.functional.pad(root / alpha, line),
            size=torch.linalg.matrix_norm(W * root[:, None] / root).reshape(1),
        )  # fmt: skip


def _parts(matrix: Tensor, count: int) -> list[Tensor]:
    """Return numbers of bfloat16 that sum up to a matrix, largest first.

    Triton's interpreter multiplies the bits of bfloat16 as integers: it is given them as float32.
    """
    parts = []
    for _ in range(count):
        part = matrix.bfloat16()
        matrix = matrix - part.float()
        parts.append(part.float() if interpreted() else part)
    return parts


@dataclass(frozen=True, kw_only=True, eq=False)
class Loop:
    """The tensors of one solve."""

    v: Tensor
    slope: Tensor | None
    negative: float
    iteration: Iteration
    prepared: Prepared
    cut: Cut

    @staticmethod
    def of(problem: Inclusion, iteration: Iteration) -> Loop:
        operator = problem.operator
        assert isinstance(operator, DenseOperator)
        slope, negative = coefficients(problem.activation)
        size = Loop.cut_of(problem)
        return Loop(
            v=plain(problem.bias), slope=slope, negative=negative, iteration=iteration, cut=size,
            prepared=operator.memo(
                ("device", iteration.map, size),
                lambda: Prepared.of(operator, iteration, size),
            ),
        )  # fmt: skip

    @staticmethod
    def cut_of(problem: Inclusion) -> Cut:
        """Return how a problem is cut on its device."""
        operator = problem.operator
        return cut(operator.n, operator.dtype, most_resident(_capability(operator.device)))

    @property
    def precision(self) -> str:
        """How Triton multiplies as in float32: by three parts of TF32 on the tensor cores of CUDA.

        Its interpreter, and AMD's devices, multiply in full.
        """
        whole = self.v.dtype == torch.float64 or interpreted() or torch.version.hip is not None
        return "ieee" if whole else "tf32x3"

    @property
    def flags(self) -> dict[str, Any]:
        """What kernels are compiled for."""
        kind = "linear" if self.slope is not None else "sides"
        if self.iteration.reflected and self.slope is None and self.negative == 0:
            kind = "abs"
        return {
            "REFLECTED": self.iteration.reflected, "RELAXED": self.iteration.relaxation != 1.0,
            "KIND": kind,
        }  # fmt: skip

    def numbers(self, tol: float, *, lasting: bool = False) -> Tensor:
        """Return `NUMBERS` of the kernels, kept by value: to copy them from the host is to wait.

        Args:
            tol: tolerance.
            lasting: whether to keep them for ever, for a captured graph reads them where they lie;
                else the last few hundred are kept.
        """
        kept = _lasting_numbers if lasting else _numbers
        return kept(self.negative, self.iteration.relaxation, tol, self.v.dtype, self.v.device)


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
_lasting_numbers = functools.cache(_new_numbers)


@functools.cache
def kernels() -> ModuleType:
    """Return the kernels, which need Triton."""
    return importlib.import_module("solvers.backends.triton_kernels")

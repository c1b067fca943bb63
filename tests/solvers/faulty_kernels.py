"""Kernels with faults that the interpreter does not see, and the launches that show them."""

import os
from collections.abc import Callable
from functools import partial
from unittest import mock

import torch
import triton
import triton.language as tl
from triton.compiler import ASTSource


@triton.jit
def sound(a_ptr, b_ptr, out_ptr, count, N: tl.constexpr, PRECISION: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    total = tl.zeros((N, N), dtype=a_ptr.dtype.element_ty)
    for k in range(count):
        a, b = tl.load(a_ptr + k * N * N + at), tl.load(b_ptr + k * N * N + at)
        total += tl.dot(a, b, input_precision=PRECISION)
    tl.store(out_ptr + at, total)


@triton.jit
def underscore(a_ptr, out_ptr, count, N: tl.constexpr):
    at = tl.arange(0, N)
    total = tl.zeros((N,), dtype=tl.float32)
    while count > 0:
        for _ in range(count):
            total += 1.0
        for first in range(0, 2 * N, N):
            _, a = total, tl.load(a_ptr + first + at)
            total += a
        count -= 1
    tl.store(out_ptr + at, total)


@triton.jit
def wide(out_ptr, limit):
    step = 0
    running = True
    while running:
        step = tl.minimum(step + 1, limit)
        running = step < 10
    tl.store(out_ptr, step)


def _product(n: int, dtype: torch.dtype, **options: object) -> None:
    a = torch.zeros(2 * n, n, dtype=dtype)
    sound[(1,)](a, a, a, N=n, **options)


def _aborted() -> None:
    with mock.patch.object(ASTSource, "make_ir", side_effect=lambda *_: os.abort()):
        _product(32, torch.float32, count=2, PRECISION="ieee")


def cases(full: bool) -> dict[str, Callable[[], None]]:
    """Return launches that have to be reported, and some that must not."""
    out = torch.zeros(64)
    tf32 = partial(_product, 64, torch.float32, count=9, PRECISION="tf32x3")
    stages = {"num_stages": 5, "num_warps": 8}
    return {
        "compiler that aborts": _aborted,
        "launcher that aborts": os.abort,
        "launcher that fails": partial(_product, 64, torch.float32, COUNT=9),
        "sound": tf32,
        "sound float64": partial(_product, 64, torch.float64, count=9, PRECISION="ieee"),
        "sound float32": partial(_product, 64, torch.float32, count=9, PRECISION="ieee"),
        "underscore": lambda: underscore[(1,)](out, out, 3, N=64),
        "int32 limit": lambda: wide[(1,)](out, 7),
        "int64 limit": lambda: wide[(1,)](out, 2**31),
        "greedy": partial(_product, 128, torch.float32, count=9, PRECISION="tf32", **stages),
    }

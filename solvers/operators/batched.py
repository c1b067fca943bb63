"""How are many matrices factored at once?

Note [Batched LU]
On a CPU with several threads, LU factorizations of a batch of matrices above 149 rows fail, hang or
return wrong numbers in PyTorch 2.5 to 2.13 (github.com/pytorch/pytorch/issues/142815). One matrix
at a time is safe, and at that size as fast. Cholesky factorizations are not concerned.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Shaped
from torch import Tensor

_LARGE = 100
"""Rows from which matrices are factored one by one."""

Many = Shaped[Tensor, "many n n"]
"""Real or complex matrices."""


def factors(A: Many) -> tuple[Tensor, Tensor]:
    """Return LU factors and pivots of many matrices."""
    lu, pivots, _ = _each(torch.linalg.lu_factor_ex, A)
    return lu, pivots


def inverse(A: Many) -> tuple[Tensor, Tensor]:
    """Return the inverses of many matrices, and a number per matrix that is 0 where it has one."""
    found, info = _each(torch.linalg.inv_ex, A)
    return found, info


def solution(A: Many, b: Shaped[Tensor, "many n"]) -> tuple[Tensor, Tensor]:
    """Return x with Ax = b for each of many matrices, and a number that is 0 where there is one."""
    found, info = _each(torch.linalg.solve_ex, A, b)
    return found, info


def _each(function: Callable[..., tuple[Tensor, ...]], *batch: Tensor) -> tuple[Tensor, ...]:
    """Apply a function of matrices to all of a batch."""
    A = batch[0]
    if A.device.type != "cpu" or A.shape[-1] < _LARGE or not len(A):
        return function(*batch)
    results = [function(*one) for one in zip(*batch, strict=True)]
    return tuple(torch.stack(parts) for parts in zip(*results, strict=True))

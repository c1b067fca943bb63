"""How is W handled when it is zero, as in a layer that is evaluated and not solved?"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from solvers.activations import Step
from solvers.operators.base import LinearOperator, check_tensors
from solvers.operators.maps import Map, Resolvent
from solvers.operators.matrix import Constants
from solvers.precision import cast


@dataclass(frozen=True, eq=False)
class DiagonalMap(Map):
    """M = diag(diagonal)."""

    diagonal: Float[Tensor, " n"]

    def add(self, x: Tensor, shift: Tensor, out: Tensor | None) -> Tensor:
        return torch.addcmul(shift, x, self.diagonal, out=out)


@dataclass(frozen=True, eq=False)
class DiagonalResolvent(Resolvent):
    """R = diag(diagonal), its own transpose."""

    diagonal: Float[Tensor, " n"]

    def solve(self, x: Tensor) -> Tensor:
        return x * self.diagonal

    @property
    def T(self) -> DiagonalResolvent:
        return self

    def reflection(self) -> DiagonalMap:
        return DiagonalMap(2 * self.diagonal - 1)


@dataclass(frozen=True, eq=False)
class ZeroOperator(LinearOperator):
    """W = 0, so that z = σ(v): the block of a layer without a solve in a block-triangular operator.

    Args:
        metric: Λ as a vector of n positive numbers, which also says n, dtype and device:
            `ZeroOperator(torch.ones(64))`.

    Raises:
        TypeError: if the metric is no tensor of real numbers.
        ValueError: if the metric is not a vector.

    Example:
        >>> import torch
        >>> from solvers import Inclusion, Tanh, ZeroOperator, solve
        >>> v = torch.ones(1, 2)
        >>> z = solve(Inclusion(ZeroOperator(torch.ones(2)), v, Tanh())).value
        >>> torch.allclose(z, torch.tanh(v), atol=1e-3)
        True
    """

    metric: Float[Tensor, " n"]
    transposed: bool = field(default=False, repr=False)
    _memo: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        check_tensors(metric=self.metric)
        if self.metric.ndim != 1:
            raise ValueError(f"metric must be a vector, got shape {tuple(self.metric.shape)}")

    @property
    def n(self) -> int:
        return self.metric.shape[0]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return ()

    def _parts(self) -> tuple[LinearOperator, ...]:
        return ()  # its fields are tensors alone

    @property
    def T(self) -> ZeroOperator:
        return ZeroOperator(self._dual_metric(), not self.transposed, self._shared())

    def rebuild(self, tensors: tuple[Tensor, ...]) -> ZeroOperator:
        return self

    def to(self, dtype: torch.dtype) -> ZeroOperator:
        if dtype == self.dtype:
            return self
        key = ("to", dtype, self.transposed)
        return self.memo(key, lambda: ZeroOperator(cast(self.metric.detach(), dtype)))

    def mv(self, z: Tensor) -> Tensor:
        return torch.zeros_like(z)

    def rmv(self, z: Tensor) -> Tensor:
        return torch.zeros_like(z)

    def pullback(self, u: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        return ()

    def magnitude(self, z: Tensor) -> Tensor:
        return torch.zeros_like(z)

    @property
    def summands(self) -> int:
        return 0

    def rounding(self, z: Tensor) -> Tensor:
        return z.new_zeros(z.shape[:-1], dtype=torch.float64)

    def losses(self) -> Tensor:
        return torch.zeros_like(self.metric.detach())

    def unread(self, size: Tensor) -> Tensor:
        return torch.zeros_like(size)

    def diagonal(self) -> Tensor:
        return torch.zeros_like(self.metric)

    def submatrix(self, rows: Tensor, columns: Tensor) -> Tensor:
        batch = torch.broadcast_shapes(rows.shape[:-1], columns.shape[:-1])
        return self.metric.new_zeros(*batch, rows.shape[-1], columns.shape[-1])

    def log_determinant(self) -> float:
        return 0.0

    def resolvent(self, step: Step) -> DiagonalResolvent:
        return DiagonalResolvent(1 / (1 + step * torch.ones_like(self.metric)))

    def relax(self, step: Step) -> DiagonalMap:
        return DiagonalMap(1 - step * torch.ones_like(self.metric))

    def constants(self) -> Constants:
        """Return m = L = 1."""
        return Constants(m=1.0, L=1.0)

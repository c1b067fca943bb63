"""How is W handled when it is a convolution plus a matrix of low rank?"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from solvers.activations import Step
from solvers.operators.base import LinearOperator, check_tensors
from solvers.operators.convolution import ConvolutionOperator
from solvers.operators.maps import Map, Resolvent, column, own_step, singular, step_key
from solvers.operators.matrix import Constants
from solvers.precision import cast


@dataclass(frozen=True, eq=False)
class UpdatedMap(Map):
    """M = base + left · rightᵀ."""

    is_expensive = True
    base: Map
    left: Float[Tensor, "n r"]
    right: Float[Tensor, "n r"]

    def add(self, x: Tensor, shift: Tensor, out: Tensor | None) -> Tensor:
        return self.base.add(x, shift, out).addmm_(x @ self.right, self.left.T)


@dataclass(frozen=True, eq=False)
class UpdatedResolvent(Resolvent):
    """R = base + left · rightᵀ."""

    base: Resolvent
    left: Float[Tensor, "n r"]
    right: Float[Tensor, "n r"]
    step: Step

    def solve(self, x: Tensor) -> Tensor:
        return self.base.solve(x) + (x @ self.right) @ self.left.T

    @property
    def T(self) -> UpdatedResolvent:
        alpha = column(self.step)
        return UpdatedResolvent(self.base.T, self.right * alpha, self.left / alpha, self.step)

    def reflection(self) -> UpdatedMap:
        return UpdatedMap(self.base.reflection(), 2 * self.left, self.right)


@dataclass(frozen=True, eq=False)
class LowRankUpdate(LinearOperator):
    """W = K∗ + ABᵀ, solved by the Fourier transform and a correction of rank r (Woodbury).

    Args:
        base: the convolution, whose metric is that of W.
        A: n × r.
        B: n × r.

    Raises:
        TypeError: if base is another operator, or A or B no tensor of real numbers.
        ValueError: if A or B do not fit the convolution.
    """

    base: ConvolutionOperator
    A: Float[Tensor, "n r"]
    B: Float[Tensor, "n r"]
    transposed: bool = field(default=False, repr=False)
    _memo: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.base, ConvolutionOperator):
            raise TypeError(f"base must be a ConvolutionOperator, got {self.base!r}")
        check_tensors(A=self.A, B=self.B)
        for name, t in (("A", self.A), ("B", self.B)):
            if t.ndim != 2 or t.shape != self.A.shape or len(t) != self.base.n:
                raise ValueError(
                    f"A and B must have shape ({self.base.n}, r), got {tuple(self.A.shape)} and "
                    f"{tuple(self.B.shape)}"
                )
            if t.dtype != self.base.dtype or t.device != self.base.device:
                raise ValueError(
                    f"{name} is {t.dtype} on {t.device}, the convolution {self.base.dtype} on "
                    f"{self.base.device}"
                )

    @property
    def metric(self) -> Float[Tensor, " n"]:  # type: ignore[override]
        """Λ of the convolution."""
        return self.base.metric

    @property
    def n(self) -> int:
        return self.base.n

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (*self.base.tensors, self.A, self.B)

    def _given(self) -> tuple[Tensor, ...]:
        own = (self.B, self.A) if self.transposed else (self.A, self.B)
        return (*self.base._given(), *own)

    def _own_metric(self) -> Tensor:
        return self.base._own_metric()

    def _parts(self) -> tuple[LinearOperator, ...]:
        return (self.base,)

    @property
    def T(self) -> LowRankUpdate:
        # One memo for both: see Note [Shared factors] of the dense operator.
        return LowRankUpdate(self.base.T, self.B, self.A, not self.transposed, self._shared())

    def rebuild(self, tensors: tuple[Tensor, ...]) -> LowRankUpdate:
        *own, A, B = tensors
        base = self.base.rebuild(tuple(own))
        return LowRankUpdate(base, A, B, self.transposed, self._shared())

    def to(self, dtype: torch.dtype) -> LowRankUpdate:
        if dtype == self.dtype:
            return self
        return self.memo(
            ("to", dtype, self.transposed),
            lambda: LowRankUpdate(
                self.base.to(dtype), cast(self.A.detach(), dtype), cast(self.B.detach(), dtype)
            ),
        )

    def mv(self, z: Tensor) -> Tensor:
        return self.base.mv(z) + (z @ self.B) @ self.A.T

    def rmv(self, z: Tensor) -> Tensor:
        return self.base.rmv(z) + (z @ self.A) @ self.B.T

    def pullback(self, u: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        flat_u, flat_z = u.reshape(-1, self.n), z.reshape(-1, self.n)
        low_rank = (flat_u.T @ (flat_z @ self.B), flat_z.T @ (flat_u @ self.A))
        return (*self.base.pullback(u, z), *low_rank)

    def magnitude(self, z: Tensor) -> Tensor:
        A, B = self.A.detach().abs(), self.B.detach().abs()
        return self.base.magnitude(z) + (z @ B) @ A.T

    @property
    def summands(self) -> int:
        return max(self.base.summands, self.n + self.A.shape[1]) + 1

    def losses(self) -> Tensor:
        A, B = self.A.detach().abs(), self.B.detach().abs()
        own = 2 * (self.n + 8) * (1 + A.sum(1)) + A @ B.sum(0)
        return self.base.losses() + own

    def unread(self, size: Tensor) -> Tensor:
        """Return what the product with ABᵀ may miss, not that with the convolution."""
        A, B = self.A.detach().abs(), self.B.detach().abs()
        inner, count = size @ B, size.sum(-1, keepdim=True)
        inner = inner.sum(-1, keepdim=True).expand_as(size)
        return inner + count * (A.sum(1) + A.shape[1])

    @property
    def by_kernels(self) -> bool:
        return self.base.by_kernels

    def rounding(self, z: Tensor) -> Tensor:
        # The slack of the convolution's own bound covers that of the sum.
        exact, finfo = self.to(torch.float64), torch.finfo(z.dtype)
        A, B = exact.A.abs(), exact.B.abs()
        size = cast(z.detach(), torch.float64).abs()
        unit = (self.n + A.shape[1] + 8) * finfo.eps
        lost = finfo.tiny * (exact.losses() + exact.unread(size))
        own = exact.norm_above(unit * ((size @ B) @ A.T) + lost)
        return self.base.rounding(z) + own

    def rounding_gain(self, dtype: torch.dtype) -> float:
        own = (self.n + self.A.shape[1] + 8) * torch.finfo(dtype).eps * self._own_gain()
        return self.base.rounding_gain(dtype) + own + self._unread_gain(dtype)

    def _absolute_gain(self) -> float:
        return self.base.absolute_gain() + self._own_gain()

    def _own_gain(self) -> float:
        """Return at least ‖Λ^½ |A||B|ᵀ Λ^(−½)‖₂, by Frobenius' norm of each factor."""
        left, right = self._similar()
        return float(left.norm() * right.norm()) * (1 + 4 * (left.numel() + 8) * 2.0**-52)

    def _similar(self) -> tuple[Tensor, Tensor]:
        """Return Λ^½A and Λ^(−½)B in float64."""
        A, B, metric = (cast(t.detach(), torch.float64) for t in (self.A, self.B, self.metric))
        root = metric.sqrt()[:, None]
        return root * A, B / root

    def diagonal(self) -> Tensor:
        return self.base.diagonal() + (self.A * self.B).detach().sum(-1)

    def preconditioner(self) -> Tensor:
        return self.base.preconditioner()  # constant in each channel

    def submatrix(self, rows: Tensor, columns: Tensor) -> Tensor:
        A, B = self.A.detach(), self.B.detach()
        return self.base.submatrix(rows, columns) + A[rows] @ B[columns].mT

    def log_determinant(self) -> float:
        return self.memo("log det", self._log_determinant)

    def _log_determinant(self) -> float:
        """det(I − K∗ − ABᵀ) = det(I − K∗) det(I − Bᵀ(I − K∗)⁻¹A)."""
        own = self.base.log_determinant()
        if not math.isfinite(own):
            return own
        core = self._core(self.base.solve(self.A.detach().T).T)
        return own + float(torch.linalg.slogdet(core)[1])

    def mean_log_eigenvalue(self) -> float:
        return self.base.mean_log_eigenvalue()  # ABᵀ moves r eigenvalues of n

    def resolvent(self, step: Step) -> UpdatedResolvent:
        factor = self.memo(("resolvent", step_key(step)), lambda: self._factor(own_step(step)))
        return factor.T if self.transposed else factor

    def _factor(self, step: Step) -> UpdatedResolvent:
        """(R⁻¹ − PABᵀ)⁻¹ = R + RPA (I − BᵀRPA)⁻¹ BᵀR with P = diag(α), for W as first given."""
        W = self.T if self.transposed else self
        A, B, alpha = W.A.detach(), W.B.detach(), column(step)
        R = W.base.resolvent(step)
        left = R.solve((alpha * A).T).T
        right = R.T.solve((alpha * B).T).T / alpha
        inverse, info = torch.linalg.inv_ex(W._core(left))
        left = left @ inverse
        if bool(info) or not bool(torch.isfinite(left).all()):
            raise singular(step)
        return UpdatedResolvent(R, left, right, step)

    def _core(self, solved: Tensor) -> Tensor:
        core = -(self.B.detach().T @ solved)
        core.diagonal().add_(1)
        return core

    def relax(self, step: Step) -> UpdatedMap:
        A, B = self.A.detach(), self.B.detach()
        return UpdatedMap(self.base.relax(step), column(step) * A, B.contiguous())

    def constants(self) -> Constants:
        """Return bounds of (m, L): those of the convolution, changed by what ABᵀ can do at most.

        With a = Λ^½A and b = Λ^(−½)B, m falls by at most −λmin of −½(abᵀ + baᵀ), which is nothing
        where ABᵀ is dissipative, and L grows by at most ‖a‖‖b‖. The slack for rounding is 8 n u of
        that size.
        """
        return self.memo("constants", self._constants)

    def _constants(self) -> Constants:
        own, (a, b) = self.base.constants(), self._similar()
        size = float(a.norm() * b.norm())
        if not math.isfinite(size):
            return Constants(m=-math.inf, L=math.inf)
        left, right = torch.linalg.qr(torch.cat([a, b], 1))[1].split(a.shape[1], 1)
        product = left @ right.T
        lowest = float(torch.linalg.eigvalsh(-0.5 * (product + product.T))[0]) if a.numel() else 0.0
        slack = 8 * self.n * torch.finfo(torch.float64).eps * size
        return Constants(m=own.m + min(lowest, 0.0) - slack, L=own.L + size + slack)

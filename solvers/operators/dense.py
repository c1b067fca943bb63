"""How is W handled when it is a full matrix?"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from solvers.activations import Step
from solvers.operators.base import (
    Constants,
    LinearOperator,
    Map,
    Resolvent,
    check_metric,
    check_tensors,
    column,
    is_finite,
    own_step,
    singular,
    step_key,
)
from solvers.precision import cast


@dataclass(frozen=True, eq=False)
class DenseMap(Map):
    """M stored as its transpose, contiguous for the product with rows of samples."""

    matrix: Float[Tensor, "n n"]

    def add(self, x: Tensor, shift: Tensor, out: Tensor | None) -> Tensor:
        return torch.addmm(shift, x, self.matrix, out=out)


@dataclass(frozen=True, eq=False)
class DenseResolvent(Resolvent):
    """R as a matrix.

    The inverse is stored: one n × n product per application, against two triangular solves, and
    its rounding cannot move the fixed point that a solve reports, because residuals are evaluated
    with W.

    Attributes:
        inverse: R.
        step: α, one number or one per unit.
    """

    inverse: Float[Tensor, "n n"]
    step: Step

    def solve(self, x: Tensor) -> Tensor:
        return x @ self.inverse.T

    @property
    def T(self) -> DenseResolvent:
        if isinstance(self.step, Tensor) and self.step.ndim == 1:
            scaled = self.inverse.T * (self.step[:, None] / self.step[None, :])
            return DenseResolvent(scaled, self.step)
        return DenseResolvent(self.inverse.T, self.step)

    def reflection(self) -> DenseMap:
        matrix = (2 * self.inverse.T).contiguous()
        matrix.diagonal().sub_(1)
        return DenseMap(matrix)


@dataclass(frozen=True, eq=False)
class DenseOperator(LinearOperator):
    """W stored as an n × n matrix.

    Args:
        W: n × n.
        metric: Λ as a vector of n positive numbers; ones when omitted.

    Raises:
        TypeError: if W or the metric is no tensor of real numbers.
        ValueError: if W is not square, or the metric has another length, dtype or device.
    """

    W: Float[Tensor, "n n"]
    metric: Float[Tensor, " n"] = None  # type: ignore[assignment]
    transposed: bool = field(default=False, repr=False)
    _memo: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        W = self.W
        check_tensors(W=W)
        if W.ndim != 2 or W.shape[0] != W.shape[1] or W.shape[0] == 0:
            raise ValueError(f"W must be a square matrix, got shape {tuple(W.shape)}")
        if self.metric is None:
            object.__setattr__(self, "metric", torch.ones_like(W.detach()[0]))
        check_metric(self.metric, W.shape[0], W)
        super().__post_init__()

    @property
    def n(self) -> int:
        return self.W.shape[0]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.W,)

    def _given(self) -> tuple[Tensor, ...]:
        return (self.W.T if self.transposed else self.W,)

    @property
    def T(self) -> DenseOperator:
        # Note [Shared factors]
        # W and Wᵀ share one memo. Resolvents are factored from W as first given and transposed
        # on demand, so one factorization serves forward and backward; step sizes, determinant
        # and constants do not change under transposition. The memo holds no tensor with a graph.
        return DenseOperator(self.W.T, self._dual_metric(), not self.transposed, self._shared())

    def rebuild(self, tensors: tuple[Tensor, ...]) -> DenseOperator:
        (W,) = tensors
        return DenseOperator(W, self.metric, self.transposed, self._shared())

    def to(self, dtype: torch.dtype) -> DenseOperator:
        if dtype == self.W.dtype:
            return self
        return self.memo(
            ("to", dtype, self.transposed),
            lambda: DenseOperator(cast(self.W.detach(), dtype), cast(self.metric.detach(), dtype)),
        )

    def mv(self, z: Tensor) -> Tensor:
        return z @ self.W.T

    def affine(self, z: Tensor, v: Tensor) -> Tensor:
        if z.ndim == 2:
            return torch.addmm(v, z, self.W.T)
        return self.mv(z) + v

    def pullback(self, u: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        return (u.reshape(-1, self.n).T @ z.reshape(-1, self.n),)

    def magnitude(self, z: Tensor) -> Tensor:
        return z @ self.W.detach().abs().T

    def diagonal(self) -> Tensor:
        return self.W.detach().diagonal()

    def submatrix(self, rows: Tensor, columns: Tensor) -> Tensor:
        return self.W.detach()[rows[..., :, None], columns[..., None, :]]

    def log_determinant(self) -> float:
        return self.memo("log det", lambda: float(torch.linalg.slogdet(self._I_minus_W())[1]))

    def _I_minus_W(self) -> Tensor:
        A = -self.W.detach()
        A.diagonal().add_(1)
        return A

    def resolvent(self, step: Step) -> DenseResolvent:
        factor = self.memo(("resolvent", step_key(step)), lambda: self._factor(own_step(step)))
        return factor.T if self.transposed else factor

    def _factor(self, step: Step) -> DenseResolvent:
        factor, info = self.unchecked_resolvent(step)
        if int(info) != 0 or not is_finite(factor.inverse):
            raise singular(step)
        return factor

    def unchecked_resolvent(self, step: Step) -> tuple[DenseResolvent, Tensor]:
        """Factor anew without waiting for the device; the second is not 0 if it failed.

        The factor is that of the operator whose transpose this may be.
        """
        inverse, info = torch.linalg.inv_ex(self.shifted(step))
        return DenseResolvent(inverse, step), info

    def shifted(self, step: Step) -> Tensor:
        """Return I + α(I − W), what a resolvent inverts, of the operator as it was given."""
        A = self._I_minus_W()
        A = (A.T if self.transposed else A) * column(step)
        A.diagonal().add_(1)
        return A

    def relax(self, step: Step) -> DenseMap:
        matrix = self.W.detach().T * step  # column j of the transpose belongs to unit j
        matrix.diagonal().add_(1 - step)
        return DenseMap(matrix.contiguous())

    def is_monotone(self) -> bool:
        """Say whether m > 0: by one Cholesky factorization, and where that fails by m itself."""
        return self.memo("is monotone", lambda: self._cholesky() or self.constants().m > 0)

    def _cholesky(self) -> bool:
        A = self._I_minus_W() * self.metric.detach()[:, None]
        _, info = torch.linalg.cholesky_ex(A + A.T)
        return int(info) == 0

    def constants(self) -> Constants:
        """Return (m, L), widened by the backward error of the symmetric eigensolver.

        Note: m is computed from the eigenvalues of float64 sym H and lowered by 8 n u ‖H‖_F, a
        standard bound of that computation's backward error (Higham 2002, ch. 3 and LAPACK
        Users' Guide §4.7); L likewise raised. A machine-checked proof of m is the business of a
        certificate, not of a solver.
        """
        return self.memo("constants", self._constants)

    def _constants(self) -> Constants:
        W, metric = (cast(t.detach(), torch.float64) for t in (self.W, self.metric))
        root, H = metric.sqrt(), torch.eye(self.n, dtype=torch.float64, device=W.device) - W
        H = root[:, None] * H / root[None, :]
        if not is_finite(H):
            return Constants(m=-math.inf, L=math.inf)
        slack = 8 * self.n * torch.finfo(torch.float64).eps * float(torch.linalg.matrix_norm(H))
        m = float(torch.linalg.eigvalsh(0.5 * (H + H.T))[0]) - slack
        return Constants(m=m, L=float(torch.linalg.matrix_norm(H, 2)) + slack)

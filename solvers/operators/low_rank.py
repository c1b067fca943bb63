"""How is W handled when it is a diagonal plus a matrix of low rank?"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from solvers.activations import Step
from solvers.operators.base import LinearOperator, check_metric, check_tensors
from solvers.operators.eigenvalue_bounds import DiagonalPlusLowRank
from solvers.operators.maps import Map, Resolvent, column, own_step, singular, step_key
from solvers.operators.matrix import Constants
from solvers.precision import cast


@dataclass(frozen=True, eq=False)
class LowRankMap(Map):
    """M = diag(diagonal) + left · rightᵀ."""

    diagonal: Float[Tensor, " n"]
    left: Float[Tensor, "n k"]
    right: Float[Tensor, "n k"]

    def add(self, x: Tensor, shift: Tensor, out: Tensor | None) -> Tensor:
        result = torch.addcmul(shift, x, self.diagonal, out=out)
        return result.addmm_(x @ self.right, self.left.T)


@dataclass(frozen=True, eq=False)
class LowRankResolvent(Resolvent):
    """R = diag(diagonal) + left · rightᵀ.

    Attributes:
        diagonal: n numbers.
        left: n × k, k the rank of W, or up to twice that (see Note [Weak pivots]).
        right: n × k.
        step: α, one number or one per unit.
    """

    diagonal: Float[Tensor, " n"]
    left: Float[Tensor, "n k"]
    right: Float[Tensor, "n k"]
    step: Step

    def solve(self, x: Tensor) -> Tensor:
        return x * self.diagonal + (x @ self.right) @ self.left.T

    @property
    def T(self) -> LowRankResolvent:
        if isinstance(self.step, Tensor) and self.step.ndim == 1:
            alpha = self.step[:, None]
            return LowRankResolvent(self.diagonal, self.right * alpha, self.left / alpha, self.step)
        return LowRankResolvent(self.diagonal, self.right, self.left, self.step)

    def reflection(self) -> LowRankMap:
        return LowRankMap(2 * self.diagonal - 1, 2 * self.left, self.right)


@dataclass(frozen=True, eq=False)
class LowRankOperator(LinearOperator):
    """W = diag(d) + ABᵀ, with products and factors that cost O(nr) and O(nr²), never n².

    Args:
        d: n numbers.
        A: n × r with r < n; r = 0 is a diagonal W.
        B: n × r.
        metric: Λ as a vector of n positive numbers; ones when omitted.

    Raises:
        TypeError: if one of them is no tensor of real numbers.
        ValueError: if the shapes do not fit, r ≥ n, or dtypes or devices differ.

    Example:
        >>> import torch
        >>> from solvers import LowRankOperator
        >>> W = LowRankOperator(torch.zeros(3), torch.ones(3, 1), -torch.ones(3, 1))
        >>> W.mv(torch.tensor([1.0, 2.0, 3.0])).tolist()  # −Σz in every unit
        [-6.0, -6.0, -6.0]
        >>> [round(x, 3) for x in (W.constants().m, W.constants().L)]
        [1.0, 4.0]
    """

    d: Float[Tensor, " n"]
    A: Float[Tensor, "n r"]
    B: Float[Tensor, "n r"]
    metric: Float[Tensor, " n"] = None  # type: ignore[assignment]
    transposed: bool = field(default=False, repr=False)
    _memo: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        d, A, B = self.d, self.A, self.B
        check_tensors(d=d, A=A, B=B)
        shapes = ", ".join(str(tuple(t.shape)) for t in (d, A, B))
        if d.ndim != 1 or A.ndim != 2 or A.shape != B.shape or A.shape[0] != d.shape[0]:
            raise ValueError(f"d, A and B must have shapes (n,), (n, r) and (n, r), got {shapes}")
        if A.shape[1] >= d.shape[0]:
            raise ValueError(
                f"the rank of ABᵀ must be below n, got shapes {shapes}: use a DenseOperator"
            )
        for name, t in (("A", A), ("B", B)):
            if t.dtype != d.dtype or t.device != d.device:
                raise ValueError(f"{name} is {t.dtype} on {t.device}, d is {d.dtype} on {d.device}")
        if self.metric is None:
            object.__setattr__(self, "metric", torch.ones_like(d.detach()))
        check_metric(self.metric, self.n, d)

    @property
    def n(self) -> int:
        return self.d.shape[0]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.d, self.A, self.B)

    def _parts(self) -> tuple[LinearOperator, ...]:
        return ()  # its fields are tensors alone

    def _given(self) -> tuple[Tensor, ...]:
        return (self.d, self.B, self.A) if self.transposed else self.tensors

    @property
    def T(self) -> LowRankOperator:
        # One memo for both: see Note [Shared factors] of the dense operator.
        return LowRankOperator(
            self.d, self.B, self.A, self._dual_metric(), not self.transposed, self._shared()
        )

    def rebuild(self, tensors: tuple[Tensor, ...]) -> LowRankOperator:
        d, A, B = tensors
        return LowRankOperator(d, A, B, self.metric, self.transposed, self._shared())

    def to(self, dtype: torch.dtype) -> LowRankOperator:
        if dtype == self.dtype:
            return self
        return self.memo(("to", dtype, self.transposed), lambda: self._to(dtype))

    def _to(self, dtype: torch.dtype) -> LowRankOperator:
        d, A, B, metric = (cast(t.detach(), dtype) for t in (*self.tensors, self.metric))
        return LowRankOperator(d, A, B, metric, self.transposed)

    def mv(self, z: Tensor) -> Tensor:
        return z * self.d + (z @ self.B) @ self.A.T

    def rmv(self, z: Tensor) -> Tensor:
        return z * self.d + (z @ self.A) @ self.B.T

    def pullback(self, u: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        u, z = u.reshape(-1, self.n), z.reshape(-1, self.n)
        return (u * z).sum(0), u.T @ (z @ self.B), z.T @ (u @ self.A)

    def magnitude(self, z: Tensor) -> Tensor:
        d, A, B = (t.detach().abs() for t in self.tensors)
        return z * d + (z @ B) @ A.T

    @property
    def summands(self) -> int:
        return self.n + self.A.shape[1] + 1

    def losses(self) -> Tensor:
        return self._losses_of_sums() + 2 * (self.summands + 4) * self.A.detach().abs().sum(1)

    def unread(self, size: Tensor) -> Tensor:
        A, B = self.A.detach().abs(), self.B.detach().abs()
        inner, count = size @ B, size.sum(-1, keepdim=True)
        return size + inner.sum(-1, keepdim=True) + count * (A.sum(1) + A.shape[1])

    def diagonal(self) -> Tensor:
        d, A, B = (t.detach() for t in self.tensors)
        return d + (A * B).sum(-1)

    def submatrix(self, rows: Tensor, columns: Tensor) -> Tensor:
        d, A, B = (t.detach() for t in self.tensors)
        same = rows[..., :, None] == columns[..., None, :]
        return A[rows] @ B[columns].mT + torch.where(same, d[rows][..., :, None], 0.0)

    def log_determinant(self) -> float:
        return self.memo("log det", self._log_determinant)

    def _log_determinant(self) -> float:
        d, A, B = (t.detach() for t in self.tensors)
        E, left, right = _strong_pivots(1 - d, A, B)
        if not bool((E != 0).all()):
            return -math.inf  # more than r units with d = 1: see Note [Weak pivots]
        core = _core(E, left, right)
        return float(E.abs().log().sum()) + float(torch.linalg.slogdet(core)[1])

    def resolvent(self, step: Step) -> LowRankResolvent:
        factor = self.memo(("resolvent", step_key(step)), lambda: self._factor(own_step(step)))
        return factor.T if self.transposed else factor

    def _factor(self, step: Step) -> LowRankResolvent:
        """Invert diag(E) − αABᵀ, E = 1 + α(1 − d), for W as first given.

        Woodbury: E⁻¹ + E⁻¹αA (I − BᵀE⁻¹αA)⁻¹ BᵀE⁻¹.
        """
        d, A, B = (t.detach() for t in self.tensors)
        if self.transposed:
            A, B = B, A
        alpha = column(step)
        E, left, right = _strong_pivots(1 + step * (1 - d), alpha * A, B)
        inverse, info = torch.linalg.inv_ex(_core(E, left, right))
        left, right = (left / E[:, None]) @ inverse, right / E[:, None]
        finite = all(bool(torch.isfinite(t).all()) for t in (1 / E, left, right))
        if int(info) != 0 or not finite:
            raise singular(step)
        return LowRankResolvent(1 / E, left, right, step)

    def relax(self, step: Step) -> LowRankMap:
        d, A, B = (t.detach() for t in self.tensors)
        alpha = column(step)
        return LowRankMap((1 - step) + step * d, alpha * A, B.contiguous())

    def is_monotone(self) -> bool:
        """Say whether m > 0: by one test of definiteness, and where that fails by m itself."""
        return self.memo("is monotone", lambda: self._is_definite() or self.constants().m > 0)

    def _is_definite(self) -> bool:
        parts = self._similar()
        if parts is None:
            return False
        D, A, B = parts
        symmetric = DiagonalPlusLowRank.of(D, -0.5 * A, B)
        return symmetric.exceeds(2 * symmetric.slack)

    def constants(self) -> Constants:
        """Return (m, L), by bisection in O(nr²) per step, widened by the rounding of each test.

        H = diag(1 − d) − ÂB̂ᵀ with Â = Λ^½A and B̂ = Λ^(−½)B, so sym H is a diagonal plus rank 2r.
        ‖H‖₂ is the largest eigenvalue of [[0, H], [Hᵀ, 0]], which a rotation by 45° turns into
        diag(1 − d, d − 1) minus abᵀ + baᵀ with a = (Â, Â)/√2 and b = (B̂, −B̂)/√2: the same
        question, without squaring H.
        """
        return self.memo("constants", self._constants)

    def _constants(self) -> Constants:
        parts = self._similar()
        if parts is None:
            return Constants(m=-math.inf, L=math.inf)
        D, A, B = parts
        m = DiagonalPlusLowRank.of(D, -0.5 * A, B).smallest()
        a, b = torch.cat([A, A]) / math.sqrt(2), torch.cat([B, -B]) / math.sqrt(2)
        return Constants(m=m, L=-DiagonalPlusLowRank.of(torch.cat([-D, D]), a, b).smallest())

    def _similar(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Return 1 − d, Â and B̂ in float64, or None when they are not finite."""
        root = cast(self.metric.detach(), torch.float64).sqrt()[:, None]
        d, A, B = (cast(t.detach(), torch.float64) for t in self.tensors)
        parts = (1 - d, root * A, B / root)
        return parts if all(bool(torch.isfinite(t).all()) for t in parts) else None


# Note [Weak pivots]
# Woodbury divides by E, but diag(E) − ABᵀ may be well conditioned where some Eᵢ vanish. Let ε be
# the (r + 1)-th smallest |Eᵢ|. Among the units up to it some x ≠ 0 has Bᵀx = 0, so the matrix maps
# x to Ex and its smallest singular value is at most ε: dividing by numbers above ε/2 costs no
# accuracy that is not lost anyway. The units below ε/2, at most r, are raised to ε, and a column
# each in A and B takes the difference off again.
def _strong_pivots(E: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (E', A', B') with diag(E') − A'B'ᵀ = diag(E) − ABᵀ and no weak entry in E'."""
    size, index = E.abs().topk(A.shape[1] + 1, largest=False)
    weak = index[size < 0.5 * size[-1]]
    if len(weak) == 0:
        return E, A, B
    unit = E.new_zeros(len(E), len(weak))
    unit[weak, torch.arange(len(weak), device=E.device)] = 1
    raised = E.clone()
    raised[weak] = size[-1]
    return raised, torch.cat([A, unit * (size[-1] - E[weak])], 1), torch.cat([B, unit], 1)


def _core(E: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """Return I − BᵀE⁻¹A, whose determinant times that of E is det(diag(E) − ABᵀ)."""
    core = -(B.T @ (A / E[:, None]))
    core.diagonal().add_(1)
    return core

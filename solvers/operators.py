"""What must a linear operator W offer so that z = σ(Wz + v) can be split?

Products with W and Wᵀ, the resolvent of the monotone part I − W, and the constants (m, L) of
I − W in the norm ‖z‖_Λ = √(zᵀΛz) that the operator carries.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from solvers.activations import Step

T_ = TypeVar("T_")


@dataclass(frozen=True)
class Constants:
    """Constants of I − W in the Λ norm, with H = Λ^½ (I − W) Λ^(−½).

    Attributes:
        m: lower bound of the strong monotonicity λmin(sym H).
        L: upper bound of the Lipschitz constant ‖H‖₂.
    """

    m: float
    L: float


@dataclass(frozen=True)
class Resolvent:
    """R = (I + diag(α)(I − W))⁻¹, factored once per weight change.

    The dense inverse is stored: one n × n product per application, against two triangular
    solves, and its rounding cannot move the fixed point that a solve reports, because residuals
    are evaluated with W.

    Attributes:
        inverse: R.
        step: α, one number or one per unit.
    """

    inverse: Float[Tensor, "n n"]
    step: Step

    def solve(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        """Return R x."""
        return x @ self.inverse.T

    @property
    def T(self) -> Resolvent:
        """The resolvent of Wᵀ with the same step, from the same factor.

        (I + P(I − Wᵀ))⁻¹ = P (I + P(I − W))⁻ᵀ P⁻¹ with P = diag(α).
        """
        if isinstance(self.step, Tensor) and self.step.ndim == 1:
            return Resolvent(self.inverse.T * (self.step[:, None] / self.step[None, :]), self.step)
        return Resolvent(self.inverse.T, self.step)


class LinearOperator(ABC):
    """A linear map W on ℝⁿ with the inner product ⟨y, z⟩_Λ = yᵀΛz.

    Laws, each tested: ⟨Wz, y⟩ = ⟨z, Wᵀy⟩; resolvent(α) inverts I + diag(α)(I − W);
    ⟨(I − W)z, z⟩_Λ ≥ m ‖z‖²_Λ and ‖(I − W)z‖_Λ ≤ L ‖z‖_Λ.
    """

    metric: Float[Tensor, " n"]
    """Λ, positive."""
    transposed: bool
    """Whether this is the transpose of the operator whose factors the memo holds."""

    @property
    @abstractmethod
    def n(self) -> int:
        """Number of units."""

    @property
    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that define W: what a gradient with respect to W is taken for."""

    @property
    @abstractmethod
    def T(self) -> LinearOperator:
        """Wᵀ, monotone in Λ⁻¹ where W is monotone in Λ, sharing every factor."""

    @abstractmethod
    def rebuild(self, tensors: tuple[Tensor, ...]) -> LinearOperator:
        """Return this operator on `tensors`, equal in value, keeping all cached factors."""

    @abstractmethod
    def mv(self, z: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        """Return Wz."""

    @abstractmethod
    def affine(
        self, z: Float[Tensor, "*batch n"], v: Float[Tensor, "*batch n"]
    ) -> Float[Tensor, "*batch n"]:
        """Return Wz + v in one pass."""

    @abstractmethod
    def pullback(
        self, u: Float[Tensor, "*batch n"], z: Float[Tensor, "*batch n"]
    ) -> tuple[Tensor, ...]:
        """Return the gradient of Σ ⟨u, Wz⟩ with respect to `tensors`."""

    @abstractmethod
    def magnitude(self, z: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        """Return |W| z, the weight of rounding errors in Wz for non-negative z."""

    @abstractmethod
    def diagonal(self) -> Float[Tensor, " n"]:
        """Return the diagonal of W."""

    @abstractmethod
    def log_determinant(self) -> float:
        """Return log |det(I − W)|."""

    @abstractmethod
    def resolvent(self, step: Step) -> Resolvent:
        """Factor I + diag(α)(I − W)."""

    @abstractmethod
    def constants(self) -> Constants:
        """Return (m, L) of I − W in the Λ norm, each rounded to the safe side."""

    @abstractmethod
    def memo(self, key: Hashable, build: Callable[[], T_]) -> T_:
        """Return what `build` returned on the first call with `key`, here or on the transpose."""

    @abstractmethod
    def to(self, dtype: torch.dtype) -> LinearOperator:
        """Return the same operator in another precision."""

    def norm(self, z: Float[Tensor, "*batch n"]) -> Float[Tensor, " *batch"]:
        """Return ‖z‖_Λ per sample."""
        key = ("root metric", self.transposed)
        root = self.memo(key, lambda: self.metric.detach().sqrt())
        weighted = z * root
        # Scaled by the largest entry, so that squares neither overflow nor vanish.
        largest = weighted.abs().amax(-1, keepdim=True)
        largest.clamp_min_(torch.finfo(z.dtype).tiny)
        return torch.linalg.vector_norm(weighted / largest, dim=-1) * largest.squeeze(-1)


@dataclass(frozen=True, eq=False)
class DenseOperator(LinearOperator):
    """W stored as an n × n matrix.

    Args:
        W: n × n.
        metric: Λ as a vector of n positive numbers; ones when omitted.

    Raises:
        ValueError: if W is not square, or the metric has another length, dtype or device.
    """

    W: Float[Tensor, "n n"]
    metric: Float[Tensor, " n"] = None  # type: ignore[assignment]
    transposed: bool = field(default=False, repr=False)
    _memo: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        W = self.W
        if W.ndim != 2 or W.shape[0] != W.shape[1]:
            raise ValueError(f"W must be a square matrix, got shape {tuple(W.shape)}")
        if self.metric is None:
            object.__setattr__(self, "metric", torch.ones_like(W.detach()[0]))
        if self.metric.shape != W.shape[:1]:
            raise ValueError(
                f"metric must hold one number per unit, shape ({W.shape[0]},), "
                f"got {tuple(self.metric.shape)}"
            )
        if self.metric.dtype != W.dtype or self.metric.device != W.device:
            raise ValueError(
                f"metric is {self.metric.dtype} on {self.metric.device}, "
                f"W is {W.dtype} on {W.device}"
            )

    @property
    def n(self) -> int:
        return self.W.shape[0]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.W,)

    @property
    def T(self) -> DenseOperator:
        # Note [Shared factors]
        # W and Wᵀ share one memo. Resolvents are factored from W as first given and transposed
        # on demand, so one factorization serves forward and backward; step sizes, determinant
        # and constants do not change under transposition. The memo holds no tensor with a graph.
        return DenseOperator(self.W.T, 1 / self.metric.detach(), not self.transposed, self._memo)

    def rebuild(self, tensors: tuple[Tensor, ...]) -> DenseOperator:
        (W,) = tensors
        return DenseOperator(W, self.metric, self.transposed, self._memo)

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

    def log_determinant(self) -> float:
        return self.memo("log det", lambda: float(torch.linalg.slogdet(self._I_minus_W())[1]))

    def _I_minus_W(self) -> Tensor:
        A = -self.W.detach()
        A.diagonal().add_(1)
        return A

    def resolvent(self, step: Step) -> Resolvent:
        """Factor I + diag(α)(I − W) by one LU.

        Raises:
            ValueError: if the matrix is singular, which no monotone W allows.
        """
        # A tensor is its own key: the stored resolvent keeps it alive, so its id stays unique.
        key = ("resolvent", step if isinstance(step, float | int) else id(step))
        factor = self.memo(key, lambda: self._factor(step))
        return factor.T if self.transposed else factor

    def _factor(self, step: Step) -> Resolvent:
        A = self._I_minus_W()
        A = (A.T if self.transposed else A) * (
            step[:, None] if isinstance(step, Tensor) and step.ndim else step
        )
        A.diagonal().add_(1)
        inverse, info = torch.linalg.inv_ex(A)
        if int(info) != 0 or not bool(torch.isfinite(inverse).all()):
            raise ValueError(
                "I + α(I − W) is singular or not finite, so W is not monotone (or not finite) "
                f"at step size {step}: check the weights with their certificate"
            )
        return Resolvent(inverse, step)

    def constants(self) -> Constants:
        """Return (m, L), widened by the backward error of the symmetric eigensolver.

        Note: m is computed from the eigenvalues of float64 sym H and lowered by 8 n u ‖H‖_F, a
        standard bound of that computation's backward error (Higham 2002, ch. 3 and LAPACK
        Users' Guide §4.7); L likewise raised. A machine-checked proof of m is the business of a
        certificate, not of a solver.
        """
        return self.memo("constants", self._constants)

    def _constants(self) -> Constants:
        root = self.metric.detach().double().sqrt()
        H = torch.eye(self.n, dtype=torch.float64, device=self.W.device) - self.W.detach().double()
        H = root[:, None] * H / root[None, :]
        slack = 8 * self.n * torch.finfo(torch.float64).eps * float(torch.linalg.matrix_norm(H))
        m = float(torch.linalg.eigvalsh(0.5 * (H + H.T))[0]) - slack
        return Constants(m=m, L=float(torch.linalg.matrix_norm(H, 2)) + slack)

    def memo(self, key: Hashable, build: Callable[[], T_]) -> T_:
        if key not in self._memo:
            self._memo[key] = build()
        return self._memo[key]

    def to(self, dtype: torch.dtype) -> DenseOperator:
        if dtype == self.W.dtype:
            return self
        return self.memo(
            ("to", dtype, self.transposed),
            lambda: DenseOperator(self.W.detach().to(dtype), self.metric.detach().to(dtype)),
        )

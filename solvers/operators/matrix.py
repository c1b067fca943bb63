"""What is known of W once it is written out as a matrix?

Its resolvent, its relaxation, and the constants (m, L) of I − W in the norm ‖z‖_Λ = √(zᵀΛz).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from solvers.activations import Step
from solvers.operators.maps import Map, Resolvent, column, singular
from solvers.precision import cast


@dataclass(frozen=True)
class Constants:
    """Constants of I − W in the Λ norm, with H = Λ^½ (I − W) Λ^(−½).

    Attributes:
        m: lower bound of the strong monotonicity λmin(sym H).
        L: upper bound of the Lipschitz constant ‖H‖₂.

    Example:
        >>> import torch
        >>> from solvers import DenseOperator
        >>> c = DenseOperator(torch.tensor([[0.5, -1.0], [1.0, 0.5]])).constants()
        >>> round(c.m, 3), round(c.L, 3)
        (0.5, 1.118)
    """

    m: float
    L: float


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


def complement(W: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """Return I − W in new memory."""
    A = -W
    A.diagonal().add_(1)
    return A


def shifted(W: Float[Tensor, "n n"], step: Step) -> Float[Tensor, "n n"]:
    """Return I + diag(α)(I − W), what a resolvent inverts, in new memory."""
    A = complement(W) * column(step)
    A.diagonal().add_(1)
    return A


def resolvent(W: Float[Tensor, "n n"], step: Step) -> DenseResolvent:
    """Return the resolvent of a matrix.

    Raises:
        NotMonotoneError: if it does not exist, which no monotone W allows.
    """
    inverse, info = torch.linalg.inv_ex(shifted(W, step))
    if int(info) != 0 or not is_finite(inverse):
        raise singular(step)
    return DenseResolvent(inverse, step)


def relaxation(W: Float[Tensor, "n n"], step: Step) -> DenseMap:
    """Return (1 − α)I + αW."""
    matrix = W.T * step  # column j of the transpose belongs to unit j
    matrix.diagonal().add_(1 - step)
    return DenseMap(matrix.contiguous())


def constants(
    W: Float[Tensor, "n n"], metric: Float[Tensor, " n"], error: float = 0.0
) -> Constants:
    """Return (m, L) of I − W for every matrix within ‖Λ^½ E Λ^(−½)‖₂ ≤ error of W.

    m is computed from the eigenvalues of float64 sym H and lowered by 8 n u ‖H‖_F, a standard bound
    of that computation's backward error (Higham 2002, ch. 3 and LAPACK Users' Guide §4.7), and by
    the error; L is raised likewise. A machine-checked proof of m is the business of a certificate,
    not of a solver.
    """
    W, metric = cast(W, torch.float64), cast(metric, torch.float64)
    n, root = len(W), metric.sqrt()
    H = torch.eye(n, dtype=torch.float64, device=W.device) - W
    H = root[:, None] * H / root[None, :]
    if not is_finite(H) or not math.isfinite(error):
        return Constants(m=-math.inf, L=math.inf)
    slack = 8 * n * torch.finfo(torch.float64).eps * float(torch.linalg.matrix_norm(H)) + error
    m = float(torch.linalg.eigvalsh(0.5 * (H + H.T))[0]) - slack
    return Constants(m=m, L=float(torch.linalg.matrix_norm(H, 2)) + slack)


def is_finite(t: Tensor) -> bool:
    """Say whether all numbers are finite."""
    # A sum that is finite has no other summands, and takes one pass.
    return math.isfinite(float(t.detach().sum())) or bool(torch.isfinite(t.detach()).all())

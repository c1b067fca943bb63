"""Which diagonal Λ proves the least bound? A structured interior-point method, batched.

The program, for W, U, C, D of a layer and Λ′ = γΛ, is

    minimise Σ τ   over τ, Λ′ = diag(λ) ≻ 0   so that

        M(τ, λ) = [ diag(τ) − DᵀD         −(UᵀΛ′ + DᵀC)              ]
                  [ −(UᵀΛ′ + DᵀC)ᵀ         2Λ′ − Λ′W − WᵀΛ′ − CᵀC    ]  ⪰ 0.

With τ = γ² the same number for every input it is the least l2 bound (Fazlyab et al. 2019 for
feed-forward networks); with a number per input, √Σ τ bounds the l∞ → l2 constant, for
Σ τₖδₖ² ≤ ε² Σ τₖ wherever ‖δ‖_∞ ≤ ε.

Note [Structure]
A multiplier enters by Aᵢ = eᵢcᵢᵀ + cᵢeᵢᵀ, with eᵢ unit i and cᵢ = (−Uᵢ, eᵢ − Wᵢ). So with Z = M⁻¹
the barrier −log det M has the gradient −2eᵢᵀZcᵢ and the Hessian
2[(eᵢᵀZeⱼ)(cᵢᵀZcⱼ) + (eᵢᵀZcⱼ)(cᵢᵀZeⱼ)]: entrywise products of three n × n matrices. A Newton step
costs a few products of matrices as large as M, and nothing that a general solver of semidefinite
programs spends on n unstructured constraints.

Everything here proposes; `lben.certificates` proves.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

_REDUCTION = 0.1
"""Of the barrier's weight, once a point is near the central path."""
_NEAR = 0.5
"""Newton decrement below which a point counts as near the central path."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Program:
    """The matrices of a batch of programs, float64.

    Attributes:
        W: n × n.
        U: n × p.
        C: q × n.
        D: q × p.
        per_input: whether τ has a number per input instead of one for all.
    """

    W: Float[Tensor, "batch n n"]
    U: Float[Tensor, "batch n p"]
    C: Float[Tensor, "batch q n"]
    D: Float[Tensor, "batch q p"]
    per_input: bool = False

    def reduced(self) -> Program:
        """Return the same programs with p ≤ n + q inputs, in an orthonormal basis of U and D.

        Only for one τ: the rest of the input space asks for τ ≥ 0 alone.
        """
        rows = torch.cat([self.D, self.U], dim=1)
        if self.per_input or rows.shape[2] <= rows.shape[1]:
            return self
        basis = torch.linalg.qr(rows.mT)[0]
        return Program(W=self.W, U=self.U @ basis, C=self.C, D=self.D @ basis)

    def select(self, index: Tensor) -> Program:
        """Return some programs of the batch."""
        return Program(
            W=self.W[index], U=self.U[index], C=self.C[index], D=self.D[index],
            per_input=self.per_input,
        )  # fmt: skip

    @property
    def columns(self) -> Float[Tensor, "batch n N"]:
        """The vectors cᵢ as rows."""
        n = self.W.shape[-1]
        identity = torch.eye(n, dtype=self.W.dtype, device=self.W.device)
        return torch.cat([-self.U, identity - self.W], dim=2)

    def matrix(self, tau: Tensor, multiplier: Tensor) -> Float[Tensor, "batch N N"]:
        """Return M(τ, λ)."""
        outputs = torch.cat([self.D, self.C], dim=2)
        M = -outputs.mT @ outputs
        p = self.U.shape[2]
        weighted = multiplier[:, :, None] * self.columns
        M[:, p:] += weighted
        M[:, :, p:] += weighted.mT
        M.diagonal(dim1=1, dim2=2)[:, :p] += tau
        return M


@dataclass(frozen=True, kw_only=True, eq=False)
class Optimum:
    """What was found: strictly feasible, and at most `gap` above the least Στ (relative)."""

    tau: Float[Tensor, "batch k"]
    multiplier: Float[Tensor, "batch n"]
    gap: Float[Tensor, " batch"]
    steps: int


def minimise(
    program: Program,
    multiplier: Float[Tensor, "batch n"],
    *,
    gap: float = 1e-5,
    target: Float[Tensor, " batch"] | None = None,
    max_steps: int = 200,
) -> Optimum:
    """Follow the central path from a multiplier for which 2Λ − ΛW − WᵀΛ is positive definite.

    Each program of the batch has its own barrier weight and step length, and leaves when its gap
    is closed.

    Args:
        program: the matrices.
        multiplier: λ up to a common factor, one row per program.
        gap: relative accuracy of Στ.
        target: a value of Στ; a program leaves once it is reached, or known to be out of reach.
        max_steps: of Newton's method.

    Returns:
        The best point of each program; its `gap` says how far it came.

    Raises:
        ValueError: if 2Λ − ΛW − WᵀΛ is not positive definite.
    """
    program = program.reduced()
    tau, lam = _start(program, multiplier)
    active = torch.arange(len(lam), device=lam.device)
    rows = program.W.shape[-1] + program.columns.shape[2]  # the barrier's parameter
    weight = tau.sum(1) / rows
    reached = torch.full_like(weight, torch.inf)
    result_tau, result_lam = tau.clone(), lam.clone()
    steps = 0
    while len(active) and steps < max_steps:
        steps += 1
        part = program if len(active) == len(lam) else program.select(active)
        t, x, mu = result_tau[active], result_lam[active], weight[active]
        direction_t, direction_x, decrement = _newton(part, t, x, mu)
        length = _length(part, t, x, direction_t, direction_x, decrement)
        result_tau[active] = t + length[:, None] * direction_t
        result_lam[active] = x + length[:, None] * direction_x
        near = decrement * (1 - length).clamp_min(decrement) < _NEAR
        reached[active] = torch.where(
            near, mu * rows * 1.5 / result_tau[active].sum(1), reached[active]
        )
        weight[active] = torch.where(near, mu * _REDUCTION, mu)
        left = (reached[active] > gap) & decrement.isfinite()
        if target is not None:
            value, goal = result_tau[active].sum(1), target[active]
            left &= (value > goal) & (value * (1 - reached[active]) <= goal)
        active = active[left]
    return Optimum(tau=result_tau, multiplier=result_lam, gap=reached, steps=steps)


def _start(program: Program, multiplier: Tensor) -> tuple[Tensor, Tensor]:
    """Scale λ and choose τ so that M is well inside the cone."""
    n = program.W.shape[-1]
    weighted = multiplier[:, :, None] * (
        torch.eye(n, dtype=multiplier.dtype, device=multiplier.device) - program.W
    )
    S = weighted + weighted.mT
    root, failed = torch.linalg.cholesky_ex(S)
    if bool(failed.any()):
        raise ValueError("2Λ − ΛW − WᵀΛ is not positive definite")
    outputs = torch.linalg.solve_triangular(root, program.C.mT, upper=False)
    scale = 2 * torch.linalg.matrix_norm(outputs, 2).square()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))[:, None]
    lam = scale * multiplier
    schur = scale[:, :, None] * S - program.C.mT @ program.C
    side = lam[:, :, None] * program.U + program.C.mT @ program.D
    root = torch.linalg.cholesky_ex(schur)[0]
    inner = torch.linalg.solve_triangular(root, side, upper=False)
    P = program.D.mT @ program.D + inner.mT @ inner
    if program.per_input:
        tau = 2 * P.abs().sum(2)  # Gershgorin's circles
        tau = tau + 1e-6 * tau.amax(1, keepdim=True)
    else:
        tau = 2 * torch.linalg.matrix_norm(P, 2)[:, None]
    tiny = torch.finfo(tau.dtype).tiny ** 0.5
    return tau.clamp_min(tiny), lam


def _newton(
    program: Program, tau: Tensor, lam: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return Newton's direction for Στ/μ − log det M − Σ log λ − Σ log τ, and the decrement."""
    p = program.U.shape[2]
    c = program.columns
    root = torch.linalg.cholesky_ex(program.matrix(tau, lam))[0]
    Z = torch.cholesky_inverse(root)
    Zc = Z @ c.mT
    E, F, G, X, Y = Z[:, p:, p:], Zc[:, p:], c @ Zc, Z[:, :p, :p], Zc[:, :p]
    gradient_x = -2 * F.diagonal(dim1=1, dim2=2) - 1 / lam
    curvature = 2 * (E * G + F * F.mT)
    curvature.diagonal(dim1=1, dim2=2).add_(1 / lam.square())
    mixed = 2 * Z[:, p:, :p] * Y.mT
    diagonal = X.diagonal(dim1=1, dim2=2)
    if program.per_input:
        gradient_t, square = 1 / weight[:, None] - diagonal, X.square()
    else:
        gradient_t = (1 / weight - diagonal.sum(1))[:, None]
        square, mixed = X.square().sum((1, 2))[:, None, None], mixed.sum(2, keepdim=True)
    hessian = torch.cat(
        [torch.cat([square, mixed.mT], dim=2), torch.cat([mixed, curvature], dim=2)], dim=1
    )
    gradient = torch.cat([gradient_t, gradient_x], dim=1)
    scale = hessian.diagonal(dim1=1, dim2=2).rsqrt()
    factor = torch.linalg.cholesky_ex(scale[:, :, None] * hessian * scale[:, None, :])[0]
    scaled = -(scale * gradient)[:, :, None]
    direction = scale * torch.cholesky_solve(scaled, factor)[:, :, 0]
    # A Hessian that rounding has made indefinite ends the program where it stands.
    solved = torch.isfinite(direction).all(1)
    direction = torch.where(solved[:, None], direction, 0.0)
    decrement = torch.where(solved, -(gradient * direction).sum(1), torch.inf)
    return direction[:, : tau.shape[1]], direction[:, tau.shape[1] :], decrement.clamp_min(0).sqrt()


def _length(
    program: Program,
    tau: Tensor,
    lam: Tensor,
    direction_t: Tensor,
    direction_x: Tensor,
    decrement: Tensor,
) -> Tensor:
    """Return a step length that stays inside the cone.

    The damped step 1/(1 + decrement) always does (Nesterov and Nemirovskii 1994); longer ones are
    tried first.
    """
    safe = 1 / (1 + decrement)
    length = torch.where(decrement < 0.25, torch.ones_like(safe), (6 * safe).clamp_max(1.0))
    while True:
        t, x = tau + length[:, None] * direction_t, lam + length[:, None] * direction_x
        inside = (t > 0).all(1) & (x > 0).all(1)
        inside &= torch.linalg.cholesky_ex(program.matrix(t, x))[1] == 0
        if bool(inside.all()) or not bool((length[~inside] > 1e-6).all()):
            return torch.where(inside, 0.9 * length + 0.1 * safe.minimum(length), 0 * length)
        length = torch.where(inside, length, 0.5 * length)

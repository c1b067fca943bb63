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

Note [Units that nothing moves]
Where no input reaches some units, every large enough multiple of their λ is feasible, −log det M
falls without end, and there is no central path. So λ is bounded above, by `WIDE` times where it
starts, with a barrier of its own.

Everything here proposes; `lben.certificates` proves.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lben.tightening.central_path import follow, has_ended, is_solved, log_barrier

WIDE = 1e6
"""Largest λ, see Note [Units that nothing moves]."""
_SHARE = 0.1
"""Of the norm of an output that facts take off at the start."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Program:
    """The matrices of a batch of programs, float64.

    Attributes:
        W: n × n.
        U: n × p.
        C: q × n.
        D: q × p.
        per_input: whether τ has a number per input instead of one for all.
        facts: f × (p + n), for q = 1 and one τ: F(x, z) ≥ 0 is known, so the output less wᵀF falls
            no slower than the output itself, for every w ≥ 0, and w is optimised with the rest.
        prices: f numbers ≥ 0: what w adds to the objective, per unit.
        most: n upper bounds of λ; see Note [Units that nothing moves].
    """

    W: Float[Tensor, "batch n n"]
    U: Float[Tensor, "batch n p"]
    C: Float[Tensor, "batch q n"]
    D: Float[Tensor, "batch q p"]
    per_input: bool = False
    facts: Float[Tensor, "batch f N"] | None = None
    prices: Float[Tensor, "batch f"] | None = None
    most: Float[Tensor, "batch n"] | None = None

    def reduced(self) -> Program:
        """Return the same programs with p ≤ n + q inputs, in an orthonormal basis of U and D.

        Only for one τ: the rest of the input space asks for τ ≥ 0 alone.
        """
        rows = torch.cat([self.D, self.U], dim=1)
        if self.per_input or self.facts is not None or rows.shape[2] <= rows.shape[1]:
            return self
        basis = torch.linalg.qr(rows.mT)[0]
        return Program(W=self.W, U=self.U @ basis, C=self.C, D=self.D @ basis)

    def select(self, index: Tensor) -> Program:
        """Return some programs of the batch."""
        tensors = {k: t for k, t in vars(self).items() if isinstance(t, Tensor)}
        parts: dict[str, Any] = {name: tensor[index] for name, tensor in tensors.items()}
        return replace(self, **parts)

    @property
    def costs(self) -> int:
        """Numbers of τ."""
        return self.U.shape[2] if self.per_input else 1

    @property
    def parameter(self) -> int:
        """The barrier's parameter: rows of M, bounds of units, and facts."""
        facts = 0 if self.facts is None else self.facts.shape[1]
        sides = 2 if self.most is None else 3
        return sides * self.W.shape[-1] + self.U.shape[2] + facts

    @property
    def columns(self) -> Float[Tensor, "batch n N"]:
        """The vectors cᵢ as rows."""
        n = self.W.shape[-1]
        identity = torch.eye(n, dtype=self.W.dtype, device=self.W.device)
        return torch.cat([-self.U, identity - self.W], dim=2)

    def split(self, point: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return τ, λ and w."""
        end = self.costs + self.W.shape[-1]
        return point[:, : self.costs], point[:, self.costs : end], point[:, end:]

    def objective(self, point: Tensor) -> Float[Tensor, " batch"]:
        """Return Στ, and what the facts in use cost."""
        tau, _, w = self.split(point)
        total = tau.sum(1)
        return total if self.prices is None else total + (self.prices * w).sum(1)

    def outputs(self, w: Tensor) -> Float[Tensor, "batch q N"]:
        """Return (D, C), less what the facts take off."""
        outputs = torch.cat([self.D, self.C], dim=2)
        return outputs if self.facts is None else outputs - w[:, None] @ self.facts

    def matrix(self, point: Tensor) -> Float[Tensor, "batch N N"]:
        """Return M(τ, λ, w)."""
        tau, lam, w = self.split(point)
        outputs = self.outputs(w)
        M = -outputs.mT @ outputs
        p = self.U.shape[2]
        weighted = lam[:, :, None] * self.columns
        M[:, p:] += weighted
        M[:, :, p:] += weighted.mT
        M.diagonal(dim1=1, dim2=2)[:, :p] += tau
        return M

    def value(self, point: Tensor, weight: Tensor) -> Float[Tensor, " batch"]:
        """Return objective/μ − log det M − Σ log λ − Σ log w, infinite outside the cone.

        And −Σ log(most − λ), where λ is bounded.
        """
        inside = (point > 0).all(1)
        value = self.objective(point) / weight + log_barrier(self.matrix(point))
        if self.most is not None:
            left = 1 - self.split(point)[1] / self.most
            inside &= (left > 0).all(1)
            value = value - left.log().sum(1)
        return torch.where(inside, value - point[:, self.costs :].log().sum(1), torch.inf)

    def newton(self, point: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return Newton's direction for that value, and the decrement."""
        _, lam, w = self.split(point)
        p, c = self.U.shape[2], self.columns
        Z = torch.cholesky_inverse(torch.linalg.cholesky_ex(self.matrix(point))[0])
        Zc = Z @ c.mT
        E, F, G, X, Y = Z[:, p:, p:], Zc[:, p:], c @ Zc, Z[:, :p, :p], Zc[:, :p]
        gradient_x = -2 * F.diagonal(dim1=1, dim2=2) - 1 / lam
        curvature = 2 * (E * G + F * F.mT)
        curvature.diagonal(dim1=1, dim2=2).add_(1 / lam.square())
        if self.most is not None:
            gradient_x = gradient_x + 1 / (self.most - lam)
            curvature.diagonal(dim1=1, dim2=2).add_(1 / (self.most - lam).square())
        mixed = 2 * Z[:, p:, :p] * Y.mT
        diagonal = X.diagonal(dim1=1, dim2=2)
        if self.per_input:
            gradient_t, square = 1 / weight[:, None] - diagonal, X.square()
        else:
            gradient_t = (1 / weight - diagonal.sum(1))[:, None]
            square, mixed = X.square().sum((1, 2))[:, None, None], mixed.sum(2, keepdim=True)
        gradient = torch.cat([gradient_t, gradient_x], dim=1)
        hessian = _bordered(square, mixed, curvature)
        if self.facts is not None:
            b = self.outputs(w)
            z = b @ Z
            ZF = Z @ self.facts.mT
            zF, one = b @ ZF, 1 + (z @ b.mT)
            own = 2 * (one * (self.facts @ ZF) + zF.mT @ zF)
            own.diagonal(dim1=1, dim2=2).add_(1 / w.square())
            to_lam = 2 * (z[:, :, p:].mT * (c @ ZF) + (c @ z.mT) * ZF[:, p:])
            to_tau = 2 * z[:, :, :p] @ ZF[:, :p]
            idle = (self.facts == 0).all(2)  # nothing known of a unit: its w stays where it is
            price = 0.0 if self.prices is None else self.prices / weight[:, None]
            gradient_w = torch.where(idle, 0.0, price - 2 * zF[:, 0] - 1 / w)
            gradient = torch.cat([gradient, gradient_w], dim=1)
            hessian = _bordered(hessian, torch.cat([to_tau, to_lam], dim=1).mT, own)
        return has_ended(is_solved(hessian, gradient), gradient)

    def worst_direction(self, point: Tensor) -> Float[Tensor, "batch N"]:
        """Return (x, z), up to a factor, at which the output of q = 1 falls fastest."""
        b = self.outputs(self.split(point)[2]).mT
        return -torch.cholesky_solve(b, torch.linalg.cholesky_ex(self.matrix(point))[0])[:, :, 0]


def _bordered(first: Tensor, border: Tensor, last: Tensor) -> Tensor:
    """Return [first, borderᵀ; border, last]."""
    return torch.cat([torch.cat([first, border.mT], 2), torch.cat([border, last], 2)], 1)


@dataclass(frozen=True, kw_only=True, eq=False)
class Optimum:
    """What was found: strictly feasible, and at most `gap` (relative) above the minimum."""

    tau: Float[Tensor, "batch k"]
    multiplier: Float[Tensor, "batch n"]
    facts: Float[Tensor, "batch f"]
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
        gap: relative accuracy of the objective, Στ unless facts have a price.
        target: a value of the objective; a program leaves once it is reached, or known to be out
            of reach.
        max_steps: of Newton's method.

    Returns:
        The best point of each program; its `gap` says how far it came.

    Raises:
        ValueError: if 2Λ − ΛW − WᵀΛ is not positive definite.
    """
    program = program.reduced()
    start = find_feasible(program, multiplier)
    program = replace(program, most=WIDE * program.split(start)[1])
    end = follow(program, start, gap=gap, target=target, max_steps=max_steps)
    tau, lam, w = program.split(end.point)
    return Optimum(tau=tau, multiplier=lam, facts=w, gap=end.gap, steps=end.steps)


def find_feasible(program: Program, multiplier: Tensor) -> Tensor:
    """Return a point with a multiple of a given λ, at which M is well inside the cone.

    Raises:
        ValueError: if 2Λ − ΛW − WᵀΛ is not positive definite.
    """
    p, (batch, n) = program.U.shape[2], multiplier.shape
    w = multiplier.new_ones(batch, 0)
    if program.facts is not None:
        norm = torch.cat([program.D, program.C], dim=2).flatten(1).norm(dim=1)[:, None]
        each = program.facts.norm(dim=2)
        w = torch.where(each > 0, _SHARE * norm / (program.facts.shape[1] * each), 1.0)
    outputs = program.outputs(w)
    D, C = outputs[:, :, :p], outputs[:, :, p:]
    weighted = multiplier[:, :, None] * (
        torch.eye(n, dtype=multiplier.dtype, device=multiplier.device) - program.W
    )
    S = weighted + weighted.mT
    root, failed = torch.linalg.cholesky_ex(S)
    if bool(failed.any()):
        raise ValueError("2Λ − ΛW − WᵀΛ is not positive definite")
    inner = torch.linalg.solve_triangular(root, C.mT, upper=False)
    scale = 2 * torch.linalg.matrix_norm(inner, 2).square()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))[:, None]
    lam = scale * multiplier
    schur = scale[:, :, None] * S - C.mT @ C
    side = lam[:, :, None] * program.U + C.mT @ D
    root = torch.linalg.cholesky_ex(schur)[0]
    inner = torch.linalg.solve_triangular(root, side, upper=False)
    P = D.mT @ D + inner.mT @ inner
    if program.per_input:
        tau = 2 * P.abs().sum(2)  # Gershgorin's circles
        tau = tau + 1e-6 * tau.amax(1, keepdim=True)
    else:
        tau = 2 * torch.linalg.matrix_norm(P, 2)[:, None]
    tiny = torch.finfo(tau.dtype).tiny ** 0.5
    return torch.cat([tau.clamp_min(tiny), lam, w], dim=1)

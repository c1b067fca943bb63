"""Which diagonal Λ proves the least bound? A structured interior-point method, batched.

Let W (n × n), U (n × p), C (q × n) and D (q × p) be the weights of a layer, and Λ′ = γΛ. The
program is

    minimise Σ τ   over τ, Λ′ = diag(λ) ≻ 0   so that

        M(τ, λ) = [ diag(τ) − DᵀD         −(UᵀΛ′ + DᵀC)              ]
                  [ −(UᵀΛ′ + DᵀC)ᵀ         2Λ′ − Λ′W − WᵀΛ′ − CᵀC    ]  ⪰ 0.

This is γM(Λ, γ) with τ for γ² (lben/certificates/inequality.py). With the same τ = γ² for every
input its minimum is the least l2 bound that diagonal multipliers show (Fazlyab et al. 2019 for
feed-forward networks). With a number per input, √Σ τ bounds the constant from linf to l2, since
Σ τₖδₖ² ≤ ε² Σ τₖ wherever ‖δ‖_∞ ≤ ε. Symbols: docs/glossary.md.

Note [Structure]
The multiplier λᵢ of unit i enters M as λᵢ(eᵢcᵢᵀ + cᵢeᵢᵀ), where eᵢ is the coordinate vector of the
unit and cᵢ = (−Uᵢ, eᵢ − Wᵢ) holds row i of −U and of I − W. So with Z = M⁻¹ the barrier −log det M
has the gradient −2eᵢᵀZcᵢ and the Hessian 2[(eᵢᵀZeⱼ)(cᵢᵀZcⱼ) + (eᵢᵀZcⱼ)(cᵢᵀZeⱼ)]: entrywise products
of three n × n matrices. A Newton step costs a few products of matrices as large as M; a general
solver of semidefinite programs would form n such matrices.

Note [Units that nothing moves]
Where no input reaches some units, every large enough multiple of their λ is feasible: −log det M
has no lower bound, and there is no central path. So a barrier of its own keeps λ below
`MULTIPLIER_RANGE` times its start.

Everything here proposes; `lben.certificates` proves.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lben.tightening.central_path import (
    evaluate_log_det_barrier,
    follow_central_path,
    measure_decrement,
    solve_newton_system,
)

MULTIPLIER_RANGE = 1e6
"""Largest λ over its start, see Note [Units that nothing moves]."""
_INITIAL_SHARE = 0.1
"""Of an output's norm: what the weighted constraints take off at the start."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Program:
    """The matrices of a batch of programs, float64.

    Attributes:
        W: state to state.
        U: input to state.
        C: state to output.
        D: input to output.
        per_input: whether τ has a number per input instead of one for all.
        constraints: f rows F over (x, z), N = p + n, for q = 1 and one τ. F(x, z) ≥ 0 is known; so
            for every w ≥ 0 the output less wᵀF(x, z) falls at least as fast as the output itself,
            and a bound of the one is a bound of the other. w is optimised with τ and λ.
        prices: f numbers ≥ 0: what a unit of each w adds to the objective.
        multiplier_limit: upper bounds of λ; see Note [Units that nothing moves].
    """

    W: Float[Tensor, "batch n n"]
    U: Float[Tensor, "batch n p"]
    C: Float[Tensor, "batch q n"]
    D: Float[Tensor, "batch q p"]
    per_input: bool = False
    constraints: Float[Tensor, "batch f N"] | None = None
    prices: Float[Tensor, "batch f"] | None = None
    multiplier_limit: Float[Tensor, "batch n"] | None = None

    def reduce_inputs(self) -> Program:
        """Return programs with the same optimum and p ≤ n + q inputs.

        The inputs become coordinates in an orthonormal basis of the rows of U and D. On the rest of
        the input space M is τI, which asks for τ ≥ 0 only; so this needs one τ for all inputs.
        """
        rows = torch.cat([self.D, self.U], dim=1)
        if self.per_input or self.constraints is not None or rows.shape[2] <= rows.shape[1]:
            return self
        basis = torch.linalg.qr(rows.mT)[0]
        return Program(W=self.W, U=self.U @ basis, C=self.C, D=self.D @ basis)

    def select(self, index: Tensor) -> Program:
        """Return the programs at some indices of the batch."""
        tensors = {k: t for k, t in vars(self).items() if isinstance(t, Tensor)}
        parts: dict[str, Any] = {name: tensor[index] for name, tensor in tensors.items()}
        return replace(self, **parts)

    @property
    def costs(self) -> int:
        """How many numbers τ has."""
        return self.U.shape[2] if self.per_input else 1

    @property
    def parameter(self) -> int:
        """The barrier's parameter: rows of M, bounds of every λ, and constraints."""
        constraints = 0 if self.constraints is None else self.constraints.shape[1]
        sides = 2 if self.multiplier_limit is None else 3
        return sides * self.W.shape[-1] + self.U.shape[2] + constraints

    @property
    def columns(self) -> Float[Tensor, "batch n N"]:
        """The vectors cᵢ as rows."""
        n = self.W.shape[-1]
        identity = torch.eye(n, dtype=self.W.dtype, device=self.W.device)
        return torch.cat([-self.U, identity - self.W], dim=2)

    def split(self, point: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return τ, λ and w, the parts of a point."""
        end = self.costs + self.W.shape[-1]
        return point[:, : self.costs], point[:, self.costs : end], point[:, end:]

    def evaluate_objective(self, point: Tensor) -> Float[Tensor, " batch"]:
        """Return Στ plus the prices of w."""
        tau, _, w = self.split(point)
        total = tau.sum(1)
        return total if self.prices is None else total + (self.prices * w).sum(1)

    def combine_outputs(self, w: Tensor) -> Float[Tensor, "batch q N"]:
        """Return (D, C) less wᵀF."""
        outputs = torch.cat([self.D, self.C], dim=2)
        return outputs if self.constraints is None else outputs - w[:, None] @ self.constraints

    def assemble_matrix(self, point: Tensor) -> Float[Tensor, "batch N N"]:
        """Return M(τ, λ, w)."""
        tau, lam, w = self.split(point)
        outputs = self.combine_outputs(w)
        M = -outputs.mT @ outputs
        p = self.U.shape[2]
        weighted = lam[:, :, None] * self.columns
        M[:, p:] += weighted
        M[:, :, p:] += weighted.mT
        M.diagonal(dim1=1, dim2=2)[:, :p] += tau
        return M

    def evaluate_barrier(self, point: Tensor, weight: Tensor) -> Float[Tensor, " batch"]:
        """Return objective/μ − log det M − Σ log λ − Σ log w − Σ log(1 − λ/limit).

        Infinite outside the cone. The last sum is there where λ has a limit.
        """
        inside = (point > 0).all(1)
        value = self.evaluate_objective(point) / weight + evaluate_log_det_barrier(
            self.assemble_matrix(point)
        )
        if self.multiplier_limit is not None:
            left = 1 - self.split(point)[1] / self.multiplier_limit
            inside &= (left > 0).all(1)
            value = value - left.log().sum(1)
        return torch.where(inside, value - point[:, self.costs :].log().sum(1), torch.inf)

    def compute_newton_step(self, point: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return Newton's direction for `evaluate_barrier`, and the decrement."""
        _, lam, w = self.split(point)
        p, c = self.U.shape[2], self.columns
        Z = torch.cholesky_inverse(torch.linalg.cholesky_ex(self.assemble_matrix(point))[0])
        Zc = Z @ c.mT
        E, F, G, X, Y = Z[:, p:, p:], Zc[:, p:], c @ Zc, Z[:, :p, :p], Zc[:, :p]
        gradient_x = -2 * F.diagonal(dim1=1, dim2=2) - 1 / lam
        curvature = 2 * (E * G + F * F.mT)
        curvature.diagonal(dim1=1, dim2=2).add_(1 / lam.square())
        if self.multiplier_limit is not None:
            gradient_x = gradient_x + 1 / (self.multiplier_limit - lam)
            curvature.diagonal(dim1=1, dim2=2).add_(1 / (self.multiplier_limit - lam).square())
        mixed = 2 * Z[:, p:, :p] * Y.mT
        diagonal = X.diagonal(dim1=1, dim2=2)
        if self.per_input:
            gradient_t, square = 1 / weight[:, None] - diagonal, X.square()
        else:
            gradient_t = (1 / weight - diagonal.sum(1))[:, None]
            square, mixed = X.square().sum((1, 2))[:, None, None], mixed.sum(2, keepdim=True)
        gradient = torch.cat([gradient_t, gradient_x], dim=1)
        hessian = _border(square, mixed, curvature)
        if self.constraints is not None:
            b = self.combine_outputs(w)
            z = b @ Z
            ZF = Z @ self.constraints.mT
            zF, one = b @ ZF, 1 + (z @ b.mT)
            own = 2 * (one * (self.constraints @ ZF) + zF.mT @ zF)
            own.diagonal(dim1=1, dim2=2).add_(1 / w.square())
            to_lam = 2 * (z[:, :, p:].mT * (c @ ZF) + (c @ z.mT) * ZF[:, p:])
            to_tau = 2 * z[:, :, :p] @ ZF[:, :p]
            idle = (self.constraints == 0).all(
                2
            )  # nothing known of a unit: its w stays where it is
            price = 0.0 if self.prices is None else self.prices / weight[:, None]
            gradient_w = torch.where(idle, 0.0, price - 2 * zF[:, 0] - 1 / w)
            gradient = torch.cat([gradient, gradient_w], dim=1)
            hessian = _border(hessian, torch.cat([to_tau, to_lam], dim=1).mT, own)
        return measure_decrement(solve_newton_system(hessian, gradient), gradient)

    def find_worst_direction(self, point: Tensor) -> Float[Tensor, "batch N"]:
        """Return the increment (x, z), up to a factor, at which the output (q = 1) falls most."""
        b = self.combine_outputs(self.split(point)[2]).mT
        return -torch.cholesky_solve(b, torch.linalg.cholesky_ex(self.assemble_matrix(point))[0])[
            :, :, 0
        ]


def _border(first: Tensor, border: Tensor, last: Tensor) -> Tensor:
    """Return [first, borderᵀ; border, last]."""
    return torch.cat([torch.cat([first, border.mT], 2), torch.cat([border, last], 2)], 1)


@dataclass(frozen=True, kw_only=True, eq=False)
class Optimum:
    """Strictly feasible points of a batch of programs.

    Attributes:
        tau: τ, one number or one per input.
        multiplier: Λ′ = γΛ.
        constraints: w, the weights of the constraints.
        gap: relative bound of objective − minimum.
        steps: Newton steps of the batch.
    """

    tau: Float[Tensor, "batch k"]
    multiplier: Float[Tensor, "batch n"]
    constraints: Float[Tensor, "batch f"]
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
    """Minimise Στ over (τ, Λ′) with M(τ, λ) ⪰ 0, for each of a batch of programs.

    An interior-point method follows the central path. Each program has its own barrier weight and
    step length, and leaves the batch when its gap is closed.

    Args:
        program: the matrices.
        multiplier: λ up to a common factor, one row per program, for which 2Λ − ΛW − WᵀΛ is
            positive definite: the start.
        gap: relative accuracy of the objective, Στ unless constraints have a price.
        target: a value of the objective; a program also leaves once its objective is at most the
            target, or once its minimum is known to be above.
        max_steps: bound of the number of Newton steps.

    Returns:
        The last point of each program, and its gap.

    Raises:
        ValueError: if 2Λ − ΛW − WᵀΛ is not positive definite.

    Reference:
        Fazlyab et al. (2019), Theorem 2, for τ = γ²; Boyd and Vandenberghe (2004), section 11.6,
        for the method.

    Example:
        y = σ(2x) has the Lipschitz constant 2, so τ = γ² = 4.

        >>> import torch
        >>> from lben.tightening.interior_point import Program, minimise
        >>> one = torch.ones(1, 1, 1, dtype=torch.float64)
        >>> optimum = minimise(Program(W=0 * one, U=2 * one, C=one, D=0 * one), one[0])
        >>> round(optimum.tau.item(), 3)
        4.0
    """
    program = program.reduce_inputs()
    start = find_feasible_point(program, multiplier)
    program = replace(program, multiplier_limit=MULTIPLIER_RANGE * program.split(start)[1])
    end = follow_central_path(program, start, gap=gap, target=target, max_steps=max_steps)
    tau, lam, w = program.split(end.point)
    return Optimum(tau=tau, multiplier=lam, constraints=w, gap=end.gap, steps=end.steps)


def find_feasible_point(program: Program, multiplier: Tensor) -> Tensor:
    """Return a point (τ, λ, w) well inside the cone, with λ a multiple of a given multiplier.

    Raises:
        ValueError: if 2Λ − ΛW − WᵀΛ is not positive definite.
    """
    p, (batch, n) = program.U.shape[2], multiplier.shape
    w = multiplier.new_ones(batch, 0)
    if program.constraints is not None:
        norm = torch.cat([program.D, program.C], dim=2).flatten(1).norm(dim=1)[:, None]
        each = program.constraints.norm(dim=2)
        w = torch.where(
            each > 0, _INITIAL_SHARE * norm / (program.constraints.shape[1] * each), 1.0
        )
    outputs = program.combine_outputs(w)
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

"""Which diagonal Λ proves the least bound of a layer? The program of its weights, in a batch.

Let W (n × n), U (n × p), C (q × n) and D (q × p) be the weights of a layer, and Λ′ = γΛ. The
program is

    minimise Σ τ   over τ, Λ′ = diag(λ) ≻ 0   so that

        M(τ, λ) = [ diag(τ) − DᵀD         −(UᵀΛ′ + DᵀC)              ]
                  [ −(UᵀΛ′ + DᵀC)ᵀ         2Λ′ − Λ′W − WᵀΛ′ − CᵀC    ]  ⪰ 0.

This is γM(Λ, γ) with τ for γ² (lben/certificates/inequality.py). With the same τ = γ² for every
input its minimum is the least l2 bound that diagonal multipliers show (Fazlyab et al. 2019 for
feed-forward networks). With a number per input, √Σ τ bounds the constant from linf to l2, since
Σ τₖδₖ² ≤ ε² Σ τₖ wherever ‖δ‖_∞ ≤ ε. Symbols: docs/glossary.md.

Note [Units that nothing moves]
Where no input reaches some units, every large enough multiple of their λ is feasible, and the
optimum is not attained. So the objective has a price of λ, which adds `_MULTIPLIER_SHARE` of the
accuracy that was asked for where λ is at its start.

Everything here proposes; `lben.certificates` proves.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lben.tightening import primal_dual

_MULTIPLIER_SHARE = 1e-3
"""Of the accuracy: the price of λ at the start, see Note [Units that nothing moves]."""
_DRIVE_SHARE = 1e-8
"""Of ‖D‖²: what λ adds to τ at the start, at least."""
_INITIAL_SHARE = 0.1
"""Of an output's norm: what the weighted constraints take off at the start."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerProgram:
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
    """

    W: Float[Tensor, "batch n n"]
    U: Float[Tensor, "batch n p"]
    C: Float[Tensor, "batch q n"]
    D: Float[Tensor, "batch q p"]
    per_input: bool = False
    constraints: Float[Tensor, "batch f N"] | None = None
    prices: Float[Tensor, "batch f"] | None = None

    def reduce_inputs(self) -> LayerProgram:
        """Return programs with the same optimum and p ≤ n + q inputs.

        The inputs become coordinates in an orthonormal basis of the rows of U and D. On the rest of
        the input space M is τI, which asks for τ ≥ 0 only; so this needs one τ for all inputs.
        """
        rows = torch.cat([self.D, self.U], dim=1)
        if self.per_input or self.constraints is not None or rows.shape[2] <= rows.shape[1]:
            return self
        basis = torch.linalg.qr(rows.mT)[0]
        return LayerProgram(W=self.W, U=self.U @ basis, C=self.C, D=self.D @ basis)

    def select(self, index: Tensor) -> LayerProgram:
        """Return the programs at some indices of the batch."""
        tensors = {k: t for k, t in vars(self).items() if isinstance(t, Tensor)}
        parts: dict[str, Any] = {name: tensor[index] for name, tensor in tensors.items()}
        return replace(self, **parts)

    def combine_outputs(self, w: Float[Tensor, "batch f"]) -> Float[Tensor, "batch q N"]:
        """Return (D, C) less wᵀF."""
        outputs = torch.cat([self.D, self.C], dim=2)
        return outputs if self.constraints is None else outputs - w[:, None] @ self.constraints

    def assemble_matrix(self, optimum: LayerOptimum) -> Float[Tensor, "batch N N"]:
        """Return M(τ, λ) for the output less the weighted constraints."""
        outputs = self.combine_outputs(optimum.constraints)
        p, n = self.U.shape[2], self.W.shape[-1]
        identity = torch.eye(n, dtype=self.W.dtype, device=self.W.device)
        weighted = optimum.multiplier[:, :, None] * torch.cat([-self.U, identity - self.W], dim=2)
        M = -outputs.mT @ outputs
        M[:, p:] += weighted
        M[:, :, p:] += weighted.mT
        M.diagonal(dim1=1, dim2=2)[:, :p] += optimum.tau
        return M

    def find_worst_direction(self, optimum: LayerOptimum) -> Float[Tensor, "batch N"]:
        """Return the increment (x, z), up to a factor, at which the output (q = 1) falls most."""
        factor = torch.linalg.cholesky_ex(self.assemble_matrix(optimum))[0]
        return -torch.cholesky_solve(self.combine_outputs(optimum.constraints).mT, factor)[:, :, 0]

    def to_standard_form(self) -> primal_dual.Program:
        """Return the same programs with the variables (τ, λ, w) and slopes in [0, 1].

        Constraints enter M by a square of w. So M then has one row more, by Schur's complement:
        [M + (O − wᵀF)ᵀ(O − wᵀF), (O − wᵀF)ᵀ; O − wᵀF, 1] ⪰ 0, which is linear in w.
        """
        outputs = torch.cat([self.D, self.C], dim=2)
        batch, _, N = outputs.shape
        n, p = self.W.shape[-1], self.U.shape[2]
        columns = None
        if self.constraints is None:
            constant = -outputs.mT @ outputs
        else:
            constant = outputs.new_zeros(batch, N + 1, N + 1)
            constant[:, N, N] = 1.0
            constant[:, :N, N], constant[:, N, :N] = outputs[:, 0], outputs[:, 0]
            f = self.constraints.shape[1]
            border = outputs.new_zeros(batch, N + 1, f)
            border[:, N] = 1.0
            rows = torch.cat([-self.constraints, outputs.new_zeros(batch, f, 1)], dim=2)
            columns = (border, rows.mT)
        low = outputs.new_zeros(batch, n)
        return primal_dual.Program(
            groups=(constant.shape[1],), inputs=p, constant=constant, low=low, high=low + 1,
            rows=(primal_dual.Rows(coordinates=slice(0, N), units=slice(0, n),
                                   values=torch.cat([self.U, self.W], dim=2).mT),),
            states=torch.arange(p, N, device=outputs.device), per_input=self.per_input,
            columns=columns, prices=self.prices,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerOptimum:
    """Strictly feasible points of a batch of programs.

    Attributes:
        tau: τ, one number or one per input.
        multiplier: Λ′ = γΛ.
        constraints: w, the weights of the constraints.
        gap: how far the objective is from the minimum, relative to it; not proved.
        steps: Newton steps of the batch.
        converged: where the gap that was asked for, or the target, was reached.
    """

    tau: Float[Tensor, "batch k"]
    multiplier: Float[Tensor, "batch n"]
    constraints: Float[Tensor, "batch f"]
    gap: Float[Tensor, " batch"]
    steps: int
    converged: Bool[Tensor, " batch"]


def minimise_bound(
    program: LayerProgram,
    multiplier: Float[Tensor, "batch n"],
    *,
    gap: float = 1e-5,
    target: Float[Tensor, " batch"] | None = None,
    max_steps: int = 60,
) -> LayerOptimum:
    """Minimise Στ over (τ, Λ′) with M(τ, λ) ⪰ 0, for each of a batch of programs.

    Args:
        program: the matrices.
        multiplier: λ up to a common factor, one row per program, for which 2Λ − ΛW − WᵀΛ is
            positive definite: the start.
        gap: relative accuracy of the objective, Στ unless constraints have a price.
        target: a value of the objective; a program also ends once its objective is at most the
            target, or once its minimum is found to be above.
        max_steps: bound of the number of Newton steps.

    Returns:
        The best point of each program, its gap, and whether it converged.

    Raises:
        ValueError: if 2Λ − ΛW − WᵀΛ is not positive definite.

    Reference:
        Fazlyab et al. (2019), Theorem 2, for τ = γ²; lben/tightening/primal_dual.py for the method.

    Example:
        y = σ(2x) has the Lipschitz constant 2, so τ = γ² = 4.

        >>> import torch
        >>> from lben.tightening.layer_program import LayerProgram, minimise_bound
        >>> one = torch.ones(1, 1, 1, dtype=torch.float64)
        >>> optimum = minimise_bound(LayerProgram(W=0 * one, U=2 * one, C=one, D=0 * one), one[0])
        >>> round(optimum.tau.item(), 3), optimum.converged.item()
        (4.0, True)
    """
    program = program.reduce_inputs()
    start = find_feasible_point(program, multiplier)
    standard = program.to_standard_form()
    tau, lam, w = standard.split(start)
    # See Note [Units that nothing moves]; a constraint without entries is one as well.
    prices = torch.zeros_like(w) if program.prices is None else program.prices
    size = tau.sum(1) + (prices * w).sum(1)
    tiny = (_MULTIPLIER_SHARE * gap / max(program.W.shape[-1], 1) * size)[:, None] / torch.cat(
        [lam, w], 1
    )
    standard = replace(standard, prices=tiny + torch.cat([torch.zeros_like(lam), prices], dim=1))
    found = primal_dual.minimise(standard, start, gap=gap, target=target, max_steps=max_steps)
    tau, lam, w = standard.split(found.y)
    return LayerOptimum(
        tau=tau, multiplier=lam, constraints=w, gap=found.gap, steps=found.steps,
        converged=found.converged,
    )  # fmt: skip


def find_feasible_point(program: LayerProgram, multiplier: Tensor) -> Tensor:
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
    # Where D outweighs C by far, λ does not underflow: it adds `_DRIVE_SHARE` of ‖D‖² to τ.
    drive = torch.linalg.solve_triangular(root, multiplier[:, :, None] * program.U, upper=False)
    floor = _DRIVE_SHARE * torch.linalg.matrix_norm(D, 2).square()
    floor = floor / torch.linalg.matrix_norm(drive, 2).square()
    scale = torch.maximum(scale, torch.where(floor.isfinite(), floor, 0.0))
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

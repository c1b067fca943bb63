"""How is a piecewise linear equilibrium found exactly, once its active units are known?

By one linear solve on the active units; a splitting finds out which those are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from solvers.activations import PIECEWISE_LINEAR, LinearSlope
from solvers.backends.step import Outcome, Request
from solvers.inclusion import Inclusion
from solvers.methods.base import Method, check_method
from solvers.methods.splitting import PeacemanRachford
from solvers.operators import batched
from solvers.solution import Status


@dataclass(frozen=True, kw_only=True, repr=False)
class SemismoothNewton(Method):
    """Find z by a splitting that semismooth Newton steps complete, for piecewise linear σ.

    With D = diag σ'(Wz + v), one Newton step solves (I − DW) z⁺ = Dv by a batched LU on the units
    with D ≠ 0. If D is that of the solution, z⁺ is the solution. In an adjoint problem D is given,
    so one step is enough.

    Far from the solution Newton's steps may cycle, so the splitting begins. If `_NEWTON_STEPS`
    Newton steps do not finish a sample, the splitting continues from its best point with twice as
    many steps. So the method converges wherever the splitting does.

    On a CPU one Newton step costs as much as 65 to 130 steps of Peaceman–Rachford in PyTorch, and
    as 350 to 600 in the compiled loop (n from 80 to 1000, half of the units active). It pays if a
    splitting would need more steps than that.
    Reference: Qi and Sun (1993); for complementarity problems the active-set method of
    Hintermüller, Ito and Kunisch (2002).

    Args:
        method: the splitting that begins.
        patience: its steps before the first Newton step; with 0 Newton begins.

    Raises:
        TypeError: if method is no `Method`.
        ValueError: if patience is negative; on solving, if σ is not piecewise linear.

    Example:
        >>> from solvers import DenseOperator, Inclusion, ReLU, solve
        >>> W, v = torch.tensor([[0.0, -0.5], [0.5, 0.0]]), torch.ones(1, 2)
        >>> problem = Inclusion(DenseOperator(W), v, ReLU())
        >>> solve(problem, SemismoothNewton(patience=0), tol=1e-6).value
        tensor([[0.4000, 1.2000]])
    """

    method: Method = PeacemanRachford()
    patience: int = 200

    def __post_init__(self) -> None:
        check_method(self.method)
        if self.patience < 0:
            raise ValueError(f"patience must be at least 0, got {self.patience}")

    def run(self, problem: Inclusion, request: Request) -> Outcome:
        """Alternate between the splitting and Newton's steps until every sample is done."""
        if not isinstance(problem.activation, PIECEWISE_LINEAR):
            raise ValueError(
                "SemismoothNewton needs an activation whose slope changes at 0 alone (ReLU, "
                f"LeakyReLU, LinearSlope), got {problem.activation!r}: use PeacemanRachford()"
            )
        patience = self.patience
        outcome = self._begin(problem, request, patience)
        if outcome.status(request) is Status.CONVERGED:
            return outcome
        waiting = outcome.find_unfinished(request)
        while bool(waiting.any()):
            index = waiting.nonzero().squeeze(-1)
            part, found = problem.select(index), outcome.select(index)
            found = _take_newton_steps(part, found, request)
            # More steps in this precision do not help a sample that rounding limits.
            limited = part.is_rounding_limited(found.value, request.tol)
            left = (found.find_unfinished(request) & ~limited).nonzero().squeeze(-1)
            waiting = torch.zeros_like(waiting)
            if left.numel():
                patience = max(2 * patience, 16)
                steps = min(patience, request.max_steps - int(found.steps[left].max()))
                again = Request(tol=request.tol, max_steps=steps, z0=found.value[left])
                more = self.method.run(part.select(left), again)
                # A sample that ended before its steps were used up has stalled.
                waiting[index[left]] = (more.residual > request.tol) & (more.steps >= steps)
                found = found.continue_samples(left, more)
            outcome = outcome.replace_samples(index, found)
            waiting &= outcome.find_unfinished(request)
        return outcome

    def _begin(self, problem: Inclusion, request: Request, patience: int) -> Outcome:
        if patience > 0:
            first = min(patience, request.max_steps)
            return self.method.run(
                problem, Request(tol=request.tol, max_steps=first, z0=request.z0)
            )
        z = torch.zeros_like(problem.bias) if request.z0 is None else request.z0
        residual = problem.relative_residual(z)
        steps = torch.zeros(z.shape[0], dtype=torch.long, device=z.device)
        return Outcome(value=z, residual=residual, steps=steps, checks=1)

    def likely_causes(self, problem: Inclusion) -> str:
        """Return why the splitting may have failed."""
        return self.method.likely_causes(problem)


# Note [Newton steps in a row]
# After `patience` steps of the splitting, 1 or 2 Newton steps finish nearly all samples. A sample
# that needs more than 4 gains more from further steps of the splitting.
_NEWTON_STEPS = 4
_CHUNK = 1 << 24  # numbers in the matrices that are factored at once: 64 MiB in float32


def _take_newton_steps(problem: Inclusion, start: Outcome, request: Request) -> Outcome:
    """Take Newton steps from `start` on unfinished samples; return the best z of each sample."""
    outcome = start
    z = start.value
    for _ in range(_NEWTON_STEPS):
        index = outcome.find_unfinished(request).nonzero().squeeze(-1)
        if index.numel() == 0:
            break
        part = problem.select(index)
        z = _newton_step(part, z[index])
        residual = part.relative_residual(z)
        residual = torch.where(residual.isfinite(), residual, torch.inf)
        best = outcome.select(index)
        worse = ~(residual < best.residual)
        taken = Outcome(
            value=torch.where(worse[:, None], best.value, z),
            residual=torch.where(worse, best.residual, residual),
            steps=best.steps + 1,
            checks=1,
        )
        whole = outcome.value.clone()
        whole[index] = z
        outcome, z = outcome.replace_samples(index, taken), whole
        if isinstance(problem.activation, LinearSlope):
            break  # the equation is linear: a second step would repeat the first
    return outcome


def _newton_step(problem: Inclusion, z: Tensor) -> Tensor:
    """Return the solution z⁺ of (I − DW) z⁺ = Dv with D = diag σ'(Wz + v)."""
    activation = problem.activation
    # A LinearSlope has its slopes. σ' of all others follows from the image, which is positive
    # exactly where the pre-activation is.
    given = isinstance(activation, LinearSlope)
    D = activation.slope(z if given else problem.image(z))
    result = torch.zeros_like(z)
    active = (D != 0).sum(-1)
    order = active.argsort()
    for rows in _split_samples(order, active[order]):
        k = int(active[rows].max())
        if k == 0:
            continue
        # Units with D ≠ 0 come first. The others among the k have D = 0, so their equation is z =
        # 0.
        units = (D[rows] != 0).to(torch.uint8).argsort(dim=-1, descending=True)[:, :k]
        slope, v = D[rows].gather(-1, units), problem.bias[rows].gather(-1, units)
        matrix = problem.operator.submatrix(units, units).mul_(slope[..., None]).neg_()
        matrix.diagonal(dim1=-2, dim2=-1).add_(1)
        result[rows] = result[rows].scatter(-1, units, _solve(matrix, slope * v))
    return result


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    """Return the solution of one linear system per sample; NaN if its matrix is singular."""
    solved, info = batched.solution(matrix, right)
    return torch.where((info == 0)[:, None], solved, torch.nan)


def _split_samples(order: Tensor, active: Tensor) -> Iterator[Tensor]:
    """Yield parts of the samples whose matrices have at most `_CHUNK` numbers together.

    The samples come sorted by their number of active units.
    """
    counts = active.tolist()
    first = 0
    while first < len(counts):
        last = first + 1
        while last < len(counts) and (last + 1 - first) * counts[last] ** 2 <= _CHUNK:
            last += 1
        yield order[first:last]
        first = last

"""How are layers solved one after the other, when later ones do not feed earlier ones?"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from solvers.backends.step import Outcome, Request
from solvers.inclusion import Inclusion
from solvers.methods.base import Method, check_method
from solvers.methods.splitting import PeacemanRachford
from solvers.operators import BlockTriangularOperator, ZeroOperator

# Note [Tolerance of a block]
# Once the blocks before it are fixed, the residual of the whole problem at a block is that block's
# own. Solved to tol, the blocks make the whole a solution to about tol, if the operator's metric
# is that of the blocks. Half of it leaves room for the "about". The metric may be another, and a
# block's norm is not that of the whole: so the residual of the whole is evaluated after a sweep,
# and what misses is swept again, warm, at the tolerance that proportion suggests, until a sweep
# does not halve the worst residual.
_ROOM = 0.5
_GAIN = 0.5


@dataclass(frozen=True, kw_only=True, repr=False)
class BlockSubstitution(Method):
    """Solves a block-triangular problem block after block, each by another method.

    Block i is z_i = σ(W_ii z_i + v_i + Σⱼ W_ij zⱼ) with the zⱼ already found, in reverse order for
    a transpose; a `ZeroOperator` block is evaluated. `max_steps` limits the sum of the steps of
    all blocks, and that sum is what is reported. Forward substitution by blocks (Golub and Van
    Loan 2013, section 3.1), with an equilibrium in the place of each pivot.

    Args:
        method: how a block is solved.
    """

    method: Method = PeacemanRachford()

    def __post_init__(self) -> None:
        check_method(self.method)

    def run(self, problem: Inclusion, request: Request) -> Outcome:
        """Substitute until the residual of the whole problem is within tolerance, or cannot be.

        Raises:
            ValueError: if the operator is not block triangular.
        """
        _operator(problem)
        tol = _ROOM * request.tol
        outcome = self._sweep(problem, replace(request, tol=tol))
        while True:
            index = (outcome.residual > request.tol).nonzero().squeeze(-1)
            if len(index) == 0:
                return outcome
            before = outcome.residual[index]
            worst, left = float(before.max()), request.max_steps - int(outcome.steps[index].max())
            if left < 1 or not torch.isfinite(before).all():
                return outcome
            tol = max(tol * _ROOM * request.tol / worst, torch.finfo(problem.bias.dtype).eps)
            again = self._sweep(
                problem.select(index), Request(tol=tol, max_steps=left, z0=outcome.value[index])
            )
            better = again.residual < before
            kept = replace(
                again,
                value=torch.where(better[:, None], again.value, outcome.value[index]),
                residual=torch.where(better, again.residual, before),
            )
            outcome = outcome.continue_samples(index, kept)
            if not float(kept.residual.max()) <= max(_GAIN * worst, request.tol):
                return outcome  # at rest

    def _sweep(self, problem: Inclusion, request: Request) -> Outcome:
        """Solve every block once to the tolerance of the request, and measure the whole."""
        operator, v = _operator(problem), problem.bias
        layout = operator.layout
        steps = torch.zeros(v.shape[0], dtype=torch.long, device=v.device)
        inner: list[Outcome] = []

        def solve(i: int, v_i: Tensor, inflow: Tensor | None) -> Tensor:
            bias = v_i if inflow is None else v_i + inflow
            activation = problem.activation.part(layout.units[i])
            if isinstance(operator.blocks[i], ZeroOperator):
                return activation(bias)
            used = int(steps.max()) if len(steps) else 0
            found = self.method.run(
                Inclusion(operator.blocks[i], bias.contiguous(), activation),
                Request(
                    tol=request.tol,
                    max_steps=max(1, request.max_steps - used),
                    z0=None if request.z0 is None else request.z0[:, layout.units[i]],
                ),
            )
            steps.add_(found.steps)
            inner.append(found)
            return found.value

        z = layout.substitute(v, solve)
        compiled = bool(inner) and all(found.loop == "compiled" for found in inner)
        return Outcome(
            value=z,
            residual=problem.relative_residual(z),
            steps=steps.clamp_max(request.max_steps),
            checks=1 + sum(found.checks for found in inner),
            loop="compiled" if compiled else "torch",
        )

    def likely_causes(self, problem: Inclusion) -> str:
        """Say why the method may have failed on the block with the smallest m."""
        operator = _operator(problem)
        solved = [i for i, b in enumerate(operator.blocks) if not isinstance(b, ZeroOperator)]
        if not solved:
            return f"Cause: the tolerance is below the rounding of {problem.bias.dtype}."
        worst = min(solved, key=lambda i: operator.blocks[i].constants().m)
        units = operator.layout.units[worst]
        block = Inclusion(
            operator.blocks[worst], problem.bias[..., units], problem.activation.part(units)
        )
        return f"In block {worst}, the hardest: {self.method.likely_causes(block)}"


def _operator(problem: Inclusion) -> BlockTriangularOperator:
    operator = problem.operator
    if not isinstance(operator, BlockTriangularOperator):
        raise ValueError(
            f"BlockSubstitution solves problems with a BlockTriangularOperator, got a "
            f"{type(operator).__name__}: use PeacemanRachford()"
        )
    return operator

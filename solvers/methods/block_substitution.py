"""How is a block triangular problem solved?

Block after block, as in forward substitution: each is an equilibrium of its own once the blocks
before it are known.
"""

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
# Once the blocks before it are fixed, the residual of the whole problem at a block is that of the
# block alone. If every block is solved to tol, the whole is solved to about tol, provided that the
# operator's metric is that of the blocks; blocks are solved to half of tol to allow for "about".
# But the metric may be another, and the norm of a block is not that of the whole. So the residual
# of the whole is evaluated after each pass over the blocks. Samples that miss the tolerance are
# passed again, warm-started, at a tolerance that is smaller in proportion to their residual, until
# a pass does not halve the worst residual.
_ROOM = 0.5
_GAIN = 0.5


@dataclass(frozen=True, kw_only=True, repr=False)
class BlockSubstitution(Method):
    """Find z of a block triangular problem block after block, each by a given method.

    Block i is z_i = σ(W_ii z_i + v_i + Σⱼ W_ij zⱼ), where the sum runs over the blocks zⱼ that are
    already found. For a transpose the order is reversed. A block whose W_ii is a `ZeroOperator` is
    evaluated without iteration. `max_steps` limits the sum of the steps of all blocks, which is
    also the number that is reported.
    Reference: forward substitution by blocks, Golub and Van Loan (2013), section 3.1, with an
    equilibrium in place of each pivot.

    Args:
        method: how a block is solved.

    Raises:
        TypeError: if method is no `Method`.
        ValueError: on solving, if the operator is not block triangular.

    Example:
        >>> from solvers import DenseOperator, ReLU, solve
        >>> layers = [ZeroOperator(torch.ones(1)), DenseOperator(torch.tensor([[-1.0]]))]
        >>> W = BlockTriangularOperator(layers, {(1, 0): torch.tensor([[2.0]])})
        >>> problem = Inclusion(W, torch.tensor([[1.0, 0.0]]), ReLU())
        >>> solve(problem, BlockSubstitution(), tol=1e-6).value
        tensor([[1., 1.]])
    """

    method: Method = PeacemanRachford()

    def __post_init__(self) -> None:
        check_method(self.method)

    def run(self, problem: Inclusion, request: Request) -> Outcome:
        """Pass over the blocks until the whole problem is within tolerance, or cannot be.

        Args:
            problem: with a `BlockTriangularOperator`, of shape batch × n, cut from the graph.
            request: tolerance in the Λ norm, limit of the sum of steps, and start.

        Raises:
            ValueError: if the operator is not block triangular.
        """
        _require_block_triangular(problem)
        tol = _ROOM * request.tol
        outcome = self._substitute_blocks(problem, replace(request, tol=tol))
        while True:
            index = (outcome.residual > request.tol).nonzero().squeeze(-1)
            if len(index) == 0:
                return outcome
            before = outcome.residual[index]
            worst, left = float(before.max()), request.max_steps - int(outcome.steps[index].max())
            if left < 1 or not torch.isfinite(before).all():
                return outcome
            tol = max(tol * _ROOM * request.tol / worst, torch.finfo(problem.bias.dtype).eps)
            again = self._substitute_blocks(
                problem.select(index), Request(tol=tol, max_steps=left, z0=outcome.value[index])
            )
            better = again.residual < before
            improved = replace(
                again,
                value=torch.where(better[:, None], again.value, outcome.value[index]),
                residual=torch.where(better, again.residual, before),
            )
            outcome = outcome.continue_samples(index, improved)
            if not float(improved.residual.max()) <= max(_GAIN * worst, request.tol):
                return outcome  # at rest

    def _substitute_blocks(self, problem: Inclusion, request: Request) -> Outcome:
        """Solve every block once to the tolerance, and evaluate the residual of the whole."""
        operator, v = _require_block_triangular(problem), problem.bias
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
        """Return why the method may have failed on the block with the smallest m."""
        operator = _require_block_triangular(problem)
        solved = [i for i, b in enumerate(operator.blocks) if not isinstance(b, ZeroOperator)]
        if not solved:
            return f"Cause: the tolerance is below the rounding of {problem.bias.dtype}."
        worst = min(solved, key=lambda i: operator.blocks[i].constants().m)
        units = operator.layout.units[worst]
        block = Inclusion(
            operator.blocks[worst], problem.bias[..., units], problem.activation.part(units)
        )
        return f"In block {worst}, the hardest: {self.method.likely_causes(block)}"


def _require_block_triangular(problem: Inclusion) -> BlockTriangularOperator:
    operator = problem.operator
    if not isinstance(operator, BlockTriangularOperator):
        raise ValueError(
            f"BlockSubstitution solves problems with a BlockTriangularOperator, got a "
            f"{type(operator).__name__}: use PeacemanRachford()"
        )
    return operator

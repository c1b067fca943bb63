"""How is a splitting accelerated without losing its guarantee?

By Anderson acceleration, whose step is taken only where a safeguard accepts it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from solvers.inclusion import Inclusion
from solvers.methods.base import check_method
from solvers.methods.iteration import Splitting, State
from solvers.methods.splitting import PeacemanRachford


@dataclass
class AndersonState(State):
    """Hold the iterate and the history of an accelerated splitting.

    Attributes:
        base: state of the splitting; its x is overwritten at every step.
        changes: ring buffer of the last differences of T(x), samples × memory × n.
        residual_changes: ring buffer of the last differences of f = T(x) − x, of the same shape.
        last: T(x) and f of the step before; None at the first step.
        count: steps done.
        first: ‖f‖ at the first step, per sample.
        best: smallest ‖f‖ so far, per sample.
        accepted: accelerated steps accepted so far, per sample.
    """

    base: State
    changes: Tensor
    residual_changes: Tensor
    last: tuple[Tensor, Tensor] | None = None
    count: int = 0
    first: Tensor = field(default_factory=lambda: torch.empty(0))
    best: Tensor = field(default_factory=lambda: torch.empty(0))
    accepted: Tensor = field(default_factory=lambda: torch.empty(0))


@dataclass(frozen=True, kw_only=True, repr=False)
class Anderson(Splitting):
    """Find z by Anderson acceleration, type II, of a splitting's fixed-point map T.

    For every sample the accelerated step is x ← T(x) − Σⱼ γⱼ ΔTⱼ. Here f = T(x) − x, ΔTⱼ and Δfⱼ
    are the last `memory` differences of T(x) and of f, and γ minimises ‖f − Σⱼ γⱼ Δfⱼ‖₂.

    The accelerated step is accepted if ‖f‖ is the smallest so far and at most
    D ‖f₀‖ (a + 1)^(−1−1e−6) after a accepted steps; else the step is T(x). The second condition
    preserves the convergence of an averaged T. Without the first one a sample can cycle for ever
    between a kink of σ and an accelerated step that jumps over it.

    Lengths are Euclidean here, because least squares are cheapest in that norm. The norm influences
    which step is tried, not which z is accepted as a solution. A step costs
    2·memory + O(memory²) vector operations per sample more than one of the splitting.
    Reference: Walker and Ni (2011); safeguard of Zhang, O'Donoghue and Boyd (2020), in the type-II
    form of Fu, Zhang and Boyd (2020).

    Args:
        method: the splitting to accelerate.
        memory: how many differences are used, at least 1.
        safeguard: D ≥ 0; 0 never accepts an accelerated step.

    Raises:
        TypeError: if the method is no splitting.
        ValueError: if memory is below 1, the safeguard is negative, or the method is itself
            accelerated.

    Example:
        >>> from solvers import DenseOperator, Inclusion, ReLU, solve
        >>> W, v = torch.tensor([[0.0, -0.5], [0.5, 0.0]]), torch.ones(1, 2)
        >>> solve(Inclusion(DenseOperator(W), v, ReLU()), Anderson(memory=2), tol=1e-6).value
        tensor([[0.4000, 1.2000]])
    """

    method: Splitting = PeacemanRachford()
    memory: int = 5
    safeguard: float = 1e6

    def __post_init__(self) -> None:
        check_method(self.method)
        if not isinstance(self.method, Splitting):
            raise TypeError(
                f"method must be a splitting such as PeacemanRachford(), got {self.method!r}: it "
                "has no steps to accelerate"
            )
        if self.memory < 1:
            raise ValueError(f"memory must be at least 1, got {self.memory}")
        if not self.safeguard >= 0:
            raise ValueError(f"safeguard must be at least 0, got {self.safeguard}")
        if isinstance(self.method, Anderson):
            raise ValueError("the method to accelerate must not be accelerated itself")

    def init(self, problem: Inclusion, z0: Tensor | None) -> AndersonState:
        """Prepare the accelerated method, with an empty history."""
        base = self.method.init(problem, z0)
        samples, n = base.x.shape
        history = base.x.new_zeros(samples, self.memory, n)
        return AndersonState(
            x=base.x.clone(),
            map=base.map,
            shift=base.shift,
            apply=base.apply,
            spare=base.spare,
            base=base,
            changes=history,
            residual_changes=history.clone(),
            accepted=base.x.new_zeros(samples),
        )

    def step(self, problem: Inclusion, state: State) -> State:
        """Advance by one accelerated or plain step, sample by sample."""
        assert isinstance(state, AndersonState)
        state.base.x.copy_(state.x)
        state.base = self.method.step(problem, state.base)
        image = state.base.x.clone()
        f = image - state.x
        size = torch.linalg.vector_norm(f, dim=-1)
        if state.last is None:
            state.best = size.clone()
            state.first, state.x = size, image.clone()
        else:
            slot = (state.count - 1) % self.memory
            torch.sub(image, state.last[0], out=state.changes[:, slot])
            torch.sub(f, state.last[1], out=state.residual_changes[:, slot])
            candidate = image - self._correction(state, f)
            limit = self.safeguard * state.first * (state.accepted + 1) ** (-1 - 1e-6)
            take = (size <= limit) & torch.isfinite(candidate).all(-1)
            take &= size <= state.best
            take &= size > 0  # at a fixed point there is nothing to gain
            state.accepted += take
            state.x = torch.where(take[:, None], candidate, image)
        state.best = torch.minimum(state.best, size)
        state.last = (image, f)
        state.count += 1
        return state

    def _correction(self, state: AndersonState, f: Tensor) -> Tensor:
        used = min(state.count, self.memory)
        changes, residuals = state.changes[:, :used], state.residual_changes[:, :used]
        gram = residuals @ residuals.mT
        # Note [Regularised least squares]
        # Tikhonov regularisation by a multiple of roundoff makes the small system solvable even if
        # differences are parallel or zero. It influences which step is tried, not which z is
        # accepted as a solution.
        weight = 64 * math.sqrt(used) * torch.finfo(f.dtype).eps
        trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
        shift = (weight * trace).clamp_min(torch.finfo(f.dtype).tiny)
        gram = gram + shift[:, None, None] * torch.eye(used, dtype=f.dtype, device=f.device)
        gamma, _ = torch.linalg.solve_ex(gram, residuals @ f[..., None])
        return (changes.mT @ gamma).squeeze(-1)

    def value(self, problem: Inclusion, state: State) -> Tensor:
        """Return the accelerated method's estimate at x."""
        return self.method.value(problem, state)

    def likely_causes(self, problem: Inclusion) -> str:
        """Say why the accelerated method may have failed."""
        return self.method.likely_causes(problem)

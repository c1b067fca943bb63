"""How do products in low precision reach the tolerance of full precision?

Every few steps one product in full precision corrects the steps before it (Note [Base and blocks]).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from solvers.inclusion import Inclusion
from solvers.methods.iteration import Splitting, State
from solvers.methods.splitting import PeacemanRachford
from solvers.methods.step_size import JacobiDeterminant, StepSizeRule, choose_step_size
from solvers.operators import DenseOperator
from solvers.operators.matrix import DenseMap

_LOWER = (torch.bfloat16, torch.float16, torch.float32)


# Note [Base and blocks]
# Let ū ← T(ū) = K r(ū) + s be Peaceman–Rachford's step. A block begins at a base ū₀ with one
# product in full precision, p₀ = T(ū₀), which is its first step. Its other steps are
# ū ← p₀ + K̃ (r(ū) − r(ū₀)), where K̃ is K rounded and the increment r(ū) − r(ū₀) is rounded too. So
# errors are relative to the length of the increment, which goes to zero as the iteration converges.
#
# Lengths are measured in the norm of ΛP⁻¹, P = diag α, in which neither K nor r moves two points
# apart. In units where that norm is the Euclidean one and ‖p₀ − ū₀‖ = 1, the entries of K are at
# most 1, and the increments in a block of k steps are at most k long: float16 holds them.
#
# The first product of the next block judges the block before. Exact steps never enlarge the
# displacement ‖T(ū) − ū‖.
# - If the displacement grew, the block is undone: the base stays, and the iteration continues from
#   p₀.
# - An error e adds at most 2‖e‖ to the displacement. The drift ‖T(ū) − p₀ − K̃ (r(ū) − r(ū₀))‖ is
#   the error at the end of the block, where the increment is about at its longest. The next block
#   is twice as long if two conditions hold: errors of this size at every step cost at most half of
#   what the block gained, and one of them costs at most half of the displacement that is left. Else
#   it is half as long. From length 1 on, all steps are in full precision.
# - A displacement within 16 roundoffs of ū decides nothing.
_FIRST = 4
_LONGEST = 64


@dataclass(frozen=True, eq=False)
class Base:
    """Hold the point where a block begins.

    Attributes:
        image: p₀ = T(ū₀), samples × n.
        reflected: r(ū₀), samples × n.
        size: ‖p₀ − ū₀‖ per sample, in the norm of ΛP⁻¹.
        unit: the number that 1 in low precision stands for, samples × n.
    """

    image: Tensor
    reflected: Tensor
    size: Tensor
    unit: Tensor

    def approximate_step(self, reflected: Tensor, low: Tensor) -> Tensor:
        """Return p₀ + K̃ (r − r(ū₀)) for r = `reflected` and K̃ = `low`."""
        change = (reflected - self.reflected).div_(self.unit).to(low.dtype)
        with use_tensor_cores(change):
            product = change @ low
        return torch.addcmul(self.image, product, self.unit)

    def merge(self, where: Tensor, other: Base) -> Base:
        """Return this base for the samples where the mask is set, the other one for the rest."""
        column = where[:, None]
        return Base(
            image=torch.where(column, self.image, other.image),
            reflected=torch.where(column, self.reflected, other.reflected),
            size=torch.where(where, self.size, other.size),
            unit=torch.where(column, self.unit, other.unit),
        )


@dataclass
class MixedState(State):
    """Hold the iterate, the base of its block, and the lengths of blocks.

    Attributes:
        low: K̃ in the units of `Base`, stored as K is.
        root: the square root of Λ/α, per unit.
        length: steps per block, including the one in full precision.
        steps_left: steps left in this block.
        base: where this block began; None before the first block.
    """

    low: Tensor
    root: Tensor
    length: int = _FIRST
    steps_left: int = 0
    base: Base | None = None

    def norm(self, x: Tensor) -> Tensor:
        """Return ‖x‖ per sample in the norm of ΛP⁻¹."""
        weighted = x * self.root
        # In units of the largest entry squares neither overflow nor vanish.
        largest = weighted.abs().amax(-1, keepdim=True).clamp_min_(torch.finfo(x.dtype).tiny)
        return torch.linalg.vector_norm(weighted / largest, dim=-1) * largest.squeeze(-1)


@dataclass(frozen=True, kw_only=True, repr=False)
class MixedPrecision(Splitting):
    """Find z by Peaceman–Rachford splitting with most products in low precision.

    Every few steps one product in the precision of the problem corrects the others. If low
    precision gains nothing, all products are in that precision (Note [Base and blocks]). So the
    method converges wherever `PeacemanRachford` does, and residuals in full precision decide when
    it is done. Steps of either kind count alike. It serves dense W in float32 or float64, in
    PyTorch's loop. The idea is that of iterative refinement.
    Reference: Higham and Mary (2022), Mixed precision algorithms in numerical linear algebra, Acta
    Numerica 31.

    Args:
        step_size: as for `PeacemanRachford`.
        inner: dtype of the factors in low precision. The device accumulates sums in its own way, in
            float32 if it can. On CUDA torch.float32 stands for TF32; on a CPU it serves float64
            problems only.

    Raises:
        ValueError: if the step size is not positive and finite, or inner is none of bfloat16,
            float16 and float32; on solving, if W is not dense, or inner is no lower precision
            than the problem's.

    Example:
        >>> from solvers import DenseOperator, Inclusion, ReLU, solve
        >>> W, v = torch.tensor([[0.0, -0.5], [0.5, 0.0]]), torch.ones(1, 2)
        >>> solve(Inclusion(DenseOperator(W), v, ReLU()), MixedPrecision(), tol=1e-6).value
        tensor([[0.4000, 1.2000]])
    """

    step_size: float | StepSizeRule = JacobiDeterminant()
    inner: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        if self.inner not in _LOWER:
            names = ", ".join(map(str, _LOWER))
            raise ValueError(f"inner must be one of {names}, got {self.inner!r}")
        _ = self._splitting  # refuses a bad step size

    @property
    def _splitting(self) -> PeacemanRachford:
        return PeacemanRachford(step_size=self.step_size, compiled=False)

    def init(self, problem: Inclusion, z0: Tensor | None) -> MixedState:
        operator, v = problem.operator, problem.bias
        if not isinstance(operator, DenseOperator):
            raise ValueError(
                f"MixedPrecision needs a DenseOperator, got a {type(operator).__name__}: "
                "take PeacemanRachford()"
            )
        if self.inner == v.dtype and v.device.type != "cuda":
            raise ValueError(
                f"inner = {self.inner} is no lower precision than the problem's on "
                f"{v.device.type}, where there is no TF32: take torch.bfloat16"
            )
        exact = self._splitting.init(problem, z0)
        map_ = exact.map
        assert isinstance(map_, DenseMap)
        key = ("mixed precision", self.step_size, operator.transposed)
        alpha = choose_step_size(self.step_size, operator)
        root = operator.memo(key, lambda: (operator.metric.detach() / alpha).sqrt())

        def round_matrix() -> Tensor:
            return (map_.matrix / root[:, None] * root).to(self.inner)

        return MixedState(
            x=exact.x, map=map_, shift=exact.shift, apply=exact.apply, spare=exact.spare,
            low=operator.memo((*key, self.inner), round_matrix), root=root,
        )  # fmt: skip

    def step(self, problem: Inclusion, state: State) -> State:
        assert isinstance(state, MixedState)
        if state.length == 1:
            return self._splitting.step(problem, state)
        if state.steps_left == 0 or state.base is None:
            state.base = self._begin_block(problem, state)
            state.x, state.steps_left = state.base.image.clone(), state.length
        else:
            state.x = state.base.approximate_step(state.apply(state.x), state.low)
        state.steps_left -= 1
        return state

    def value(self, problem: Inclusion, state: State) -> Tensor:
        return self._splitting.value(problem, state)

    def _begin_block(self, problem: Inclusion, state: MixedState) -> Base:
        """Return the base of the next block, after it has judged the block before."""
        x, last = state.x, state.base
        reflected = state.apply(x.clone())
        image = state.map.add(reflected, state.shift, None)
        size = state.norm(image - x)
        # The increments of a sample that does not move are zero, so any unit will do for it.
        unit = torch.where(size > 0, size, 1.0)[:, None] / state.root
        base = Base(image, reflected, size, unit)
        if last is None:
            return base
        drift = state.norm(image - last.approximate_step(reflected, state.low))
        at_rest = size <= problem.roundoff_share * state.norm(x)
        gain = last.size - size
        fine = at_rest | ((2 * state.length * drift <= gain) & (2 * drift <= size))
        state.length = min(2 * state.length, _LONGEST) if bool(fine.all()) else state.length // 2
        return base.merge(at_rest | (gain >= 0), last)  # neither holds for NaN


@contextmanager
def use_tensor_cores(factor: Tensor) -> Iterator[None]:
    """Let products of float32 factors on CUDA run in TF32 within the block.

    torch has one setting per process, so products of other threads may run in TF32 meanwhile.
    """
    if factor.dtype != torch.float32 or factor.device.type != "cuda":
        yield
        return
    setting = torch.backends.cuda.matmul
    before = setting.fp32_precision
    setting.fp32_precision = "tf32"
    try:
        yield
    finally:
        setting.fp32_precision = before

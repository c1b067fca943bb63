"""How do products in low precision reach the tolerance of full precision?"""

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
# Let ū ← T(ū) = K r(ū) + s be Peaceman–Rachford's step. A block begins at a base ū₀ with one full
# product, p₀ = T(ū₀), which is its first step. Its other steps are ū ← p₀ + K̃ (r(ū) − r(ū₀)), with
# K̃ and the increment rounded: errors are relative to how far the block has come, and go to zero
# with it.
#
# All is judged in the norm of ΛP⁻¹, P = diag α, in which neither K nor r moves two points apart. In
# units where that norm is the plain one and ‖p₀ − ū₀‖ = 1, the entries of K are at most 1 and the
# increments in a block of k steps at most k long: float16 holds them.
#
# The first product of the next block judges the last one. Exact steps never enlarge the
# displacement ‖T(ū) − ū‖.
# - Where it grew, the block is undone: the base stays, and the iteration goes on from p₀.
# - An error e adds at most 2‖e‖ to the displacement. ‖T(ū) − p₀ − K̃ (r(ū) − r(ū₀))‖, the drift, is
#   the error at the end of the block, where the increment is about its largest. The next block is
#   twice as long if errors of this size at every step cost at most half of what the block gained,
#   and one of them at most half of what is left; else half as long. At length 1 all steps are in
#   full precision, from then on.
# - A displacement within 16 roundoffs of ū says nothing.
_FIRST = 4
_LONGEST = 64


@dataclass(frozen=True, eq=False)
class Base:
    """Where a block begins.

    Attributes:
        image: p₀ = T(ū₀), samples × n.
        reflected: r(ū₀), samples × n.
        size: ‖p₀ − ū₀‖ per sample, in the norm of ΛP⁻¹.
        unit: what 1 in low precision stands for, samples × n.
    """

    image: Tensor
    reflected: Tensor
    size: Tensor
    unit: Tensor

    def near(self, reflected: Tensor, low: Tensor) -> Tensor:
        """Return p₀ + K̃ (r − r(ū₀))."""
        change = (reflected - self.reflected).div_(self.unit).to(low.dtype)
        with tensor_cores(change):
            product = change @ low
        return torch.addcmul(self.image, product, self.unit)

    def keep(self, where: Tensor, other: Base) -> Base:
        """Return this base for the samples of the mask, the other one for the rest."""
        column = where[:, None]
        return Base(
            image=torch.where(column, self.image, other.image),
            reflected=torch.where(column, self.reflected, other.reflected),
            size=torch.where(where, self.size, other.size),
            unit=torch.where(column, self.unit, other.unit),
        )


@dataclass
class MixedState(State):
    """Iterate, base, and how long blocks are.

    Attributes:
        low: K̃ in units of `Base`, as K is stored.
        root: the square root of Λ/α, per unit.
        length: steps per block, the one in full precision counted.
        left: steps left in this block.
        base: where this block began; None before the first.
    """

    low: Tensor
    root: Tensor
    length: int = _FIRST
    left: int = 0
    base: Base | None = None

    def norm(self, x: Tensor) -> Tensor:
        """Return ‖x‖ per sample in the norm of ΛP⁻¹."""
        weighted = x * self.root
        # In units of the largest entry squares neither overflow nor vanish.
        largest = weighted.abs().amax(-1, keepdim=True).clamp_min_(torch.finfo(x.dtype).tiny)
        return torch.linalg.vector_norm(weighted / largest, dim=-1) * largest.squeeze(-1)


@dataclass(frozen=True, kw_only=True, repr=False)
class MixedPrecision(Splitting):
    """Peaceman–Rachford splitting, most of its products in low precision.

    Every few steps one product in the precision of the problem corrects the others, and where low
    precision gains nothing, all are (Note [Base and blocks]). So it converges where
    `PeacemanRachford` does, and residuals in full precision decide when. Steps of either kind count
    alike. For dense W, float32 or float64, in PyTorch's loop.

    The idea is iterative refinement's: Higham and Mary, "Mixed precision algorithms in numerical
    linear algebra", Acta Numerica 31 (2022).

    Args:
        step_size: as for `PeacemanRachford`.
        inner: type of the factors in low precision; sums are accumulated as the device does it, in
            float32 where it is able. torch.float32 stands for TF32 on CUDA, and on a CPU serves
            float64 problems only.

    Raises:
        ValueError: if the step size is not positive and finite, or inner is none of bfloat16,
            float16 and float32; on solving, if W is not dense, or inner is no lower precision
            than the problem's.
    """

    step_size: float | StepSizeRule = JacobiDeterminant()
    inner: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        if self.inner not in _LOWER:
            names = ", ".join(map(str, _LOWER))
            raise ValueError(f"inner must be one of {names}, got {self.inner!r}")
        _ = self._exact  # refuses a bad step size

    @property
    def _exact(self) -> PeacemanRachford:
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
        exact = self._exact.init(problem, z0)
        map_ = exact.map
        assert isinstance(map_, DenseMap)
        key = ("mixed precision", self.step_size, operator.transposed)
        alpha = choose_step_size(self.step_size, operator)
        root = operator.memo(key, lambda: (operator.metric.detach() / alpha).sqrt())

        def rounded() -> Tensor:
            return (map_.matrix / root[:, None] * root).to(self.inner)

        return MixedState(
            x=exact.x, map=map_, shift=exact.shift, apply=exact.apply, spare=exact.spare,
            low=operator.memo((*key, self.inner), rounded), root=root,
        )  # fmt: skip

    def step(self, problem: Inclusion, state: State) -> State:
        assert isinstance(state, MixedState)
        if state.length == 1:
            return self._exact.step(problem, state)
        if state.left == 0 or state.base is None:
            state.base = self._rebased(problem, state)
            state.x, state.left = state.base.image.clone(), state.length
        else:
            state.x = state.base.near(state.apply(state.x), state.low)
        state.left -= 1
        return state

    def value(self, problem: Inclusion, state: State) -> Tensor:
        return self._exact.value(problem, state)

    def _rebased(self, problem: Inclusion, state: MixedState) -> Base:
        """Return the base of the next block, after judging the last one by it."""
        x, last = state.x, state.base
        reflected = state.apply(x.clone())
        image = state.map.add(reflected, state.shift, None)
        size = state.norm(image - x)
        # A sample that does not move has increments of zero: any unit will do.
        unit = torch.where(size > 0, size, 1.0)[:, None] / state.root
        base = Base(image, reflected, size, unit)
        if last is None:
            return base
        drift = state.norm(image - last.near(reflected, state.low))
        resting = size <= problem.noise_factor * state.norm(x)
        gain = last.size - size
        fine = resting | ((2 * state.length * drift <= gain) & (2 * drift <= size))
        state.length = min(2 * state.length, _LONGEST) if bool(fine.all()) else state.length // 2
        return base.keep(resting | (gain >= 0), last)  # neither holds for NaN


@contextmanager
def tensor_cores(factor: Tensor) -> Iterator[None]:
    """Let products of float32 factors on CUDA run in TF32 within the block.

    The setting is the process's: products of other threads at that moment may run in TF32 too.
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

"""How is a large problem solved on a CUDA device, one launch per step?

The rules are those of the kernel `resident`: Note [Increments] and Note [When the device looks] of
`triton_kernels`. The host evaluates them, so it waits for the device at bases and checks.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from solvers.backends.step import FIRST_CHECK, STALL, Outcome, Request, materialize
from solvers.backends.triton_launch import try_launch
from solvers.backends.triton_tiles import Loop, kernels
from solvers.inclusion import Inclusion

_GROUP = 8
"""Tiles of samples that run side by side because they read the same columns of M."""
_LONGEST = 64
_GAIN = 4.5
"""Logarithm of what a block may gain before the rounding of its increments matters."""
_LEAVE_SHARE = 0.5


class _LaunchFailure(Exception):
    """Tell that a kernel cannot run on this device."""


def run_stepwise(problem: Inclusion, loop: Loop, request: Request) -> Outcome | str:
    """Solve a problem of batch × n, or return why its kernels cannot run on this device."""
    try:
        return _solve(problem, Steps(loop), request)
    except _LaunchFailure as failure:
        return str(failure)


@dataclass(eq=False)
class Steps:
    """Launch the kernels of one solve, for the samples that are still in the batch."""

    loop: Loop

    @property
    def has_increments(self) -> bool:
        """Return whether steps may be increments: in float32, without relaxation."""
        return self.loop.prepared.low is not None and self.loop.iteration.relaxation == 1.0

    def new_change(self, x: Tensor) -> Tensor:
        """Return memory for the change of ρ, padded as matrices are."""
        low = self.loop.prepared.low
        assert low is not None
        return x.new_empty(x.shape[0], self.loop.cut.width, dtype=low.dtype)

    def affine(self, z: Tensor, v: Tensor) -> Tensor:
        """Return Wz + v."""
        return self._product(z, v, self.loop.prepared.weights, KIND="plain", RELAXED=False)

    def multiply(self, x: Tensor, shift: Tensor) -> Tensor:
        """Return s + xM."""
        return self._product(x, shift, self.loop.prepared.map, KIND="plain", RELAXED=False)

    def step(self, x: Tensor, shift: Tensor) -> Tensor:
        """Return T(x)."""
        return self._product(x, shift, self.loop.prepared.map)

    def base(self, x: Tensor, shift: Tensor, change: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return T(x) and ‖T(x) − x‖ / ‖prox(x)‖ per sample, with x weighted by Λ^½/(2α).

        The change of ρ is written into `change`.
        """
        sums = self._new_sums(x)
        image = self._product(x, shift, self.loop.prepared.map, change, sums)
        moved, size = sums[:, :2].sum(0)
        return image, torch.where(moved == 0, 0.0, 0.5 * (moved / size).sqrt())

    def residual(self, z: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return what `Inclusion.residual_and_roundoff` does: residual and roundoff per sample."""
        loop, sums = self.loop, self._new_sums(z)
        self._launch(
            kernels().look, materialize(z), materialize(v), loop.prepared.weights,
            loop.prepared.root, self._scale, sums, z if loop.slope is None else loop.slope,
            loop.numbers(1.0), *z.shape, loop.cut.width, KIND=loop.flags["KIND"],
            DEPTH=loop.cut.depth, PRECISION=loop.precision,
        )  # fmt: skip
        change, image, size, active = sums.sum(0).sqrt()
        size = torch.maximum(image, size)
        size = torch.where(size == 0, 1.0, size)
        return change / size, 16 * torch.finfo(z.dtype).eps * active / size

    def increment(self, x: Tensor, change: Tensor, spare: Tensor) -> None:
        """Take one step in bfloat16 in place, and write the next change of ρ into `spare`."""
        loop = self.loop
        flags = {name: loop.flags[name] for name in ("REFLECTED", "KIND")}
        self._launch(
            kernels().increment, x, change, spare, loop.prepared.low, loop.prepared.alpha,
            x if loop.slope is None else loop.slope, loop.numbers(1.0), *x.shape, loop.cut.width,
            DEPTH=math.gcd(2 * loop.cut.depth, loop.cut.width), **flags,
        )  # fmt: skip

    @functools.cached_property
    def _scale(self) -> Tensor:
        """Return per sample 1 / 2^k, 2^k the largest power of two up to max |v|; 1 for 0 and NaN.

        Scaled by it, no square overflows and none that matters vanishes; see `_unit` of the
        kernels.
        """
        largest, tiny = self.loop.v.abs().amax(1), torch.finfo(self.loop.v.dtype).tiny
        kind, mask = (
            (torch.int32, 0x7F800000) if largest.dtype == torch.float32
            else (torch.int64, 0x7FF0000000000000)
        )  # fmt: skip
        unit = (largest.view(kind) & mask).view(largest.dtype).clamp(4 * tiny, 0.25 / tiny)
        return 1 / torch.where(largest > 0, unit, 1.0)

    def _new_sums(self, x: Tensor) -> Tensor:
        return x.new_empty(len(self.loop.cut.blocks), 4, x.shape[0])

    def _product(
        self, x: Tensor, shift: Tensor, matrix: Tensor, change: Tensor | None = None,
        sums: Tensor | None = None, **flags: Any,
    ) -> Tensor:  # fmt: skip
        loop, own, out = self.loop, self.loop.prepared, torch.empty_like(x)
        self._launch(
            kernels().advance, materialize(x), materialize(shift), out,
            x if change is None else change, matrix, own.alpha, own.root, own.reach, x if sums is
            None else self._scale, x if sums is None else sums, x if loop.slope is None else
            loop.slope, loop.numbers(1.0), *x.shape, loop.cut.width, CHANGES=change is not None,
            LOOKS=sums is not None, DEPTH=loop.cut.depth, PRECISION=loop.precision,
            **{**loop.flags, **flags},
        )  # fmt: skip
        return out

    def _launch(self, kernel: Any, x: Tensor, *arguments: Any, **options: Any) -> None:
        cut, (samples, n) = self.loop.cut, x.shape
        programs = -(-samples // cut.rows) * -(-n // cut.blocks[0])
        reason = try_launch(
            kernel, (programs,), x, *arguments, ROWS=cut.rows, UNITS=cut.blocks[0], GROUP=_GROUP,
            num_warps=cut.warps, **options,
        )  # fmt: skip
        if reason is not None:
            raise _LaunchFailure(reason)


@dataclass
class _Plan:
    """Decide when the residual is checked, and how long blocks are.

    Attributes:
        limit: step limit of the solve.
        tol: tolerance of the solve.
        step: number of steps taken.
        due: whether the residual is checked before the next step.
        stalled: whether the displacement has come to rest.
        length: largest length of a block.
        ahead: length of this block.
        rate: logarithm of the factor of the displacement per step; 0 while unknown.
        ratio: residual divided by displacement.
        worst: largest displacement at the last base.
        looked: largest residual at the last check.
        mark, mark_step: displacement and step at which stalling was last excluded.
    """

    limit: int
    tol: float
    step: int
    due: bool = False
    stalled: bool = False
    length: int = FIRST_CHECK
    ahead: int = 0
    rate: float = 0.0
    ratio: float = 1.0
    worst: float = math.inf
    looked: float = 0.0
    mark: float = math.inf
    mark_step: int = 0

    def plan_block(self, worst: float) -> int:
        """Return how many steps to take from a base, given the largest displacement there."""
        before, self.worst = self.worst, worst
        if self.due and worst > 0 and self.looked > 0:
            self.ratio = 1.05 * self.looked / worst
        good, slower = before == math.inf, self.rate
        self.rate = 0.0
        if 0 < worst < before < math.inf:
            self.rate = math.log(worst / before) / self.ahead
            good = self.rate <= 0.7 * slower
        if before < math.inf:
            self.length = min(2 * self.length, _LONGEST) if good else max(self.length // 2, 1)
        ahead = min(self.length, self.limit - self.step)
        self.due = worst * self.ratio <= self.tol or not math.isfinite(worst)
        if self.due:
            ahead = 1
        elif self.rate < 0:
            needed = math.ceil(math.log(self.tol / self.ratio / worst) / self.rate)
            most = max(-_GAIN / self.rate, 1.0)
            self.due = needed <= min(most, ahead)
            ahead = int(min(needed, most, ahead))
        aged = self.step >= self.mark_step * 5 // 4 + 64
        self.stalled = (aged and worst > 0.5 * self.mark) or worst == 0
        if aged:
            self.mark, self.mark_step = worst, self.step
        self.ahead = 1 if self.stalled else ahead
        self.step += self.ahead
        self.due = self.due or self.stalled or self.step >= self.limit
        return self.ahead


@dataclass
class _Open:
    """Hold the answers of all samples, and the state of those that are still in the batch."""

    value: Tensor
    residual: Tensor
    steps: Tensor
    finished: Tensor
    before: Tensor
    index: Tensor | None = None
    checks: int = field(default=0)


def _solve(problem: Inclusion, steps: Steps, request: Request) -> Outcome:
    loop, tol = steps.loop, request.tol
    iteration, v = loop.iteration, loop.v
    samples = v.shape[0]
    plan = _Plan(limit=request.max_steps, tol=tol, step=iteration.initial_steps)
    drive, alpha = v * iteration.alpha, iteration.alpha
    shift = steps.multiply(drive, drive) if iteration.reflected else drive
    x = drive
    if request.z0 is not None:
        z = materialize(request.z0)
        x = (
            z + alpha * (steps.affine(z, v) - z)
            if iteration.reflected
            else steps.multiply(z, shift)
        )
    state = _Open(
        value=torch.empty_like(v), residual=v.new_empty(samples),
        steps=v.new_empty(samples, dtype=torch.int64),
        finished=torch.zeros(samples, dtype=torch.bool, device=v.device),
        before=v.new_full((samples,), math.inf),
    )  # fmt: skip
    while True:
        if plan.due:
            ends, share = _check_residual(
                problem, steps, state, plan, problem.activation.prox(x, alpha)
            )
            if ends:
                return Outcome(
                    value=state.value, residual=state.residual, steps=state.steps,
                    checks=state.checks, loop="device",
                )  # fmt: skip
            if share >= _LEAVE_SHARE:
                rest = (~state.finished).nonzero().squeeze(-1)
                problem, x, shift = problem.select(rest), x[rest], shift[rest]
                state.index = rest if state.index is None else state.index[rest]
                state.finished, state.before = state.finished[rest], state.before[rest]
                slope = None if loop.slope is None else loop.slope[rest]
                loop = replace(loop, v=materialize(problem.bias), slope=slope)
                steps = Steps(loop)
        change = steps.new_change(x) if steps.has_increments else None
        x, moved = steps.base(x, shift, change)
        moved = torch.where(state.finished, 0.0, moved)
        ahead = plan.plan_block(float(moved.nan_to_num(math.inf, math.inf).max()))
        if change is None:
            for _ in range(1, ahead):
                x = steps.step(x, shift)
        elif ahead > 1:
            spare = torch.empty_like(change)
            for _ in range(1, ahead):
                steps.increment(x, change, spare)
                change, spare = spare, change


def _check_residual(
    problem: Inclusion, steps: Steps, state: _Open, plan: _Plan, z: Tensor
) -> tuple[bool, float]:
    """Evaluate the residual of z, and store the samples that have passed.

    Returns:
        Whether the solve ends, and the share of the batch that has finished.
    """
    tol = plan.tol
    residual, floor = steps.residual(z, problem.bias)
    left = residual
    if z.dtype == torch.float32:
        noisy = (floor > tol) & (residual > 0.5 * state.before)
        left = torch.where(noisy, residual - floor, residual)
    state.before = residual
    state.checks += 1
    passed = state.finished | (left <= tol)
    # The only wait for the device; the maximum propagates NaN.
    worst, plan.looked, share = torch.stack(
        [
            torch.where(state.finished, 0.0, left).max(),
            torch.where(passed, 0.0, residual).max(),
            passed.to(z.dtype).mean(),
        ]
    ).tolist()
    last = worst <= tol or plan.step >= plan.limit or not math.isfinite(worst)
    if not last and plan.stalled:
        limit = STALL * torch.finfo(z.dtype).eps
        last = worst <= limit or bool((state.finished | problem.is_rounding_limited(z, tol)).all())
    newly = ~state.finished if last else passed & ~state.finished
    rows = newly.nonzero().squeeze(-1)
    target = rows if state.index is None else state.index[rows]
    state.value[target], state.residual[target] = z[rows], residual[rows]
    state.steps[target] = plan.step
    state.finished = passed
    return last, share

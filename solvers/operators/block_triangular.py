"""How is W handled when it is block triangular, layer after layer?"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from solvers.activations import Step
from solvers.operators.base import LinearOperator, check_metric, check_tensors
from solvers.operators.dense import DenseOperator
from solvers.operators.maps import Map, NotMonotoneError, Resolvent, step_key
from solvers.operators.matrix import Constants
from solvers.precision import cast

Couplings = Mapping[tuple[int, int], Tensor]
"""W_ij by (i, j): what block i receives from block j."""


@dataclass(frozen=True, eq=False)
class Layout:
    """Which units belong to which block, and the order in which blocks can be solved.

    Attributes:
        units: the units of each block.
        order: blocks in the order of substitution; backwards for a transpose.
        couplings: W_ij.
    """

    units: tuple[slice, ...]
    order: tuple[int, ...]
    couplings: Couplings

    def split(self, z: Float[Tensor, "*batch n"]) -> list[Tensor]:
        """Return the blocks of z."""
        return [z[..., units] for units in self.units]

    def inflow(self, i: int, z: Sequence[Tensor | None]) -> Tensor | None:
        """Return Σⱼ W_ij zⱼ over j ≠ i, or None when nothing flows into block i."""
        total: Tensor | None = None
        for (row, j), W in self.couplings.items():
            z_j = z[j]
            if row == i and z_j is not None:
                term = z_j @ W.T
                total = term if total is None else total + term
        return total

    def substitute(
        self, x: Float[Tensor, "*batch n"], solve: Callable[[int, Tensor, Tensor | None], Tensor]
    ) -> Float[Tensor, "*batch n"]:
        """Return z with zᵢ = solve(i, xᵢ, Σⱼ W_ij zⱼ), block after block."""
        parts = self.split(x)
        z: list[Tensor | None] = [None] * len(parts)
        for i in self.order:
            z[i] = solve(i, parts[i], self.inflow(i, z))
        return torch.cat([z_i for z_i in z if z_i is not None], dim=-1)


@dataclass(frozen=True, eq=False)
class BlockRelaxed(Map):
    """M = (1 − α)I + αW from the same maps of the blocks, and the couplings times α."""

    layout: Layout
    maps: tuple[Map, ...]

    def add(self, x: Tensor, shift: Tensor, out: Tensor | None) -> Tensor:
        result = torch.empty_like(shift) if out is None else out
        x_parts, shifts, targets = (self.layout.split(t) for t in (x, shift, result))
        for map_, x_i, shift_i, target in zip(self.maps, x_parts, shifts, targets, strict=True):
            map_.add(x_i, shift_i, target)
        for (i, j), W in self.layout.couplings.items():
            targets[i].addmm_(x_parts[j], W.T)
        return result


@dataclass(frozen=True, eq=False)
class BlockTriangularResolvent(Resolvent):
    """R by substitution: zᵢ = Rᵢ(xᵢ + αᵢ Σⱼ W_ij zⱼ) with the resolvents Rᵢ of the blocks.

    Attributes:
        layout: the blocks and their couplings W_ij.
        parts: Rᵢ.
        steps: α per block.
    """

    layout: Layout
    parts: tuple[Resolvent, ...]
    steps: tuple[Step, ...]

    def solve(self, x: Tensor) -> Tensor:
        def solve(i: int, x_i: Tensor, inflow: Tensor | None) -> Tensor:
            return self.parts[i].solve(x_i if inflow is None else x_i + self.steps[i] * inflow)

        return self.layout.substitute(x, solve)

    @property
    def T(self) -> BlockTriangularResolvent:
        return BlockTriangularResolvent(
            _transposed(self.layout), tuple(part.T for part in self.parts), self.steps
        )


@dataclass(frozen=True, eq=False)
class BlockTriangularOperator(LinearOperator):
    """W with operators on the diagonal and matrices below it: layers that feed later layers.

    Block i sees z_i = σ(W_ii z_i + Σ_{j<i} W_ij z_j + v_i). A block is any operator, also
    `ZeroOperator`: the explicit layers z₁ = σ(v₁), z₂ = σ(Wz₁ + v₂) are

        BlockTriangularOperator([ZeroOperator(ones₁), ZeroOperator(ones₂)], {(1, 0): W}).

    The transpose is block upper triangular. Nothing but `constants` forms the whole matrix.

    Args:
        blocks: W_ii.
        couplings: W_ij of shape nᵢ × nⱼ by (i, j) with j < i.
        metric: Λ; the blocks' metrics one after the other when omitted. See `monotone_metric`.

    Raises:
        TypeError: if a block is no operator, or a coupling or the metric no tensor of real numbers.
        ValueError: if there is no block, a coupling stands elsewhere or has another shape, or
            dtypes or devices differ.
    """

    blocks: Sequence[LinearOperator]
    couplings: Couplings
    metric: Float[Tensor, " n"] = None  # type: ignore[assignment]
    transposed: bool = field(default=False, repr=False)
    _memo: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if len(self.blocks) == 0:
            raise ValueError("a block-triangular operator needs at least one block, got none")
        object.__setattr__(self, "blocks", tuple(self.blocks))
        object.__setattr__(self, "couplings", dict(sorted(self.couplings.items())))
        for i, block in enumerate(self.blocks):
            if not isinstance(block, LinearOperator):
                raise TypeError(
                    f"block {i} must be a LinearOperator, got {type(block).__name__}: pass "
                    "DenseOperator(W) for a matrix W"
                )
        check_tensors(**{f"coupling {key}": W for key, W in self.couplings.items()})
        like = self.blocks[0].metric
        for i, block in enumerate(self.blocks):
            if block.dtype != like.dtype or block.device != like.device:
                raise ValueError(
                    f"block {i} is {block.dtype} on {block.device}, block 0 is {like.dtype} on "
                    f"{like.device}"
                )
        for (i, j), W in self.couplings.items():
            low, high = (i, j) if self.transposed else (j, i)
            if not 0 <= low < high < len(self.blocks):
                raise ValueError(
                    f"couplings stand at (i, j) with 0 ≤ j < i < {len(self.blocks)}, got {(i, j)}"
                )
            shape = (self.blocks[i].n, self.blocks[j].n)
            if W.shape != shape:
                raise ValueError(f"coupling {(i, j)} must have shape {shape}, got {tuple(W.shape)}")
            if W.dtype != like.dtype or W.device != like.device:
                raise ValueError(
                    f"coupling {(i, j)} is {W.dtype} on {W.device}, the blocks are {like.dtype} "
                    f"on {like.device}"
                )
        if self.metric is None:
            metric = torch.cat([block.metric.detach() for block in self.blocks])
            object.__setattr__(self, "metric", metric)
        check_metric(self.metric, self.n, like)

    @property
    def n(self) -> int:
        return sum(block.n for block in self.blocks)

    @property
    def layout(self) -> Layout:
        """The units and the order of the blocks, with the couplings as they are."""
        ends = list(itertools.accumulate((block.n for block in self.blocks), initial=0))
        order = range(len(self.blocks))
        return Layout(
            units=tuple(slice(a, b) for a, b in itertools.pairwise(ends)),
            order=tuple(reversed(order) if self.transposed else order),
            couplings=self.couplings,
        )

    def _frozen_layout(self) -> Layout:
        """Return the layout cut from the graph, for what a memo keeps."""
        layout = self.layout
        detached = {key: W.detach() for key, W in self.couplings.items()}
        return Layout(layout.units, layout.order, detached)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        inner = itertools.chain.from_iterable(block.tensors for block in self.blocks)
        return (*inner, *self.couplings.values())

    def _given(self) -> tuple[Tensor, ...]:
        inner = itertools.chain.from_iterable(block._given() for block in self.blocks)
        couplings = _transposed(self.layout).couplings if self.transposed else self.couplings
        return (*inner, *(W for _, W in sorted(couplings.items(), key=lambda item: item[0])))

    def _parts(self) -> tuple[LinearOperator, ...]:
        return tuple(self.blocks)

    @property
    def T(self) -> BlockTriangularOperator:
        return BlockTriangularOperator(
            tuple(block.T for block in self.blocks),
            _transposed(self.layout).couplings,
            self._dual_metric(),
            not self.transposed,
            self._shared(),
        )

    def rebuild(self, tensors: tuple[Tensor, ...]) -> BlockTriangularOperator:
        left = iter(tensors)
        blocks = tuple(
            block.rebuild(tuple(itertools.islice(left, len(block.tensors))))
            for block in self.blocks
        )
        couplings = dict(zip(self.couplings, left, strict=True))
        return BlockTriangularOperator(
            blocks, couplings, self.metric, self.transposed, self._shared()
        )

    def to(self, dtype: torch.dtype) -> BlockTriangularOperator:
        if dtype == self.dtype:
            return self
        return self.memo(("to", dtype, self.transposed), lambda: self._to(dtype))

    def _to(self, dtype: torch.dtype) -> BlockTriangularOperator:
        couplings = {key: cast(W.detach(), dtype) for key, W in self.couplings.items()}
        blocks = tuple(block.to(dtype) for block in self.blocks)
        metric = cast(self.metric.detach(), dtype)
        return BlockTriangularOperator(blocks, couplings, metric, self.transposed)

    def mv(self, z: Tensor) -> Tensor:
        return self._product(z, self.layout, lambda block, z_i: block.mv(z_i))

    def rmv(self, z: Tensor) -> Tensor:
        return self.T.mv(z)

    def magnitude(self, z: Tensor) -> Tensor:
        layout = self.layout
        sizes = {key: W.detach().abs() for key, W in self.couplings.items()}
        layout = Layout(layout.units, layout.order, sizes)
        return self._product(z, layout, lambda block, z_i: block.magnitude(z_i))

    def _product(
        self, z: Tensor, layout: Layout, product: Callable[[LinearOperator, Tensor], Tensor]
    ) -> Tensor:
        parts = layout.split(z)
        rows = []
        for i, block in enumerate(self.blocks):
            own, inflow = product(block, parts[i]), layout.inflow(i, parts)
            rows.append(own if inflow is None else own + inflow)
        return torch.cat(rows, dim=-1)

    def pullback(self, u: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        split = self.layout.split
        u_parts, z_parts = split(u.reshape(-1, self.n)), split(z.reshape(-1, self.n))
        inner = (
            block.pullback(*pair)
            for block, *pair in zip(self.blocks, u_parts, z_parts, strict=True)
        )
        outer = (u_parts[i].T @ z_parts[j] for i, j in self.couplings)
        return (*itertools.chain.from_iterable(inner), *outer)

    @property
    def summands(self) -> int:
        longest = max(block.summands for block in self.blocks)
        longest = max(longest, *(block.n for block in self.blocks)) if self.couplings else longest
        return longest + len(self.blocks) - 1  # each further term of a row is one addition

    @property
    def by_kernels(self) -> bool:
        return any(block.by_kernels for block in self.blocks)

    def losses(self) -> Tensor:
        return self._losses_of_sums() + torch.cat([block.losses() for block in self.blocks])

    def unread(self, size: Tensor) -> Tensor:
        parts = zip(self.blocks, self.layout.split(size), strict=True)
        return self._unread_of_sums(size) + torch.cat([b.unread(part) for b, part in parts], -1)

    def diagonal(self) -> Tensor:
        return torch.cat([block.diagonal() for block in self.blocks])

    def submatrix(self, rows: Tensor, columns: Tensor) -> Tensor:
        batch = torch.broadcast_shapes(rows.shape[:-1], columns.shape[:-1])
        result = self.metric.new_zeros(*batch, rows.shape[-1], columns.shape[-1])
        layout = self._frozen_layout()
        for i, j in [(i, i) for i in layout.order] + list(layout.couplings):
            (r, inside_r), (c, inside_c) = (
                _local(index, layout.units[k]) for index, k in ((rows, i), (columns, j))
            )
            inside = inside_r[..., :, None] & inside_c[..., None, :]
            if i == j:
                part = self.blocks[i].submatrix(r, c)
            else:
                part = layout.couplings[i, j][r[..., :, None], c[..., None, :]]
            result = torch.where(inside, part, result)
        return result

    def log_determinant(self) -> float:
        return sum(block.log_determinant() for block in self.blocks)

    def resolvent(self, step: Step) -> BlockTriangularResolvent:
        # The blocks keep the factors; one set of slices of α gives W and Wᵀ the same keys.
        steps = self.memo(("steps", step_key(step)), lambda: (step, self._split_step(step)))[1]
        parts = (block.resolvent(s) for block, s in zip(self.blocks, steps, strict=True))
        return BlockTriangularResolvent(self._frozen_layout(), tuple(parts), steps)

    def _split_step(self, step: Step) -> tuple[Step, ...]:
        if isinstance(step, Tensor) and step.ndim:
            return tuple(self.layout.split(step))
        return (step,) * len(self.blocks)

    def relax(self, step: Step) -> BlockRelaxed:
        steps = self._split_step(step)
        layout = self._frozen_layout()
        # One row per unit: a step per unit scales the rows of its block.
        columns = [s[:, None] if isinstance(s, Tensor) and s.ndim else s for s in steps]
        scaled = {(i, j): columns[i] * W for (i, j), W in layout.couplings.items()}
        maps = (block.relax(s) for block, s in zip(self.blocks, steps, strict=True))
        return BlockRelaxed(Layout(layout.units, layout.order, scaled), tuple(maps))

    def is_monotone(self) -> bool:
        """Say whether every block is monotone: then substitution finds the one solution.

        I − W is then strongly monotone in some diagonal metric (`monotone_metric`) though perhaps
        not in Λ. Peaceman–Rachford and Douglas–Rachford splitting converge all the same, for their
        iterates do not depend on the metric; forward–backward splitting takes its step from m in
        Λ, and the error bound is infinite where that m ≤ 0.
        """
        return self.memo(
            "is monotone",
            lambda: all(block.is_monotone() for block in self.blocks) or self.constants().m > 0,
        )

    def constants(self) -> Constants:
        """Return (m, L) of the whole in Λ, from W assembled as one n × n matrix in float64."""
        return self.memo("constants", self._constants)

    def _constants(self) -> Constants:
        units = torch.arange(self.n, device=self.device)
        W = cast(self.submatrix(units, units), torch.float64)
        return DenseOperator(W, cast(self.metric.detach(), torch.float64)).constants()

    def monotone_metric(self) -> Float[Tensor, " n"]:
        """Return the blocks' metrics times one number each, so that the whole has m > 0.

        With the blocks before i at monotonicity m₀, block i at mᵢ and ‖[W_ij]_j‖ = k between
        their norms, the factor min(1, m₀mᵢ/k²) for block i leaves at least
        λmin [[m₀, −½√(m₀mᵢ)], [−½√(m₀mᵢ), mᵢ]] > 0. The factors fall from block to block, so an
        error bound in this metric says less about late blocks. Pass it as `metric`.

        Raises:
            NotMonotoneError: if a block is not monotone in its own metric.
        """
        if self.transposed:
            return 1 / self.T.monotone_metric()
        m, scaled = math.inf, list[Tensor]()
        for i, block in enumerate(self.blocks):
            own, metric = block.constants().m, cast(block.metric.detach(), torch.float64)
            if own <= 0:
                raise NotMonotoneError(
                    f"block {i} is not strongly monotone in its own metric: m = {own:.3g} ≤ 0"
                )
            rows = [
                cast(self.couplings[i, j].detach(), torch.float64) / scaled[j].sqrt()
                if (i, j) in self.couplings
                else metric.new_zeros(block.n, self.blocks[j].n)
                for j in range(i)
            ]
            k = 0.0
            if rows:
                joined = metric.sqrt()[:, None] * torch.cat(rows, dim=1)
                k = float(torch.linalg.matrix_norm(joined, 2)) * (1 + 1e-9)  # up, over rounding
            factor = min(1.0, m * own / k**2) if k else 1.0
            scaled.append(factor * metric)
            m = _smaller_eigenvalue(m, own, 0.5 * math.sqrt(factor) * k) if i else own
        return torch.cat(scaled).to(self.dtype)


def _smaller_eigenvalue(a: float, b: float, c: float) -> float:
    """Return λmin [[a, c], [c, b]], without cancellation when it is positive."""
    larger = 0.5 * (a + b + math.hypot(a - b, 2 * c))
    return (a * b - c * c) / larger


def _transposed(layout: Layout) -> Layout:
    couplings = {(j, i): W.T for (i, j), W in layout.couplings.items()}
    return Layout(layout.units, layout.order[::-1], couplings)


def _local(index: Tensor, units: slice) -> tuple[Tensor, Tensor]:
    """Return positions within a block, some number where outside, and which lie inside."""
    inside = (index >= units.start) & (index < units.stop)
    return (index - units.start).clamp(0, units.stop - units.start - 1), inside

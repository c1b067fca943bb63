"""Which multipliers prove the least bound? A primal–dual interior-point method for our programs.

Let y = (τ, λ, w) ≥ 0 be numbers: τ one for all p inputs or one for each, λ one per unit, w one per
linear constraint. The program is

    minimise cᵀy   so that   S(y) = S₀ + τE + Σᵢ yᵢ (aᵢbᵢᵀ + bᵢaᵢᵀ) ⪰ 0,

where E is the identity on the inputs and zero elsewhere. With S₀ = −OᵀO for the outputs O, and for
units with slopes in [α, β] whose pre-activation is rᵢᵀξ and whose state is the coordinate eᵢᵀξ,

    aᵢ = eᵢ − αᵢrᵢ,   bᵢ = eᵢ − βᵢrᵢ,

it is γM(Λ, γ) ⪰ 0 with τ = γ² and λ = γΛ (lben/certificates/inequality.py). Symbols:
docs/glossary.md.

Its dual has a matrix X ⪰ 0, the second moments of a worst distribution of increments ξ, and s ≥ 0:

    maximise −⟨S₀, X⟩   so that   ⟨E, X⟩ = 1   and   2aᵢᵀXbᵢ + sᵢ = cᵢ.

Each step solves the linearised conditions XS = μI, sᵢyᵢ = μ, with a predictor and a corrector
(Mehrotra 1992), in the direction of Helmberg, Rendl, Vanderbei and Wolkowicz (1996), Kojima,
Shindoh and Hara (1997) and Monteiro (1997).

Note [Structure]
With Z = S⁻¹ the Newton matrix has the entries

    Hᵢⱼ = (bᵢᵀXaⱼ)(aᵢᵀZbⱼ) + (bᵢᵀXbⱼ)(aᵢᵀZaⱼ) + (aᵢᵀXaⱼ)(bᵢᵀZbⱼ) + (aᵢᵀXbⱼ)(bᵢᵀZaⱼ):

entrywise products of matrices that cost one product each. A general solver would form one matrix as
large as S for every unit.

Note [Chains]
Let the coordinates be cut into groups so that S is block tridiagonal, as it is for a network of
layers. Then only the blocks of X next to the diagonal matter. The other blocks of X are chosen so
that X⁻¹ is block tridiagonal as well (Fukuda, Kojima, Murota and Nakata 2001): the one with largest
determinant. For N coordinates in groups of w, a product with such a matrix costs N²w, not N³. The
Newton matrix still has one row per unit: memory grows as n², and time as n²w + n³/3.

Everything here proposes; `lben.certificates` proves.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

_BISECTIONS = (4, 6)
"""Of the step length of the predictor, and of the step that is taken."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """The vectors rᵢ of consecutive units, which are zero outside of some coordinates.

    Attributes:
        coordinates: that may differ from zero.
        units: of these vectors.
        values: the vectors as columns; one matrix for the whole batch, or one each.
    """

    coordinates: slice
    units: slice
    values: Float[Tensor, "batch k u"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Program:
    """A batch of programs, float64. N coordinates are the inputs and the states of all units.

    Attributes:
        groups: sizes of the groups of coordinates, see Note [Chains]; one group for no structure.
        inputs: p, the first coordinates.
        rows: rᵢ of all units.
        states: the coordinate of each unit.
        low, high: α and β of each unit.
        constant: S₀.
        per_input: whether τ has a number per input instead of one for all.
        columns: aⱼ and bⱼ of further variables w, N × f each.
        prices: what a unit of each λ and of each w adds to the objective; nothing if None.
    """

    groups: tuple[int, ...]
    inputs: int
    rows: tuple[Rows, ...]
    states: Int[Tensor, " n"]
    low: Float[Tensor, "batch n"]
    high: Float[Tensor, "batch n"]
    constant: Float[Tensor, "batch N N"]
    per_input: bool = False
    columns: tuple[Float[Tensor, "batch N f"], Float[Tensor, "batch N f"]] | None = None
    prices: Float[Tensor, "batch k"] | None = None

    @cached_property
    def slices(self) -> list[slice]:
        """The coordinates of each group."""
        ends = list(itertools.accumulate(self.groups))
        return [slice(end - size, end) for size, end in zip(self.groups, ends, strict=True)]

    @property
    def shared(self) -> int:
        """1 if τ is one number for all inputs, 0 if it is one for each."""
        return 0 if self.per_input else 1

    @cached_property
    def _mean(self) -> Float[Tensor, "batch n"]:
        """α + β."""
        return self.low + self.high

    @cached_property
    def _product(self) -> Float[Tensor, "batch n"] | None:
        """2αβ, or None where it is zero for all units."""
        product = 2 * self.low * self.high
        return product if bool(product.any()) else None

    @cached_property
    def costs(self) -> Float[Tensor, "batch m"]:
        """c: 1 for τ, and the prices of λ and w."""
        ones = self.constant.new_ones(len(self.constant), self.inputs if self.per_input else 1)
        count = len(self.states) + (0 if self.columns is None else self.columns[0].shape[2])
        free = self.constant.new_zeros(len(self.constant), count)
        return torch.cat([ones, free if self.prices is None else self.prices], dim=1)

    def select(self, index: Tensor) -> Program:
        """Return the programs at some indices of the batch."""

        def pick(t: Tensor) -> Tensor:
            return t if len(t) == 1 and len(self.constant) > 1 else t[index]

        return replace(
            self, low=pick(self.low), high=pick(self.high), constant=self.constant[index],
            rows=tuple(replace(r, values=pick(r.values)) for r in self.rows),
            columns=self.columns and (self.columns[0][index], self.columns[1][index]),
            prices=None if self.prices is None else self.prices[index],
        )  # fmt: skip

    def split(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return τ, λ and w, the parts of y."""
        first = self.inputs if self.per_input else 1
        end = first + len(self.states)
        return y[:, :first], y[:, first:end], y[:, end:]

    def assemble(self, y: Float[Tensor, "batch m"]) -> Float[Tensor, "batch N N"]:
        """Return S(y) − S₀, linear in y."""
        tau, lam, w = self.split(y)
        S = torch.zeros_like(self.constant)
        S.diagonal(dim1=1, dim2=2)[:, : self.inputs] += tau
        S[:, self.states, self.states] += 2 * lam
        for part in self.rows:
            u, k = part.units, part.coordinates
            side = part.values * (lam * self._mean)[:, None, u]
            S[:, k, self.states[u]] -= side
            S[:, self.states[u], k] -= side.mT
            if self._product is not None:
                S[:, k, k] += (part.values * (lam * self._product)[:, None, u]) @ part.values.mT
        if self.columns is not None:
            a, b = self.columns
            side = (a * w[:, None]) @ b.mT
            S += side + side.mT
        return S

    def multiply(self, Q: Tensor) -> tuple[Tensor, Tensor]:
        """Return QA and QB for the vectors of all variables but a shared τ, as columns."""
        QR = self._multiply_rows(Q)
        QE = Q[:, :, self.states]
        parts = [(_combine(QE, self.low[:, None], QR), _combine(QE, self.high[:, None], QR))]
        if self.per_input:
            parts.insert(0, (Q[:, :, : self.inputs], 0.5 * Q[:, :, : self.inputs]))
        if self.columns is not None:
            parts.append((Q @ self.columns[0], Q @ self.columns[1]))
        if len(parts) == 1:
            return parts[0]
        return torch.cat([a for a, _ in parts], 2), torch.cat([b for _, b in parts], 2)

    def _multiply_rows(self, Q: Tensor) -> Tensor:
        """Return QR, where R has the rᵢ as columns."""
        QR = Q.new_empty(len(Q), Q.shape[1], len(self.states))
        for part in self.rows:
            QR[:, :, part.units] = Q[:, :, part.coordinates] @ part.values
        return QR

    def measure(self, Q: Tensor) -> Float[Tensor, "batch m"]:
        """Return ⟨E, Q⟩ for a shared τ, and aᵢᵀ(Q + Qᵀ)bᵢ for the other variables."""
        diagonal = Q.diagonal(dim1=1, dim2=2)
        first = diagonal[:, : self.inputs]
        found = [first if self.per_input else first.sum(1, keepdim=True)]
        own, mixed, square = diagonal[:, self.states], [], []
        for part in self.rows:
            u, k = part.units, part.coordinates
            mixed.append(((Q[:, k, self.states[u]] + Q[:, self.states[u], k].mT) * part.values)
                         .sum(1))  # fmt: skip
            if self._product is not None:
                square.append((part.values * (Q[:, k, k] @ part.values)).sum(1))
        found.append(2 * own - self._mean * torch.cat(mixed, 1))
        if self._product is not None:
            found[-1] += self._product * torch.cat(square, 1)
        if self.columns is not None:
            a, b = self.columns
            found.append((a * ((Q + Q.mT) @ b)).sum(1))
        return torch.cat(found, 1)

    def transpose_multiply(self, Y: Tensor) -> tuple[Tensor, Tensor]:
        """Return AᵀY and BᵀY."""
        RY = self._multiply_rows(Y.mT).mT
        EY = Y[:, self.states]
        parts = [(_combine(EY, self.low[:, :, None], RY), _combine(EY, self.high[:, :, None], RY))]
        if self.per_input:
            parts.insert(0, (Y[:, : self.inputs], 0.5 * Y[:, : self.inputs]))
        if self.columns is not None:
            parts.append((self.columns[0].mT @ Y, self.columns[1].mT @ Y))
        if len(parts) == 1:
            return parts[0]
        return torch.cat([a for a, _ in parts], 1), torch.cat([b for _, b in parts], 1)


def _combine(states: Tensor, slopes: Tensor, rows: Tensor) -> Tensor:
    """Return states − slopes · rows."""
    return torch.addcmul(states, slopes, rows, value=-1.0) if bool(slopes.any()) else states


@dataclass(frozen=True, eq=False)
class _Band:
    """The blocks of a symmetric matrix on the diagonal, and those next to it on the right."""

    diagonal: list[Tensor]
    side: list[Tensor]

    def map(self, function: Callable[..., Tensor], *others: _Band) -> _Band:
        """Return the band whose blocks are a function of blocks."""
        return _Band(
            [
                function(*blocks)
                for blocks in zip(self.diagonal, *(o.diagonal for o in others), strict=True)
            ],
            [
                function(*blocks)
                for blocks in zip(self.side, *(o.side for o in others), strict=True)
            ],
        )

    def add(self, step: Tensor, other: _Band) -> _Band:
        """Return self + step · other, with a step for each matrix of the batch."""
        return self.map(lambda a, b: torch.addcmul(a, step[:, None, None], b), other)

    def inner(self, other: _Band) -> Float[Tensor, " batch"]:
        """Return ⟨A, B⟩ for matrices of which one has no other blocks."""
        own = [(a * b).sum((1, 2)) for a, b in zip(self.diagonal, other.diagonal, strict=True)]
        side = [(a * b).sum((1, 2)) for a, b in zip(self.side, other.side, strict=True)]
        return torch.stack([*own, *side, *side]).sum(0)


class _Chain:
    """Symmetric matrices of block tridiagonal form, and those with such an inverse."""

    def __init__(self, slices: list[slice]) -> None:
        self.slices = slices
        self.pairs = list(itertools.pairwise(slices))

    def read(self, M: Tensor) -> _Band:
        """Return the band of a symmetric matrix, as views."""
        return _Band([M[:, k, k] for k in self.slices], [M[:, i, j] for i, j in self.pairs])

    def write(self, band: _Band, like: Tensor) -> Tensor:
        """Return the matrix that has a band, and zeros elsewhere."""
        M = torch.zeros_like(like)
        for k, block in zip(self.slices, band.diagonal, strict=True):
            M[:, k, k] = block
        for (i, j), block in zip(self.pairs, band.side, strict=True):
            M[:, i, j], M[:, j, i] = block, block.mT
        return M

    def factor(self, S: _Band) -> tuple[_Band, Tensor]:
        """Return the Cholesky factor, lower blocks as side, and which matrices have none."""
        diagonal: list[Tensor] = []
        below: list[Tensor] = []
        failed = torch.zeros(len(S.diagonal[0]), dtype=torch.bool, device=S.diagonal[0].device)
        for i, D in enumerate(S.diagonal):
            if i:
                side = torch.linalg.solve_triangular(diagonal[-1], S.side[i - 1], upper=False).mT
                D = torch.baddbmm(D, side, side.mT, alpha=-1.0)
                below.append(side)
            root, info = torch.linalg.cholesky_ex(D)
            failed |= (info != 0) | ~root.diagonal(dim1=1, dim2=2).isfinite().all(1)
            if bool(failed.any()):  # a factor that is not used: any will do
                identity = torch.eye(D.shape[1], dtype=D.dtype, device=D.device)
                root = torch.where(failed[:, None, None], identity, root)
            diagonal.append(root)
        return _Band(diagonal, below), failed

    def invert(self, factor: _Band, like: Tensor) -> Tensor:
        """Return S⁻¹."""
        last = len(self.slices) - 1
        Z = torch.empty_like(like)
        for i in range(last, -1, -1):
            k = self.slices[i]
            own = torch.cholesky_inverse(factor.diagonal[i])
            if i < last:
                after = slice(k.stop, like.shape[1])
                nxt = self.slices[i + 1]
                # S⁻¹ of rows k: −gain times the rows of the next group.
                gain = torch.linalg.solve_triangular(
                    factor.diagonal[i].mT, factor.side[i].mT, upper=True
                )
                side = -gain @ Z[:, nxt, after]
                Z[:, k, after], Z[:, after, k] = side, side.mT
                own = own - side[:, :, : nxt.stop - nxt.start] @ gain.mT
            Z[:, k, k] = own
        return Z

    def is_positive(self, S: _Band) -> Tensor:
        """Say which block tridiagonal matrices are positive definite."""
        return ~self.factor(S)[1]

    def has_positive_cliques(self, X: _Band) -> Tensor:
        """Say where all pairs of neighbouring groups have a positive definite block of X."""
        cliques = X.diagonal
        if X.side:
            cliques = [
                torch.cat([torch.cat([a, s], 2), torch.cat([s.mT, b], 2)], 1)
                for a, s, b in zip(X.diagonal, X.side, X.diagonal[1:], strict=False)
            ]
        good = torch.ones(len(cliques[0]), dtype=torch.bool, device=cliques[0].device)
        for clique in cliques:
            root, info = torch.linalg.cholesky_ex(clique)
            good &= (info == 0) & root.diagonal(dim1=1, dim2=2).isfinite().all(1)
        return good

    def complete(self, band: _Band, like: Tensor) -> Tensor:
        """Return the X with a given band whose inverse is block tridiagonal."""
        X = torch.empty_like(like)
        for k, block in zip(self.slices, band.diagonal, strict=True):
            X[:, k, k] = block
        for (i, j), block in zip(self.pairs, band.side, strict=True):
            X[:, i, j], X[:, j, i] = block, block.mT
        for k, after in self.pairs[1:]:
            before = slice(0, k.start)
            side = self._gain(X, k, after) @ X[:, k, before]
            X[:, after, before], X[:, before, after] = side, side.mT
        return X

    @staticmethod
    def _gain(X: Tensor, k: slice, other: slice) -> Tensor:
        """Return X_other,k X_kk⁻¹."""
        root = torch.linalg.cholesky_ex(X[:, k, k])[0]
        return torch.cholesky_solve(X[:, k, other], root).mT

    def multiply(self, X: Tensor, V: Tensor) -> Tensor:
        """Return XV for a matrix X whose inverse is block tridiagonal."""
        if len(self.slices) <= 2:
            return X @ V
        parts = [X[:, k, k] @ V[:, k] for k in self.slices]
        total = list(parts)
        down = up = None
        for i in range(1, len(self.slices)):
            before, k = self.slices[i - 1], self.slices[i]
            flow = parts[i - 1] if down is None else parts[i - 1] + down
            down = self._gain(X, before, k) @ flow
            total[i] = total[i] + down
        for i in range(len(self.slices) - 2, -1, -1):
            k, after = self.slices[i], self.slices[i + 1]
            flow = parts[i + 1] if up is None else parts[i + 1] + up
            up = self._gain(X, after, k) @ flow
            total[i] = total[i] + up
        return torch.cat(total, dim=1)

    def multiply_band(self, S: _Band, V: Tensor) -> Tensor:
        """Return SV for a block tridiagonal matrix S."""
        result = torch.empty_like(V)
        for i, k in enumerate(self.slices):
            rows = S.diagonal[i] @ V[:, k]
            if i:
                rows = torch.baddbmm(rows, S.side[i - 1].mT, V[:, self.slices[i - 1]])
            if i + 1 < len(self.slices):
                rows = torch.baddbmm(rows, S.side[i], V[:, self.slices[i + 1]])
            result[:, k] = rows
        return result

    def find_symmetric_band(self, X: Tensor, V: Tensor) -> _Band:
        """Return the band of ½(XV + VᵀX)."""
        own = [X[:, k] @ V[:, :, k] for k in self.slices]
        sides = [X[:, i] @ V[:, :, j] + (X[:, j] @ V[:, :, i]).mT for i, j in self.pairs]
        return _Band([0.5 * (P + P.mT) for P in own], [0.5 * P for P in sides])


@dataclass(frozen=True, kw_only=True, eq=False)
class Optimum:
    """Strictly feasible points of a batch of programs.

    Attributes:
        y: τ, λ and w.
        gap: (objective − dual objective) ÷ objective, for an X that satisfies its equations up to
            roundoff. It tells how far a claim is from the optimum, and is not proved.
        steps: Newton steps of the batch.
        converged: where the gap that was asked for, or the target, was reached.
    """

    y: Float[Tensor, "batch m"]
    gap: Float[Tensor, " batch"]
    steps: int
    converged: Bool[Tensor, " batch"]


@dataclass(kw_only=True, eq=False)
class _State:
    """Where a batch of programs stands: y with S(y), X, s, and the gap."""

    y: Tensor
    S: _Band
    X: Tensor
    s: Tensor

    def select(self, index: Tensor) -> _State:
        """Return the states at some indices of the batch."""
        return _State(
            y=self.y[index], S=self.S.map(lambda t: t[index]), X=self.X[index], s=self.s[index]
        )


@dataclass(frozen=True, eq=False)
class _Direction:
    """Changes of y, of the bands of S(y) and X, and of s."""

    y: Tensor
    S: _Band
    X: _Band
    s: Tensor

    def select(self, index: Tensor) -> _Direction:
        """Return the directions at some indices of the batch."""
        S, X = (band.map(lambda t: t[index]) for band in (self.S, self.X))
        return _Direction(self.y[index], S, X, self.s[index])


def minimise(
    program: Program,
    start: Float[Tensor, "batch m"],
    *,
    gap: float = 1e-7,
    target: Float[Tensor, " batch"] | None = None,
    max_steps: int = 60,
) -> Optimum:
    """Minimise cᵀy so that S(y) ⪰ 0, for each of a batch of programs.

    Args:
        program: the batch.
        start: a strictly feasible y of each program.
        gap: relative accuracy of the objective.
        target: a value of the objective; a program also ends once its objective is at most the
            target, or once its dual objective is above.
        max_steps: bound of the number of Newton steps.

    Returns:
        The last point of each program, with its gap; the best one reached.

    Raises:
        ValueError: if a start is not strictly feasible.

    Reference:
        Todd, Toh and Tütüncü (1998), "On the Nesterov–Todd direction in semidefinite programming",
        section 5, for the direction of Helmberg and others with a corrector.
    """
    chain = _Chain(program.slices)
    S = chain.read(program.assemble(start).add_(program.constant))
    factor, failed = chain.factor(S)
    if bool(failed.any()) or not bool((start > 0).all()):
        raise ValueError("the start of a program must be strictly feasible: y > 0 and S(y) ≻ 0")
    X = chain.invert(factor, program.constant)
    inputs = X.diagonal(dim1=1, dim2=2)[:, : program.inputs].sum(1)
    mu = (program.inputs if program.per_input else 1.0) / inputs
    X = mu[:, None, None] * X
    s = mu[:, None] / start[:, program.shared :]
    state = _State(y=start.clone(), S=S, X=X, s=s)
    best, gaps = start.clone(), torch.full_like(mu, torch.inf)
    done = torch.zeros_like(mu, dtype=torch.bool)
    active = torch.arange(len(start), device=start.device)
    steps = 0
    while len(active) and steps < max_steps:
        steps += 1
        ended = _advance(program, chain, state)
        objective, relative = _measure_gap(program, chain, state)
        better = objective < (program.costs * best[active]).sum(1)
        best[active[better]] = state.y[better]
        gaps[active] = relative
        reached = relative <= gap
        if target is not None:
            reached |= (objective <= target[active]) | (objective * (1 - relative) > target[active])
        done[active] = reached
        left = ~(reached | ended)
        if not bool(left.all()):
            index = left.nonzero()[:, 0]
            active, state = active[index], state.select(index)
            if len(index):
                program = program.select(index)
    return Optimum(y=best, gap=gaps, steps=steps, converged=done)


def _measure_gap(program: Program, chain: _Chain, state: _State) -> tuple[Tensor, Tensor]:
    """Return the objective, and the relative gap with what X misses of its equations."""
    costs = program.costs
    objective = (costs * state.y).sum(1)
    missing = costs - program.measure(state.X)
    missing[:, program.shared :] -= state.s
    between = chain.read(state.X).inner(state.S) + (state.s * state.y[:, program.shared :]).sum(1)
    return objective, (between + (missing * state.y).sum(1).abs()) / objective


def _advance(program: Program, chain: _Chain, state: _State) -> Tensor:
    """Take one step, in place; return the programs that roundoff has stopped."""
    first = program.shared
    y, S, X, s = state.y[:, first:], state.S, state.X, state.s
    Z = chain.invert(chain.factor(S)[0], X)
    solve, failed = _factor_newton_matrix(program, X, Z, s / y)
    own_X, own_Z = chain.read(X), chain.read(Z)
    order = X.shape[1] + y.shape[1]
    mu = (own_X.inner(S) + (s * y).sum(1)) / order
    barrier = program.measure(Z)
    barrier[:, first:] += 1 / y
    costs = program.costs

    def find(
        sigma: Tensor, corrector: tuple[_Band, Tensor] | None = None
    ) -> tuple[_Direction, Tensor]:
        weight = sigma * mu
        right = weight[:, None] * barrier - costs
        if corrector is not None:
            change = program.measure(chain.write(corrector[0], X))
            change[:, first:] += corrector[1]
            right = right - change
        dy = solve(right)
        dS = chain.read(program.assemble(dy))
        Y = chain.multiply_band(dS, Z)
        product = chain.find_symmetric_band(X, Y)
        dX = own_Z.map(lambda z, x, p: weight[:, None, None] * z - x - p, own_X, product)
        ds = weight[:, None] / y - s - s * dy[:, first:] / y
        if corrector is not None:
            dX, ds = dX.map(torch.sub, corrector[0]), ds - corrector[1]
        return _Direction(dy, dS, dX, ds), Y

    def measure_steps(d: _Direction, bisections: int) -> tuple[Tensor, Tensor]:
        primal = _bisect(own_X, d.X, chain.has_positive_cliques, bisections)
        dual = _bisect(S, d.S, chain.is_positive, bisections)
        return primal.minimum(_longest(s, d.s)), dual.minimum(_longest(state.y, d.y))

    none = torch.zeros_like(mu)
    d, Y = find(none)
    primal, dual = measure_steps(d, _BISECTIONS[0])
    ahead = own_X.add(primal, d.X).inner(S.add(dual, d.S)) + (
        (s + primal[:, None] * d.s) * (y + dual[:, None] * d.y[:, first:])
    ).sum(1)
    sigma = (ahead / order / mu).clamp(0.0, 1.0).square().clamp_min(1e-6)
    sigma = torch.where(primal.minimum(dual) > 0.1, sigma, 1.0)
    # What the predictor leaves of XS, its step in X times its step in S, times S⁻¹.
    G = chain.multiply(X, Y)
    corrector = chain.find_symmetric_band(X + 0.5 * (G + G.mT), Y).map(torch.neg)
    d, _ = find(sigma, (corrector, d.s * d.y[:, first:] / y))
    primal, dual = measure_steps(d, _BISECTIONS[1])
    share = 0.9 + 0.09 * primal.minimum(dual)
    primal, dual = (share * primal).clamp_max(1.0), (share * dual).clamp_max(1.0)
    bad = failed | ~d.y.isfinite().all(1) | ((primal < 1e-6) & (dual < 1e-6))
    if not bool(bad.any()):
        state.X = chain.complete(own_X.add(primal, d.X), X)
        state.s = s + primal[:, None] * d.s
        state.y = state.y + dual[:, None] * d.y
    elif len(good := (~bad).nonzero()[:, 0]):
        d, primal, dual = d.select(good), primal[good], dual[good]
        moved = own_X.map(lambda t: t[good]).add(primal, d.X)
        state.X[good] = chain.complete(moved, X[good])
        state.s[good] = s[good] + primal[:, None] * d.s
        state.y[good] = state.y[good] + dual[:, None] * d.y
    state.S = chain.read(program.assemble(state.y).add_(program.constant))
    return bad


def _factor_newton_matrix(
    program: Program, X: Tensor, Z: Tensor, ratio: Tensor
) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Return a function that solves Newton's equations, and where they have no factor."""
    XA, XB = program.multiply(X)
    ZA, ZB = program.multiply(Z)
    aXa, bXa = program.transpose_multiply(XA)
    _, bXb = program.transpose_multiply(XB)
    aZa, bZa = program.transpose_multiply(ZA)
    _, bZb = program.transpose_multiply(ZB)
    H = bXa * bZa.mT
    H += H.mT.clone()
    H.addcmul_(bXb, aZa).addcmul_(aXa, bZb)
    H.diagonal(dim1=1, dim2=2).add_(ratio)
    if program.shared:
        p = program.inputs
        border = (XA[:, :p] * ZB[:, :p] + XB[:, :p] * ZA[:, :p]).sum(1)[:, None]
        corner = (X[:, :p, :p] * Z[:, :p, :p]).sum((1, 2))[:, None, None]
        H = torch.cat([torch.cat([corner, border], 2), torch.cat([border.mT, H], 2)], 1)
    scale = H.diagonal(dim1=1, dim2=2).rsqrt()
    H *= scale[:, :, None]
    H *= scale[:, None, :]
    root, info = torch.linalg.cholesky_ex(H)

    def solve(right: Tensor) -> Tensor:
        return scale * torch.cholesky_solve((scale * right)[:, :, None], root)[:, :, 0]

    return solve, info != 0


def _longest(point: Tensor, direction: Tensor) -> Tensor:
    """Return the largest step, at most 1, after which all numbers are at least 0."""
    ratio = torch.where(direction < 0, -point / direction.clamp_max(-1e-300), torch.inf)
    return ratio.amin(1).clamp_max(1.0)


def _bisect(
    M: _Band, direction: _Band, is_positive: Callable[[_Band], Tensor], bisections: int
) -> Tensor:
    """Return nearly the largest step, at most 1, after which M is positive definite."""
    high = torch.ones(len(M.diagonal[0]), dtype=torch.float64, device=M.diagonal[0].device)
    low = is_positive(M.add(high, direction)).to(high.dtype)
    if bool(low.all()):
        return low
    step = 0.5 * high
    for _ in range(bisections):
        good = is_positive(M.add(step, direction))
        low, high = torch.where(good, step.maximum(low), low), torch.where(good, high, step)
        step = 0.5 * (low + high)
    return low

"""Which global Lipschitz bound does a feed-forward network have? A proof, block after block.

Symbols: docs/glossary.md, and lben/weights/network.py for blocks. Let e be the increment of the
pre-activations v_k of a block between two inputs, and r the increment of its states z_k. All chords
of its activation have slopes in [α, β], so (rᵢ − αeᵢ)(βeᵢ − rᵢ) ≥ 0 in every unit. With
multipliers λᵢ > 0,

    Q_k = 2 Σᵢ λᵢ (rᵢ² − (α + β) rᵢeᵢ + αβ eᵢ²) = −2 Σᵢ λᵢ (rᵢ − αeᵢ)(βeᵢ − rᵢ) ≤ 0.

Let c_k be the increments of all states that are read after block k: the frontier
(lben/weights/grouping.py). A storage N_k is a quadratic form of c_k.

Theorem. Let N₀ = γ²‖Δx‖², let N_K = ‖FΔy‖² for a matrix F, and let for k = 1 … K

    L_k = N_{k−1}(c_{k−1}) + Q_k(c_{k−1}, Δz_k) − N_k(c_k) ≥ 0   for all numbers c_{k−1}, Δz_k.

Then ‖FΔy‖₂ ≤ γ‖Δx‖₂ for any two inputs.

Proof. The sum of all L_k is γ²‖Δx‖² − ‖FΔy‖² + Σ Q_k ≥ 0, and Q_k ≤ 0 for increments. ∎

If α = β, then r = αe. So L_k is a form of c_{k−1} alone, and the block needs no multiplier.

For a chain, each L_k is a matrix of two neighbouring layers. Conversely, if the matrix of the sum
is positive definite (it is γM(Λ, γ) for λ = γΛ and slopes in [0, 1]), then there are storages: the
least N_{k−1} for a given N_k is a Schur complement. So a bound that the n × n matrix proves is also
proved here, at the cost of depth · width³.

Note [Storages]
Let L_k be the matrix [N + A, B; Bᵀ, P], where N is the storage before, and P ⪰ pI with p > 0. Let S
be any matrix near BP⁻¹, and X = B − SP. A congruence with [I, −S; 0, I] turns L_k into
[N − M, X; Xᵀ, P] with M = SBᵀ + XSᵀ − A. So L_k ⪰ 0 if N ⪰ M + (‖X‖²/p)I. A, B and P are enclosed,
hence M is. N is then chosen as a matrix of float64 numbers: the midpoint of M, plus a diagonal that
makes N − M diagonally dominant. It is about as large as the rounding in M. Nothing about N is
believed: the next block is proved with exactly these numbers.

Note [Units]
The states of each unit are measured in a power of two near λ^(−½), those of a block without λ in
one near the square root of its storage, x in one for which γ is near 1. This is a congruence of
each L_k that rounds nothing. Without it, bounds far from 1, deep networks and layers of very
different scale could not be proved.

Reference:
    Fazlyab, Robey, Hassani, Morari and Pappas (2019), "Efficient and accurate estimation of
    Lipschitz constants for deep neural networks", Theorem 2. The block-by-block form is that of
    dissipativity: Willems (1972), "Dissipative dynamical systems", part I.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import scipy.linalg
import torch
from numpy.typing import NDArray

from lben.certificates.certificate import (
    CertificateError,
    LipschitzCertificate,
    PairCertificate,
)
from lben.certificates.proof import numbers_of
from lben.rigorous import (
    TINY,
    UNIT,
    Array,
    Enclosure,
    block,
    down,
    norm_bound,
    smallest_eigenvalue_bound,
    solve,
    sum_up,
    up,
)
from lben.weights import check_gamma, digest
from lben.weights.network import Network

Exponents = NDArray[np.int64]

METHOD = "storages block after block, by Schur complements enclosed in float64"
"""How the bound of a network is proved."""
_RANGE = 1000
"""Units lie within 2^±1000."""
_TRIES = 27
"""How often the share by which a bound exceeds the computed one is enlarged fourfold."""
_SPREAD = 20
"""The largest exponent by which units of the states of a block count as different."""
_LEAST = 2.0**-400
"""λ, near enough to 0, of states that no output depends on."""
_UNREAD = 200
"""The unit of states that no number reads: so what is added to their storage is small."""
_UNSEEN = -(2**40)
"""The exponent of zero."""


@dataclass(frozen=True, kw_only=True, eq=False)
class NetworkClaim:
    """The claim that a network, or some rows of its outputs, is γ-Lipschitz in l2.

    Attributes:
        gamma: γ; None asks for the least bound that the multipliers prove.
        multipliers: Λ_k of each block, one positive number for each unit; no numbers for a block
            whose slopes are all the same. The λ of the theorem are Λ_k · 2^{exponents_k}.
        exponents: whole numbers, one for each block; zeros when omitted. Deep networks need them,
            because λ may leave the range of float64.
        gap: how far γ may be above the least bound that any multipliers show, relative to γ; None
            where it is not known. It is the estimate of whoever proposes the claim.
        steps: Newton steps that the proposal took, for reports; None where there were none.

    Example:
        >>> import numpy as np
        >>> from lben.certificates.network import NetworkClaim, prove_network
        >>> from lben.weights.activation import RELU
        >>> from lben.weights.network import AffineMap, Block, Network
        >>> first = AffineMap.of({0: np.array([[3.0]])}, np.zeros(1))
        >>> output = AffineMap.of({1: np.array([[0.5]])}, np.zeros(1))
        >>> network = Network(
        ...     input_shape=(1,), blocks=(Block(affine=first, activation=RELU),), output=output
        ... )  # 0.5σ(3x)
        >>> claim = NetworkClaim(gamma=None, multipliers=(np.array([0.25]),))
        >>> round(prove_network(network, claim).bound, 6)
        1.5
    """

    gamma: float | None
    multipliers: tuple[Array, ...]
    exponents: tuple[int, ...] | None = None
    gap: float | None = None
    steps: int | None = None

    @classmethod
    def from_logarithms(cls, gamma: float | None, logarithms: Sequence[Array]) -> NetworkClaim:
        """Return the claim with multipliers λ = exp of the numbers given, which may be of any size.

        Args:
            gamma: γ or None.
            logarithms: log λ of each block, finite. Within a block a λ that is smaller than the
                largest by more than 2^1000 counts as that.

        Example:
            >>> import numpy as np
            >>> claim = NetworkClaim.from_logarithms(None, [np.array([2000.0, 2000.0])])
            >>> claim.exponents, claim.multipliers[0].round(3).tolist()
            ((2886,), [0.655, 0.655])
        """
        in_twos = [np.asarray(own, dtype=np.float64) / math.log(2.0) for own in logarithms]
        exponents = [math.ceil(np.max(own)) if own.size else 0 for own in in_twos]
        values = [
            np.exp2(np.maximum(own - exponent, -_RANGE))
            for own, exponent in zip(in_twos, exponents, strict=True)
        ]
        return cls(gamma=gamma, multipliers=tuple(values), exponents=tuple(exponents))


@dataclass(frozen=True, kw_only=True, eq=False)
class Storage:
    """A quadratic form N_k of the states in a frontier; see Note [Units].

    Attributes:
        blocks: of the frontier, increasing.
        units: for each of them, the exponent of the power of two that is the unit of each state.
        form: the matrix.
    """

    blocks: tuple[int, ...]
    units: Mapping[int, Exponents]
    form: Enclosure

    @classmethod
    def of_output(
        cls, network: Network, rows: Array | None, unit: int, known: Mapping[int, Exponents]
    ) -> Storage:
        """Return N_K = ‖FΔy‖²/4^a.

        Args:
            network: with outputs y.
            rows: F; the identity for None.
            unit: a.
            known: units of some blocks; others are chosen.
        """
        blocks = tuple(sorted(network.output.matrices))
        maps = {j: _read_output(network, rows, j) for j in blocks}
        row_units = np.full(next(iter(maps.values())).mid.shape[0] if maps else 0, unit)
        units = {j: _choose_units(maps[j].mid, row_units, j, known) for j in blocks}
        C = _join([_to_units(maps[j], row_units, units[j]) for j in blocks], len(row_units))
        return cls(blocks=blocks, units=units, form=C.T @ C)

    def restrict(self, k: int) -> Array:
        """Return the midpoint of the form of the states of one block alone."""
        start = sum(len(self.units[j]) for j in self.blocks if j < k)
        own = slice(start, start + len(self.units[k]))
        return self.form.mid[own, own]

    def dominate(self, k: int) -> Array:
        """Return λ of a block, near the least Λ ⪰ N that is the same for all of its states.

        Units of states that differ by more than 2^20 count as 2^20. In the units of the storage.
        """
        units = self.units[k]
        same = np.ldexp(1.0, (units - int(np.median(units))).clip(-_SPREAD, _SPREAD))
        scaled = self.restrict(k) / np.multiply.outer(same, same)
        norm = float(np.linalg.norm(scaled, 2)) if np.isfinite(scaled).all() else math.nan
        return same**2 * (norm if norm > 0 else _LEAST)


@dataclass(frozen=True, kw_only=True, eq=False)
class Step:
    """L_k without N_{k−1}: a matrix of the frontier before block k, c numbers, and of its n states.

    Attributes:
        index: k.
        blocks, units: as of a storage, before the block.
        corner: c × c.
        side: c × n; n = 0 for a block whose states are multiples of its pre-activations.
        pivot: n × n.
        free: which of the c numbers have units that no multiplier has chosen.
    """

    index: int
    blocks: tuple[int, ...]
    units: Mapping[int, Exponents]
    corner: Enclosure
    side: Enclosure
    pivot: Enclosure
    free: NDArray[np.bool_]

    def propose_least(self) -> Array:
        """Return the least storage before the block, rounded: a Schur complement.

        Raises:
            CertificateError: if the pivot is not positive definite.
        """
        least = -self.corner.mid
        if self.pivot.mid.size:
            least = least + self.side.mid @ _solve(self.pivot.mid, self.side.mid.T, self.index)
        return np.asarray(0.5 * (least + least.T))

    def change_units(self, shifts: Exponents) -> Step:
        """Return the same inequality with the frontier in units 2^shifts times as large."""
        powers = np.ldexp(1.0, shifts)
        ends = np.cumsum([len(self.units[j]) for j in self.blocks])
        moved = zip(self.blocks, np.split(shifts, ends)[:-1], strict=True)
        return replace(
            self, units={j: self.units[j] + shift for j, shift in moved},
            corner=self.corner.scale(powers, powers),
            side=self.side.scale(powers, np.ones(self.side.mid.shape[1])),
        )  # fmt: skip

    @cached_property
    def reduced(self) -> tuple[Enclosure, float]:
        """M + (‖X‖²/p)I, and p; see Note [Storages].

        Raises:
            CertificateError: if the pivot is not proved to be positive definite.
        """
        if not self.pivot.mid.size:
            return -self.corner, math.inf
        least = smallest_eigenvalue_bound(self.pivot)
        if not least > 0:
            raise _refuse_pivot(self.index)
        factor = Enclosure(_solve(self.pivot.mid, self.side.mid.T, self.index).T)
        rest = self.side - factor @ self.pivot
        sizes = rest.magnitude
        square = up(float(np.max(sum_up(sizes, 0))) * float(np.max(sum_up(sizes, 1), initial=0.0)))
        identity = Enclosure(np.eye(len(self.corner.mid)))
        form = factor @ self.side.T + rest @ factor.T - self.corner
        return form + _number(up(square / least)) * identity, least

    def prove_storage(self) -> tuple[Enclosure, float]:
        """Return a storage before the block, and a proved lower bound of eigenvalues.

        Raises:
            CertificateError: if there is none.
        """
        form, least = self.reduced
        mid = np.triu(form.mid) + np.triu(form.mid, 1).T
        slack = 4 * sum_up((Enclosure(mid) - form).magnitude, 1) + TINY
        storage = Enclosure(mid + np.diag(slack))
        rest = storage - form
        off = rest.magnitude
        np.fill_diagonal(off, 0.0)
        outside = (np.diag(rest.radius) + sum_up(off, 1)) * (1 + 8 * UNIT)
        inside = np.diag(rest.mid) * (1 - 8 * UNIT) - outside
        margin = down(float(np.min(inside, initial=math.inf)))
        if not margin > 0:
            raise CertificateError(
                f"no storage before block {self.index} could be proved, with margin {margin:.3g}: "
                "numbers leave the range of float64. Try weights scaled towards 1."
            )
        return storage, min(margin, least)

    def compute_gain(self) -> float:
        """Compute the least γ with L₁ ⪰ 0, in units of x and y; for information, not proved."""
        return _root_of_largest(self.propose_least())

    def prove_gain(self, gamma: float) -> float:
        """Return the margin of L₁ for a bound γ in units of x and y."""
        form, least = self.reduced
        identity = Enclosure(np.eye(len(form.mid)))
        return min(smallest_eigenvalue_bound(_square(gamma) * identity - form), least)


@dataclass(frozen=True, kw_only=True, eq=False)
class WideStep:
    """L₁ without γ²‖Δx‖², for more inputs than units: no p × p matrix is formed.

    L₁ is definite if and only if its Schur complement in the states is and γ²I + Vᵀ(2αβΛ)V is
    positive definite. The complement is, with G = (α + β)Λ,

        2Λ − N₁ − G H G,   H = V(γ²I + Vᵀ(2αβΛ)V)⁻¹Vᵀ = (γ²I + VVᵀ(2αβΛ))⁻¹VVᵀ.

    Attributes:
        index: k.
        blocks, units: of the input.
        rows: V, n × p.
        Lambda: n × 1.
        pivot: 2Λ − N₁.
        slopes: α and β.
    """

    index: int
    blocks: tuple[int, ...]
    units: Mapping[int, Exponents]
    rows: Enclosure
    Lambda: Enclosure
    pivot: Enclosure
    slopes: tuple[float, float]

    @cached_property
    def gram(self) -> Enclosure:
        """VVᵀ."""
        return self.rows @ self.rows.T

    def change_units(self, shifts: Exponents) -> WideStep:
        """Return the same inequality with the input in units 2^shifts times as large."""
        ones = np.ones(self.rows.mid.shape[0])
        return replace(
            self, units={j: unit + shifts for j, unit in self.units.items()},
            rows=self.rows.scale(ones, np.ldexp(1.0, shifts)),
        )  # fmt: skip

    def compute_gain(self) -> float:
        """Compute the least γ with L₁ ⪰ 0, in units of x and y; for information, not proved."""
        low, high = self.slopes
        G = (low + high) * self.Lambda.mid[:, 0]
        inner = G[:, None] * _solve(self.pivot.mid, np.diag(G), self.index)
        inner = inner - np.diag(2 * low * high * self.Lambda.mid[:, 0])
        if not np.isfinite(self.gram.mid).all():
            return math.inf
        values, vectors = np.linalg.eigh(self.gram.mid)
        root = vectors * np.sqrt(np.maximum(values, 0.0))
        return _root_of_largest(root.T @ inner @ root)

    def prove_gain(self, gamma: float) -> float:
        """Return the margin of the Schur complement for a bound γ in units of x and y."""
        low, high = (_number(slope) for slope in self.slopes)
        square, product = _square(gamma), low * high * _number(2.0)
        if not (self.slopes[0] and self.slopes[1]):
            H = self.gram * square.reciprocal()
        else:
            if self.slopes[0] < 0 < self.slopes[1]:
                reach = norm_bound(self.Lambda.sqrt() * self.rows)
                left = square - _number(reach) * _number(reach) * -product
                if not left.mid[0, 0] - left.radius[0, 0] > 0:
                    return -math.inf
            identity = Enclosure(np.eye(self.pivot.mid.shape[0]))
            try:
                H = solve(square * identity + self.gram * (product * self.Lambda).T, self.gram)
            except ValueError:
                return -math.inf
        G = (low + high) * self.Lambda
        return smallest_eigenvalue_bound(self.pivot - G * H * G.T)


def take_step(
    network: Network,
    k: int,
    after: Storage,
    Lambda: Array | None,
    known: Mapping[int, Exponents],
) -> Step | WideStep:
    """Return L_k without N_{k−1}, for the storage after block k.

    Args:
        network: with blocks z_1 … z_K.
        k: of the block, which is in the frontier of the storage.
        after: N_k.
        Lambda: λ of the block in units of the storage; None for a block with one slope.
        known: units of some blocks; others that enter the frontier are chosen.
    """
    own, others = network.blocks[k - 1], [j for j in after.blocks if j != k]
    blocks = tuple(sorted({*others, *own.affine.matrices}))
    parts, units = [], {}
    for j in blocks:
        if j in own.affine.matrices:
            part = own.affine.enclosure(j)
        else:
            part = Enclosure(np.zeros((own.affine.units, network.widths[j])))
        fresh = _choose_units(part.mid, after.units[k], j, known)
        units[j] = after.units[j] if j in others else fresh
        parts.append(_to_units(part, after.units[k], units[j]))
    V = _join(parts, own.affine.units)
    chosen = [np.full(len(units[j]), j in known) for j in blocks]
    free = ~np.concatenate([np.zeros(0, np.bool_), *chosen])
    low, high = own.activation.low, own.activation.high
    c, (N, N_side, N_own) = V.mid.shape[1], _embed(after, blocks, k, network)
    if Lambda is None:
        T = _number(low) * V
        mixed = N_side @ T
        corner = -(N + mixed + mixed.T + T.T @ (N_own @ T))
        nothing = Enclosure(np.zeros((c, 0)))
        return Step(
            index=k, blocks=blocks, units=units, corner=corner, side=nothing, free=free,
            pivot=Enclosure(np.zeros((0, 0))),
        )  # fmt: skip
    weights = Enclosure(Lambda[:, None])
    pivot = Enclosure(np.diag(2 * Lambda)) - N_own
    if blocks == (0,) and not others and c > len(Lambda):
        return WideStep(
            index=k, blocks=blocks, units=units, rows=V, Lambda=weights, pivot=pivot,
            slopes=(low, high),
        )  # fmt: skip
    corner = -N
    if low and high:
        corner = corner + V.T @ (_number(low) * _number(high) * _number(2.0) * weights * V)
    side = -((_number(low) + _number(high)) * weights * V).T - N_side
    return Step(
        index=k,
        blocks=blocks,
        units=units,
        corner=corner,
        side=side,
        pivot=pivot,
        free=free,
    )


def choose_output_unit(network: Network, rows: Array | None) -> int:
    """Return a, the exponent of a power of two near the largest number with which y is read."""
    maps = [_read_output(network, rows, j).mid for j in network.output.matrices]
    largest = max((float(np.max(np.abs(C), initial=0.0)) for C in maps), default=0.0)
    return math.frexp(largest)[1] if TINY <= largest < math.inf else 0


def get_input_unit(step: Step | WideStep) -> int:
    """Return the exponent of the unit of the inputs; 0 if the frontier does not have them."""
    return int(step.units[0][0]) if len(step.units.get(0, ())) else 0


def renew_units(step: Step, least: Array) -> tuple[Step, Array]:
    """Return a step and its least storage in units in which the storage is near 1.

    Args:
        step: whose free units are chosen anew.
        least: c × c, as it proposes.
    """
    diagonal = np.diag(least)
    seen = (diagonal >= TINY) & (diagonal < math.inf)
    exponents = np.where(seen, _exponents(np.where(seen, diagonal, 1.0)), _UNSEEN)
    inputs = len(step.units.get(0, ()))  # they share one unit, and come first
    exponents[:inputs] = np.max(exponents[:inputs], initial=_UNSEEN)
    shifts = np.where(step.free & (exponents > _UNSEEN), -(exponents // 2), 0)
    powers = np.ldexp(1.0, shifts)
    return step.change_units(shifts), least * np.multiply.outer(powers, powers)


def prove_network(
    network: Network, claim: NetworkClaim | None = None, rows: Array | None = None
) -> LipschitzCertificate:
    """Prove the bound of a network by storages, or raise; see the theorem of this file.

    Args:
        network: whose numbers are float64.
        claim: γ and multipliers; with γ None the least bound that they prove. When omitted, the
            least bound of multipliers that always exist: Λ_k = ‖N‖₂I for the storage N of block k.
            It is near or below the product of the layers' norms; `lben.tightening` proposes better.
        rows: F, m × q: the bound is of x ↦ Fy, such as one output or a difference of two. All
            outputs when omitted.

    Returns:
        The certificate. It is tied to the network, or to the network and F.

    Raises:
        ValueError: for a claim or rows of another size.
        CertificateError: if the bound is not proved, or multipliers are not positive.

    Example:
        >>> import numpy as np
        >>> from lben.certificates.network import NetworkClaim, prove_network
        >>> from lben.weights.activation import RELU
        >>> from lben.weights.network import AffineMap, Block, Network
        >>> W, C = np.array([[1.0], [-1.0]]), np.array([[1.0, 1.0]])
        >>> block = Block(affine=AffineMap.of({0: W}, np.zeros(2)), activation=RELU)
        >>> network = Network(
        ...     input_shape=(1,), blocks=(block,), output=AffineMap.of({1: C}, np.zeros(1))
        ... )  # |x| = σ(x) + σ(−x)
        >>> claim = NetworkClaim(gamma=2.01, multipliers=(np.full(2, 2.0),))
        >>> prove_network(network, claim).bound  # the multipliers do not see that 1 is enough
        2.01
    """
    gamma = None if claim is None else check_gamma(claim.gamma)
    rows, multipliers = _check_rows(network, rows), _check_multipliers(network, claim)
    with np.errstate(all="ignore"):  # what leaves the range is found not to be finite
        bound, margin = _prove_blocks(network, multipliers, gamma, rows)
    return LipschitzCertificate(
        bound=bound, margin=margin, dtype="float64", method=METHOD,
        fingerprint=fingerprint_rows(network, rows),
    )  # fmt: skip


def prove_network_pairs(
    network: Network, claims: Mapping[tuple[int, int], NetworkClaim]
) -> PairCertificate:
    """Prove a bound of yᵢ − yⱼ for every pair of outputs of a network, or raise.

    Args:
        network: whose numbers are float64.
        claims: for every pair of outputs i < j, as `prove_network` takes them.

    Returns:
        The l2 bounds of all pairs.

    Raises:
        ValueError: if a pair has no claim, and as `prove_network` does.
        CertificateError: if a bound is not proved.
    """
    q = network.out_features
    bounds, margins = [[1.0] * q for _ in range(q)], []
    for i in range(q):
        for j in range(i + 1, q):
            if (i, j) not in claims:
                raise ValueError(f"no bound is claimed for the outputs {i} and {j}")
            row = np.zeros((1, q))
            row[0, i], row[0, j] = 1.0, -1.0
            found = prove_network(network, claims[i, j], row)
            bounds[i][j] = bounds[j][i] = found.bound
            margins.append(found.margin)
    known = [margin for margin in margins if margin is not None]
    return PairCertificate(
        bounds=tuple(map(tuple, bounds)), norm="l2", margin=min(known, default=None),
        fingerprint=network.fingerprint, dtype="float64", method=METHOD,
    )  # fmt: skip


def fingerprint_rows(network: Network, rows: Array | None) -> str:
    """Return the fingerprint of x ↦ Fy: the network's own where F is omitted."""
    if rows is None:
        return network.fingerprint
    return digest(f"rows of {network.fingerprint}", {"F": torch.from_numpy(rows)})


def _prove_blocks(
    network: Network,
    multipliers: Mapping[int, _Multiplier],
    gamma: float | None,
    rows: Array | None,
) -> tuple[float, float | None]:
    """Return the bound, and the least margin of all blocks."""
    unit = choose_output_unit(network, rows)
    known = {k: m.choose_units(unit) for k, m in multipliers.items()}
    storage, least = Storage.of_output(network, rows, unit, known), math.inf
    for k in range(len(network.blocks), 0, -1):
        if k not in storage.blocks:
            continue  # no output depends on the block
        if is_linear(network, k):
            Lambda = None
        elif k in multipliers:
            Lambda = multipliers[k].scale(known[k], unit)
        else:
            Lambda = storage.dominate(k)
        step = take_step(network, k, storage, Lambda, known)
        if step.blocks in ((), (0,)):
            bound, margin = _prove_first(step, gamma, unit)
            least = min(margin, least)
            return bound, least if least < math.inf else None  # infinite: there were no rows
        assert isinstance(step, Step)  # a wide one is the first
        if step.free.any():
            step, _ = renew_units(step, step.propose_least())
        form, margin = step.prove_storage()
        storage = Storage(blocks=step.blocks, units=step.units, form=form)
        least = min(least, margin)
    return _prove_affine(network, gamma, rows), None


def _prove_first(step: Step | WideStep, gamma: float | None, unit: int) -> tuple[float, float]:
    """Return γ, given or found, and the margin of the inequality of the first block."""
    inputs = step.units.get(0, np.zeros(0, np.int64))
    computed = _scale_up(step.compute_gain(), unit - get_input_unit(step))
    least = max(computed, math.ldexp(1.0, -_RANGE))
    share = 4 * UNIT * (len(step.pivot.mid) + len(inputs))
    bounds = [gamma] if gamma is not None else [least * (1 + share * 4**i) for i in range(_TRIES)]
    exponent = math.frexp(bounds[0])[1] - 1
    scaled = step.change_units(unit - exponent - inputs)
    for bound in bounds:
        margin = scaled.prove_gain(math.ldexp(bound, -exponent))
        if margin > 0 and TINY <= bound < math.inf:
            return bound, margin
    raise CertificateError(
        f"the Lipschitz bound γ = {bound:g} could not be proved: the multipliers allow about "
        f"{computed:g}, and the proved lower bound {margin:.3e} of the smallest eigenvalue at the "
        "first block is not positive. Causes: another network than that of the claim, a γ that is "
        "too small, or numbers that leave the range of float64. Try gamma=None, which finds γ."
    )


def _prove_affine(network: Network, gamma: float | None, rows: Array | None) -> float:
    """Return γ for outputs without units, given or found, from ‖FD‖₂."""
    least = TINY
    for j in network.output.matrices:  # the input, or none
        least = max(norm_bound(_read_output(network, rows, j)), TINY)
    bound = least if gamma is None else gamma
    if not least <= bound < math.inf:
        raise CertificateError(
            f"the Lipschitz bound γ = {bound:g} could not be proved: the network is affine, and "
            f"its norm is at most {least:g}. Try gamma=None, which finds γ."
        )
    return bound


@dataclass(frozen=True, kw_only=True, eq=False)
class _Multiplier:
    """λ = values · 2^exponent of one block."""

    values: Array
    exponent: int

    def choose_units(self, unit: int) -> Exponents:
        """Return units in which λ is near 1, for y in units of 2^unit."""
        units = (2 * unit - _exponents(self.values) - self.exponent) // 2
        return np.asarray(units.clip(-_RANGE, _RANGE), dtype=np.int64)

    def scale(self, units: Exponents, unit: int) -> Array:
        """Return λ in these units.

        Raises:
            CertificateError: if a number leaves the range.
        """
        shift = self.exponent + 2 * (units - unit)
        scaled = np.ldexp(self.values, shift.clip(-(2**20), 2**20))
        if not ((scaled >= TINY) & (scaled < math.inf)).all():
            raise CertificateError(
                f"λ must lie within about 2^±{2 * _RANGE} of 1 in the units of the network, got "
                f"numbers near {self.values.max():.3g} · 2^{self.exponent}: scale the weights"
            )
        return np.asarray(scaled)


def is_linear(network: Network, k: int) -> bool:
    """Say whether all slopes of block k are the same, so that it needs no multiplier."""
    activation = network.blocks[k - 1].activation
    return activation.low == activation.high


def _check_multipliers(network: Network, claim: NetworkClaim | None) -> dict[int, _Multiplier]:
    """Return the multipliers of a claim by block; none without a claim."""
    if claim is None:
        return {}
    count = len(network.blocks)
    exponents = (0,) * count if claim.exponents is None else tuple(claim.exponents)
    if not len(claim.multipliers) == len(exponents) == count:
        raise ValueError(
            f"the network has {count} blocks, and the claim has multipliers for "
            f"{len(claim.multipliers)} and exponents for {len(exponents)} of them"
        )
    found = {}
    for k, own in enumerate(network.blocks, 1):
        size, name = 0 if is_linear(network, k) else own.affine.units, f"multipliers of block {k}"
        values = numbers_of(name, claim.multipliers[k - 1], size)
        if not ((values >= TINY) & (values < math.inf)).all():
            raise CertificateError(
                f"the {name} must be positive: finite numbers from {TINY:.3g}, the least is "
                f"{values.min():.3g}"
            )
        if not is_linear(network, k):
            found[k] = _Multiplier(values=values, exponent=operator.index(exponents[k - 1]))
    return found


def _check_rows(network: Network, rows: Array | None) -> Array | None:
    if rows is None:
        return None
    rows = np.ascontiguousarray(rows, dtype=np.float64)
    if rows.ndim != 2 or rows.shape[1] != network.out_features or not np.isfinite(rows).all():
        raise ValueError(
            f"rows must be finite numbers, m × {network.out_features} for that many outputs, got "
            f"shape {rows.shape}"
        )
    return rows


def _read_output(network: Network, rows: Array | None, j: int) -> Enclosure:
    """Return FC_j."""
    C = network.output.enclosure(j)
    return C if rows is None else Enclosure(rows) @ C


def _choose_units(
    matrix: Array, row_units: Exponents, j: int, known: Mapping[int, Exponents]
) -> Exponents:
    """Return units of the states of block j in which the columns of a matrix are near 1."""
    if j in known:
        return known[j]
    sizes = _exponents(matrix) - row_units[:, None]
    sizes = np.max(np.where(matrix != 0, sizes, _UNSEEN), axis=0, initial=_UNSEEN)
    if j == 0:
        sizes[:] = np.max(sizes, initial=_UNSEEN)
    units = np.where(sizes == _UNSEEN, _UNREAD, -sizes).clip(-_RANGE, _RANGE)
    return np.asarray(units, dtype=np.int64)


def _to_units(matrix: Enclosure, rows: Exponents, columns: Exponents) -> Enclosure:
    return matrix.scale(np.ldexp(1.0, -rows), np.ldexp(1.0, columns))


def _join(parts: list[Enclosure], rows: int) -> Enclosure:
    return block([parts]) if parts else Enclosure(np.zeros((rows, 0)))


def _embed(
    after: Storage, before: tuple[int, ...], k: int, network: Network
) -> tuple[Enclosure, Enclosure, Enclosure]:
    """Return the parts of N_k, zero where it has no state: c × c, c × n and n × n."""
    widths = [network.widths[j] for j in (*before, k)]
    starts = dict(zip((*before, k), np.cumsum([0, *widths[:-1]]), strict=True))
    place = np.concatenate([starts[j] + np.arange(network.widths[j]) for j in after.blocks])
    mid, radius = np.zeros((2, sum(widths), sum(widths)))
    mid[np.ix_(place, place)] = after.form.mid
    radius[np.ix_(place, place)] = after.form.radius
    c = sum(widths[:-1])
    cuts = [(slice(c), slice(c)), (slice(c), slice(c, None)), (slice(c, None), slice(c, None))]
    first, side, own = (Enclosure(mid[cut], radius[cut]) for cut in cuts)
    return first, side, own


def _solve(pivot: Array, B: Array, index: int) -> Array:
    """Return P⁻¹B, rounded."""
    R, info = scipy.linalg.lapack.dpotrf(pivot, lower=0, clean=1)
    if info != 0 or not np.isfinite(R).all():
        raise _refuse_pivot(index)
    return np.asarray(scipy.linalg.cho_solve((R, False), B, check_finite=False))


def _refuse_pivot(index: int) -> CertificateError:
    return CertificateError(
        f"the multipliers prove no bound: the matrix 2Λ − N of block {index} is not positive "
        "definite. Causes: multipliers of another network, multipliers that are too small for "
        "those of later blocks, or weights that are not finite."
    )


def _root_of_largest(matrix: Array) -> float:
    """Return √λmax, at least 0; inf for a matrix that is not finite."""
    if not np.isfinite(matrix).all():
        return math.inf
    return math.sqrt(float(np.max(np.linalg.eigvalsh(matrix), initial=0.0)))


def _exponents(values: Array) -> Exponents:
    return np.asarray(np.frexp(values)[1], dtype=np.int64)


def _scale_up(value: float, exponent: int) -> float:
    """Return value · 2^exponent, inf where it leaves the range."""
    try:
        return math.ldexp(value, exponent)
    except OverflowError:
        return math.inf


def _number(value: float) -> Enclosure:
    return Enclosure(np.full((1, 1), value))


def _square(value: float) -> Enclosure:
    return _number(value) * _number(value)

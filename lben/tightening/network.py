"""Which multipliers prove the least global bound of a feed-forward network?

Symbols: docs/glossary.md; lben/weights/network.py for blocks; lben/tightening/primal_dual.py for
the program, which is block tridiagonal in groups of blocks (lben/weights/grouping.py).

Note [Start]
The recursion over layers (lben/tightening/recursion.py) has multipliers Λ_k, so that 2Λ_k ≻ N_k for
the storage N_k after each block. So it proves a bound for every network. Its N_{k−1} is the least
storage, and the start of an interior-point method needs some slack: from the last block to the
first, Λ_k is enlarged by a factor c, c², c³ …. Since a storage that is c times as large has the
multiplier c times as large, each storage is then the factor c above the least.

Note [Units of a program]
At the start every unit is measured in λ^(−½), the input in γ^(−1): then all multipliers and τ are
near 1, however deep the network and however small its bound.

Everything here proposes; `lben.certificates` proves.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import torch

from lben.certificates.network import NetworkClaim, is_linear, prove_network
from lben.rigorous import Array
from lben.tightening import primal_dual
from lben.tightening.recursion import propose_network_claim
from lben.weights.grouping import group_blocks
from lben.weights.network import AffineMap, Block, Matrix, Network, to_dense

_GROWTH = 1.02
"""c of Note [Start]."""
_MULTIPLIER_SHARE = 1e-3
"""Of the accuracy: a price of λ, which keeps those finite that nothing moves."""
_IRRELEVANT = -600.0
"""log λ for blocks on which no output depends: the smaller, the less they add to γ."""
_FIRST_TAU = 1.05
"""τ of the start, in the units of the program."""


def tighten_network(
    network: Network, rows: Array | None = None, *, gap: float = 1e-7, max_steps: int = 60
) -> NetworkClaim:
    """Propose the multipliers that prove the least bound γ of ‖FΔy‖₂: the LipSDP bound.

    Args:
        network: a feed-forward network with finite numbers.
        rows: F, m × q: for the bound of x ↦ Fy. All outputs when omitted.
        gap: relative accuracy of γ².
        max_steps: bound of the number of Newton steps.

    Returns:
        A claim without γ, since the proof finds the least bound of its multipliers. Its gap tells
        how far that bound may be above the least of all multipliers; it is not proved.

    Raises:
        CertificateError: if numbers are not finite, or leave the range of float64 on the way.

    Warns:
        UserWarning: if the accuracy was not reached; the gap of the claim is then larger.

    Reference:
        Fazlyab, Robey, Hassani, Morari and Pappas (2019), Theorem 2, for the program.

    Example:
        Layers 2x and then 0.5x have the bound 1 together.

        >>> import numpy as np
        >>> from lben.certificates.network import prove_network
        >>> from lben.tightening.network import tighten_network
        >>> from lben.weights.activation import RELU
        >>> from lben.weights.network import AffineMap, Block, Network
        >>> first = AffineMap.of({0: np.array([[2.0]])}, np.zeros(1))
        >>> network = Network(
        ...     input_shape=(1,), blocks=(Block(affine=first, activation=RELU),),
        ...     output=AffineMap.of({1: np.array([[0.5]])}, np.zeros(1)),
        ... )
        >>> claim = tighten_network(network)
        >>> round(prove_network(network, claim).bound, 4), claim.gap < 1e-6
        (1.0, True)
    """
    reduced = _Reduced.of(network, rows)
    if not reduced.network.blocks:
        return reduced.restore(network, [], gap=0.0, steps=0)
    start = _Start.of(reduced.network)
    n = reduced.network.units
    program = replace(
        _build_program(_rescale(reduced.network, start)),
        prices=torch.full((1, n), _MULTIPLIER_SHARE * gap / n, dtype=torch.float64, device="cpu"),
    )
    y = torch.ones(1, 1 + n, dtype=torch.float64, device="cpu")
    y[0, 0] = _FIRST_TAU
    found = primal_dual.minimise(program, y, gap=gap, max_steps=max_steps)
    if not bool(found.converged[0]):
        warnings.warn(
            f"the semidefinite program ended after {found.steps} steps with a relative gap of "
            f"{float(found.gap[0]):.1g} in γ², where {gap:.1g} was asked for: the bound is valid "
            "once it is proved, and may not be the least",
            stacklevel=2,
        )
    parts = np.split(found.y[0, 1:].numpy(), np.cumsum(reduced.network.widths[1:-1]))
    logs = [own + np.log(part) for own, part in zip(start.log_multipliers, parts, strict=True)]
    return reduced.restore(network, logs, gap=0.5 * float(found.gap[0]), steps=found.steps)


def tighten_network_pairs(
    network: Network, *, gap: float = 1e-4, max_steps: int = 60
) -> dict[tuple[int, int], NetworkClaim]:
    """Propose multipliers for the difference of every two outputs, one program for each.

    Args:
        network: a feed-forward network with finite numbers.
        gap: relative accuracy of γ² of each pair.
        max_steps: bound of the number of Newton steps of each.

    Returns:
        For every (i, j), i < j, a claim without γ of yᵢ − yⱼ, which `certify` proves.

    Raises:
        CertificateError: as `tighten_network`.

    Example:
        >>> import numpy as np
        >>> from lben import certify
        >>> from lben.tightening import tighten_network_pairs
        >>> from lben.weights.activation import RELU
        >>> from lben.weights.network import AffineMap, Block, Network
        >>> hidden = Block(affine=AffineMap.of({0: np.eye(2)}, np.zeros(2)), activation=RELU)
        >>> network = Network(
        ...     input_shape=(2,), blocks=(hidden,), output=AffineMap.of({1: np.eye(2)}, np.zeros(2))
        ... )
        >>> pairs = certify(network, tighten_network_pairs(network))
        >>> round(pairs[0][1], 3)  # σ(x₁) − σ(x₂)
        1.414
    """
    identity = np.eye(network.out_features)
    return {
        (i, j): tighten_network(
            network, identity[i : i + 1] - identity[j : j + 1], gap=gap, max_steps=max_steps
        )
        for i in range(network.out_features)
        for j in range(i + 1, network.out_features)
    }


@dataclass(frozen=True, kw_only=True, eq=False)
class _Reduced:
    """What the program sees of a network: FΔy, by units with several slopes, near 1 in size.

    Blocks of one slope are part of the maps that read them; blocks on which FΔy does not depend are
    gone; the input has coordinates in a basis of the rows that read it.

    Attributes:
        network: without biases. Its block k is block `origins[k]` of the network given.
        origins: numbers of blocks; `origins[0]` is 0, the input.
        scales: log of the unit in which the states of each of these blocks are measured.
        scale: the same for FΔy.
    """

    network: Network
    origins: tuple[int, ...]
    scales: tuple[float, ...]
    scale: float

    @classmethod
    def of(cls, network: Network, rows: Array | None) -> _Reduced:
        """Reduce a network."""
        known: dict[int, _Sum] = {0: {0: None}}
        origins, scales = [0], [0.0]
        maps: list[dict[int, Array]] = []
        for k, block in enumerate(network.blocks, start=1):
            activation = block.activation
            total = _substitute(block.affine.matrices, known)
            if activation.low == activation.high or not total:
                known[k] = {i: activation.low * m for i, m in total.items()}
                continue
            matrices, scale = _normalise(total, scales)
            maps.append(matrices)
            known[k] = {len(origins): None}
            origins.append(k)
            scales.append(scale)
        outputs = network.output.matrices
        if rows is not None:
            outputs = {j: rows @ to_dense(m) for j, m in outputs.items()}
        output, scale = _normalise(_substitute(outputs, known), scales)
        used = _find_used([*maps, output])
        number = {i: new for new, i in enumerate(used)}
        readers = [
            {number[i]: m for i, m in matrices.items()}
            for matrices in (*(maps[i - 1] for i in used[1:]), output)
        ]
        _compress_input(readers)
        origins = [origins[i] for i in used]
        rank = len(network.output.bias if rows is None else rows)
        return cls(
            network=Network(
                input_shape=(next((m[0].shape[1] for m in readers if 0 in m), 0),),
                blocks=tuple(
                    Block(affine=_without_bias(m), activation=network.blocks[k - 1].activation)
                    for k, m in zip(origins[1:], readers, strict=False)
                ),
                output=AffineMap.of(readers[-1], np.zeros(rank)),
            ),
            origins=tuple(origins), scales=tuple(scales[i] for i in used), scale=scale,
        )  # fmt: skip

    def restore(self, network: Network, logs: list[Array], gap: float, steps: int) -> NetworkClaim:
        """Return a claim of the network that was given, in its own units."""
        found = [np.full(0 if is_linear(network, k) else width, _IRRELEVANT)
                 for k, width in enumerate(network.widths[1:], start=1)]  # fmt: skip
        for k, scale, own in zip(self.origins[1:], self.scales[1:], logs, strict=True):
            found[k - 1] = own + 2 * (self.scale - scale)
        return replace(NetworkClaim.from_logarithms(None, found), gap=gap, steps=steps)


_Sum: TypeAlias = dict[int, Array | None]
"""A sum of matrices times the states of the blocks that remain; None stands for the identity."""


def _substitute(matrices: Mapping[int, Matrix], known: Mapping[int, _Sum]) -> dict[int, Array]:
    """Return a map of blocks as a map of the blocks that remain."""
    total: dict[int, Array] = {}
    for j, matrix in matrices.items():
        for i, own in known[j].items():
            part = to_dense(matrix) if own is None else matrix @ own
            total[i] = total[i] + part if i in total else part
    return {i: m for i, m in total.items() if m.any()}


def _find_used(maps: list[dict[int, Array]]) -> list[int]:
    """Return the input and the blocks on which the last of the maps depends."""
    used = set(maps[-1])
    for k in range(len(maps) - 1, 0, -1):
        if k in used:
            used |= set(maps[k - 1])
    return sorted(used | {0})


def _normalise(matrices: dict[int, Array], scales: list[float]) -> tuple[dict[int, Array], float]:
    """Return a map in units of its sources and of its own, and the log of its unit."""
    logs = [scales[j] + math.log(float(np.max(np.abs(m)))) for j, m in matrices.items()]
    own = max(logs, default=0.0)
    return {j: m * math.exp(scales[j] - own) for j, m in matrices.items()}, own


def _compress_input(readers: list[dict[int, Array]]) -> None:
    """Replace the input by its coordinates in a basis of all rows that read it."""
    rows = [m[0] for m in readers if 0 in m]
    if rows and sum(len(r) for r in rows) < rows[0].shape[1]:
        basis = np.linalg.qr(np.concatenate(rows).T)[0]
        for m in readers:
            if 0 in m:
                m[0] = m[0] @ basis


def _without_bias(matrices: dict[int, Array]) -> AffineMap:
    return AffineMap.of(matrices, np.zeros(len(next(iter(matrices.values())))))


@dataclass(frozen=True, kw_only=True, eq=False)
class _Start:
    """A point well inside of the cone; see Note [Start].

    Attributes:
        log_square: log γ², the bound that it shows.
        log_multipliers: log λ of each block.
    """

    log_square: float
    log_multipliers: list[Array]

    @classmethod
    def of(cls, network: Network) -> _Start:
        """Return the proposal of the recursion, with growing multipliers."""
        claim = propose_network_claim(network)
        bound = prove_network(network, claim).bound
        growth = math.log(_GROWTH) * np.arange(len(network.blocks), -1, -1)
        logs = [
            np.log(own) + exponent * math.log(2) + more
            for own, exponent, more in zip(
                claim.multipliers, claim.exponents or (), growth[1:], strict=True
            )
        ]
        return cls(log_square=2 * math.log(bound) + float(growth[0]), log_multipliers=logs)


def _rescale(network: Network, start: _Start) -> Network:
    """Return the network in the units of Note [Units of a program]."""
    logs = [np.zeros(network.widths[0])]
    logs += [0.5 * (start.log_square - own) for own in start.log_multipliers]

    def convert(affine: AffineMap, own: Array) -> AffineMap:
        return AffineMap.of(
            {j: to_dense(m) * np.exp(logs[j] - own[:, None]) for j, m in affine.matrices.items()},
            affine.bias,
        )

    return Network(
        input_shape=network.input_shape,
        blocks=tuple(
            replace(block, affine=convert(block.affine, own))
            for block, own in zip(network.blocks, logs[1:], strict=True)
        ),
        output=convert(network.output, np.full(network.out_features, 0.5 * start.log_square)),
    )


def _build_program(network: Network) -> primal_dual.Program:
    """Return the program of a network, block tridiagonal in groups of blocks."""
    widths = network.widths
    ends = np.cumsum((0, *widths))
    p, N = widths[0], int(ends[-1])

    def join(affine: AffineMap) -> tuple[slice, Array]:
        """Return all coordinates that a map reads, and the map."""
        first, last = min(affine.matrices), max(affine.matrices)
        parts = [
            to_dense(affine.matrices[j])
            if j in affine.matrices
            else np.zeros((affine.units, widths[j]))
            for j in range(first, last + 1)
        ]
        return slice(int(ends[first]), int(ends[last + 1])), np.concatenate(parts, axis=1)

    rows, low, high = [], [], []
    for k, block in enumerate(network.blocks, start=1):
        coordinates, values = join(block.affine)
        units = slice(int(ends[k]) - p, int(ends[k + 1]) - p)
        rows.append(
            primal_dual.Rows(
                coordinates=coordinates, units=units, values=torch.from_numpy(values.T[None].copy())
            )
        )
        low += [block.activation.low] * widths[k]
        high += [block.activation.high] * widths[k]
    coordinates, C = join(network.output)
    constant = torch.zeros(1, N, N, dtype=torch.float64, device="cpu")
    constant[0, coordinates, coordinates] = torch.from_numpy(-C.T @ C)
    return primal_dual.Program(
        groups=tuple(sum(widths[k] for k in group) for group in group_blocks(network)),
        inputs=p, rows=tuple(rows), states=torch.arange(p, N, device="cpu"), constant=constant,
        low=torch.tensor([low], dtype=torch.float64, device="cpu"),
        high=torch.tensor([high], dtype=torch.float64, device="cpu"),
    )  # fmt: skip

"""Small networks of every structure, and what a claim about one says in exact arithmetic."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import scipy.sparse
import torch

from lben.certificates.network import NetworkClaim
from lben.weights.activation import IDENTITY, RELU, Activation
from lben.weights.grouping import frontiers
from lben.weights.network import AffineMap, Block, Network, to_dense

LEAKY = Activation(
    name="LeakyReLU(0.25)", low=0.25, high=1.0, knots=(0.0,),
    function=lambda v: torch.where(v > 0, v, 0.25 * v),
)  # fmt: skip
BENT = Activation(
    name="bent", low=-0.5, high=1.25, knots=(0.0,),
    function=lambda v: torch.where(v > 0, 1.25 * v, -0.5 * v),
)  # fmt: skip
"""Slopes below 0 and above 1."""
ODD = Activation(name="|v|", low=-1.0, high=1.0, knots=(0.0,), function=torch.abs)
HALF = Activation(name="v/2", low=0.5, high=0.5, function=lambda v: 0.5 * v)


def build(
    maps: list[tuple[dict[int, int], Activation]], output: tuple[int, ...], inputs: int,
    units: int = 4, seed: int = 0, sparse: bool = False, scales: dict[int, float] | None = None,
) -> Network:  # fmt: skip
    """Return a network of random dyadic weights; each map says which blocks it reads."""
    numbers = np.random.default_rng(seed)
    widths = [inputs]
    wrap = scipy.sparse.csr_array if sparse else np.asarray
    scales = scales or {}

    def draw(rows: int, reads: tuple[int, ...], k: int) -> AffineMap:
        matrices = {
            j: wrap(np.round(64 * numbers.standard_normal((rows, widths[j]))) / 128
                    * scales.get(k, 1.0) / scales.get(j, 1.0))
            for j in reads
        }  # fmt: skip
        return AffineMap.of(matrices, scales.get(k, 1.0) * numbers.standard_normal(rows))

    blocks = []
    for k, (reads, activation) in enumerate(maps, 1):
        blocks.append(Block(affine=draw(units, tuple(reads), k), activation=activation))
        widths.append(units)
    return Network(input_shape=(inputs,), blocks=tuple(blocks), output=draw(3, output, -1))


def chain(depth: int, activation: Activation = RELU, inputs: int = 3, **kind: object) -> Network:
    """Return a chain of blocks."""
    maps = [({k: 1}, activation) for k in range(depth)]
    return build(maps, (depth,), inputs, **kind)  # type: ignore[arg-type]


NETWORKS = {
    "one block": chain(1),
    "chain": chain(4),
    "sparse chain": chain(3, sparse=True),
    "wide input": chain(3, inputs=9),
    "wide input, slopes above 0": chain(2, LEAKY, inputs=9),
    "wide input, slopes below 0": chain(2, BENT, inputs=9),
    "slopes above 0": chain(3, LEAKY),
    "slopes below 0": chain(3, BENT),
    "opposite slopes": chain(2, ODD),
    "opposite slopes, wide input": chain(2, ODD, inputs=9),
    "residual": build([({0: 1}, RELU), ({1: 1}, RELU), ({1: 1, 2: 1}, RELU), ({3: 1}, RELU)],
                      (3, 4), 3),
    "concatenation": build([({0: 1}, RELU), ({0: 1}, BENT), ({1: 1, 2: 1}, LEAKY)], (3,), 3),
    "inputs everywhere": build([({0: 1}, RELU), ({0: 1, 1: 1}, RELU)], (0, 2), 3),
    "inputs everywhere, wide": build([({0: 1}, BENT), ({0: 1, 1: 1}, LEAKY)], (0, 2), 7),
    "linear blocks": build([({0: 1}, RELU), ({0: 1, 1: 1}, IDENTITY), ({2: 1}, RELU),
                            ({2: 1, 3: 1}, HALF)], (4,), 3),
    "linear first": build([({0: 1}, IDENTITY), ({1: 1}, RELU), ({1: 1, 2: 1}, IDENTITY)],
                          (3,), 5),
    "a block that nothing reads": build([({0: 1}, RELU), ({0: 1}, RELU), ({2: 1}, RELU)], (3,), 3),
    "a scaled layer": chain(4, scales={2: 2.0**500}),
    "a layer scaled down": chain(4, scales={2: 2.0**-500, 3: 2.0**-90}),
}  # fmt: skip


def exactly(matrix: np.ndarray) -> list[list[Fraction]]:
    """Return a matrix of fractions."""
    return [[Fraction(float(value)) for value in row] for row in to_dense(matrix)]


def multiply(A: list[list[Fraction]], B: list[list[Fraction]]) -> list[list[Fraction]]:
    columns = list(zip(*B, strict=True))
    return [[sum((a * b for a, b in zip(row, column, strict=True) if a and b), Fraction(0))
             for column in columns] for row in A]  # fmt: skip


def quadratic_form(
    network: Network, claim: NetworkClaim, rows: np.ndarray | None = None
) -> list[list[Fraction]]:
    """Return γ²|Δx|² − |FΔy|² + Σ Q_k of the stored numbers, as one matrix, without rounding."""
    free = [block.activation.low == block.activation.high for block in network.blocks]
    sizes = [network.widths[0]] + [
        0 if f else w for f, w in zip(free, network.widths[1:], strict=True)
    ]
    starts, total = np.cumsum([0, *sizes]), sum(sizes)

    def unit_rows(k: int) -> list[list[Fraction]]:
        return [[Fraction(int(i == starts[k] + row)) for i in range(total)]
                for row in range(sizes[k])]  # fmt: skip

    def apply(affine: AffineMap) -> list[list[Fraction]]:
        v = [[Fraction(0)] * total for _ in range(affine.units)]
        for j, matrix in affine.matrices.items():
            part = multiply(exactly(matrix), states[j])
            v = [[a + b for a, b in zip(x, y, strict=True)] for x, y in zip(v, part, strict=True)]
        return v

    form = [[Fraction(0)] * total for _ in range(total)]

    def add(weight: Fraction, a: list[Fraction], b: list[Fraction]) -> None:
        for i in range(total):
            for j in range(total):
                if a[i] * b[j] + a[j] * b[i]:
                    form[i][j] += weight * (a[i] * b[j] + a[j] * b[i]) / 2

    states = {0: unit_rows(0)}
    for x in states[0]:
        add(Fraction(claim.gamma) ** 2, x, x)
    read = frontiers(network)
    for k, own in enumerate(network.blocks, 1):
        v, low, high = apply(own.affine), *map(Fraction, (own.activation.low, own.activation.high))
        if free[k - 1]:
            states[k] = [[low * value for value in e] for e in v]
            continue
        states[k] = unit_rows(k)
        if k not in read[k]:
            continue  # its multipliers are not used
        exponent = 0 if claim.exponents is None else claim.exponents[k - 1]
        for r, e, value in zip(states[k], v, claim.multipliers[k - 1], strict=True):
            weight = 2 * Fraction(float(value)) * Fraction(2) ** exponent
            add(weight, r, r)
            add(-weight * (low + high), r, e)
            add(weight * low * high, e, e)
    y = apply(network.output)
    for row in y if rows is None else multiply(exactly(rows), y):
        add(Fraction(-1), row, row)
    return form


def is_positive(form: list[list[Fraction]]) -> bool:
    """Say whether a matrix is positive semidefinite, by elimination."""
    A = [row[:] for row in form]
    for i in range(len(A)):
        if A[i][i] < 0 or (A[i][i] == 0 and any(A[i][j] for j in range(i + 1, len(A)))):
            return False
        for j in range(i + 1, len(A)):
            if A[i][i] and A[j][i]:
                factor = A[j][i] / A[i][i]
                A[j] = [a - factor * b for a, b in zip(A[j], A[i], strict=True)]
    return True

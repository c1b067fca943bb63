"""How do affine maps of networks compose? Products and sums, with a bound of what is rounded.

Every result obeys Note [Numbers] of lben/weights/network.py. Numbers stay exact where a product or
sum only moves them: see `compose` and `add`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import scipy.sparse
from numpy.typing import NDArray

from lben.rigorous import Array, gamma_k
from lben.weights.network import AffineMap, Matrix, is_sparse, to_dense

Indices = NDArray[np.int64]
"""Places in a flattened tensor; −1 for none, where the value is 0."""

_LEAST = 2.0**-900
"""Products of smaller numbers are refused: their error is no longer relative."""


class ConversionError(ValueError):
    """A network cannot be converted, or what was converted computes something else.

    Example:
        >>> import torch
        >>> from lben.interop import ConversionError, from_torch
        >>> try:
        ...     from_torch(torch.nn.Sequential(torch.nn.Softmax(1)), (3,))
        ... except ConversionError as error:
        ...     print(str(error)[:28])
        softmax, in Softmax (0), can
    """


def make_map(
    matrix: Matrix, bias: Array, operations: int, *, roundings: int = 0, exact: bool = True
) -> AffineMap:
    """Return x ↦ Ax + b of one input.

    Args:
        matrix: A.
        bias: b.
        operations: roundings of a product and sum as it is evaluated.
        roundings: by which the numbers themselves are off.
        exact: whether they are not off at all.
    """
    grow = 1.0 if exact else 1 + 2 * gamma_k(roundings + 2)
    return AffineMap(
        matrices={0: matrix}, bias=bias, sizes={0: abs(matrix) * grow},
        bias_size=np.abs(bias) * grow, operations=operations + roundings, exact=exact,
    )  # fmt: skip


def make_selection(indices: Indices, columns: int) -> AffineMap:
    """Return the map whose row i reads entry indices[i] of its input; 0 where that is negative."""
    rows = np.flatnonzero(indices >= 0)
    matrix = scipy.sparse.csr_array(
        (np.ones(len(rows)), (rows, indices[rows])), shape=(len(indices), columns)
    )
    return make_map(matrix, np.zeros(len(indices)), operations=0)


def make_constant(values: Array) -> AffineMap:
    """Return the map that reads nothing."""
    return AffineMap(
        matrices={}, bias=values, sizes={}, bias_size=np.abs(values), operations=0, exact=True
    )


def compose(outer: AffineMap, inner: AffineMap) -> AffineMap:
    """Return z ↦ A(Σ W_j z_j + b) + c.

    The numbers are exact where each is one number of A, or of W_j, times a power of two: where A
    has at most one entry in a row, or W_j has at most one in a column, or reads each entry of A for
    another place. Besides, no sum of biases may be rounded.

    Args:
        outer: A and c, of one input.
        inner: W_j and b.

    Raises:
        ConversionError: if a product underflows or overflows.
    """
    A, size = outer.matrices[0], outer.sizes[0]
    block = find_block(inner)
    if block is not None:
        return replace(
            outer, matrices={block: A}, sizes={block: size},
            operations=outer.operations + inner.operations,
        )  # fmt: skip
    moves = _moves_numbers(A, by_row=True)
    exact = (
        outer.exact
        and inner.exact
        and (moves or all(_keeps_numbers(A, W) for W in inner.matrices.values()))
        and (not inner.bias.any() or (moves and not outer.bias.any()))
    )
    _refuse_extremes(A, [*inner.matrices.values(), inner.bias])
    matrices = {j: _multiply(A, W) for j, W in inner.matrices.items()}
    bias = A @ inner.bias + outer.bias
    operations = outer.operations + inner.operations
    if exact:
        sizes, bias_size = {j: abs(W) for j, W in matrices.items()}, np.abs(bias)
    else:
        grow = 1 + 2 * gamma_k(outer.operations + 2)
        sizes = {j: _multiply(size, W) * grow for j, W in inner.sizes.items()}
        bias_size = (size @ inner.bias_size + outer.bias_size) * grow
    return _check(AffineMap(
        matrices=matrices, bias=bias, sizes=sizes, bias_size=bias_size, operations=operations,
        exact=exact,
    ))  # fmt: skip


def add(first: AffineMap, second: AffineMap) -> AffineMap:
    """Return the sum of two maps; exact where no two numbers that are not zero meet."""
    matrices, sizes = dict(first.matrices), dict(first.sizes)
    exact = first.exact and second.exact and not (first.bias.any() and second.bias.any())
    for j, matrix in second.matrices.items():
        if j in matrices:
            exact = exact and _are_disjoint(matrices[j], matrix)
            matrices[j] = matrices[j] + matrix
            sizes[j] = (sizes[j] + second.sizes[j]) * (1 + gamma_k(4))
        else:
            matrices[j], sizes[j] = matrix, second.sizes[j]
    bias = first.bias + second.bias
    if exact:
        sizes, bias_size = {j: abs(W) for j, W in matrices.items()}, np.abs(bias)
    else:
        bias_size = (first.bias_size + second.bias_size) * (1 + gamma_k(4))
    return _check(AffineMap(
        matrices=matrices, bias=bias, sizes=sizes, bias_size=bias_size,
        operations=max(first.operations, second.operations) + 1, exact=exact,
    ))  # fmt: skip


def scale(factors: Array, inner: AffineMap, *, roundings: int = 0, exact: bool = True) -> AffineMap:
    """Return the map with row i multiplied by factors[i].

    Args:
        factors: one per row.
        inner: the map.
        roundings, exact: of the factors, as in `make_map`.
    """
    matrix = scipy.sparse.diags_array(factors).tocsr()
    step = make_map(matrix, np.zeros(len(factors)), 1, roundings=roundings, exact=exact)
    return compose(step, inner)


def stack(maps: Sequence[AffineMap]) -> AffineMap:
    """Return the map whose output is all outputs, one after the other."""
    blocks = sorted({j for affine in maps for j in affine.matrices})
    return AffineMap(
        matrices={j: _stack_rows([m.matrices.get(j) for m in maps], maps) for j in blocks},
        bias=np.concatenate([m.bias for m in maps]),
        sizes={j: _stack_rows([m.sizes.get(j) for m in maps], maps) for j in blocks},
        bias_size=np.concatenate([m.bias_size for m in maps]),
        operations=max(m.operations for m in maps), exact=all(m.exact for m in maps),
    )  # fmt: skip


def _stack_rows(parts: list[Matrix | None], maps: Sequence[AffineMap]) -> Matrix:
    columns = next(part.shape[1] for part in parts if part is not None)
    if all(isinstance(part, np.ndarray) for part in parts):
        return np.vstack([part for part in parts if part is not None])
    rows = [
        scipy.sparse.csr_array((m.units, columns) if part is None else part)
        for part, m in zip(parts, maps, strict=True)
    ]
    return scipy.sparse.csr_array(scipy.sparse.vstack(rows, format="csr"))


def find_block(affine: AffineMap) -> int | None:
    """Return the block whose numbers a map returns as they are, if it is such a map."""
    if len(affine.matrices) != 1 or affine.bias.any():
        return None
    ((block, matrix),) = affine.matrices.items()
    units = affine.units
    if not (is_sparse(matrix) and matrix.shape == (units, units) and matrix.nnz == units):
        return None
    places = np.arange(units)
    same = np.array_equal(matrix.indices, places) and np.array_equal(matrix.indptr[1:], places + 1)
    return block if same and (matrix.data == 1).all() else None


def _multiply(A: Matrix, W: Matrix) -> Matrix:
    product = A @ W
    return scipy.sparse.csr_array(product) if is_sparse(product) else np.ascontiguousarray(product)


def _entries(matrix: Matrix) -> Array:
    return np.asarray(matrix.data) if is_sparse(matrix) else np.asarray(matrix).ravel()


def _moves_numbers(matrix: Matrix, *, by_row: bool) -> bool:
    """Say whether every row, or every column, has at most one entry, a power of two."""
    if is_sparse(matrix):
        counts = np.diff(matrix.indptr) if by_row else np.bincount(matrix.indices)
    else:
        counts = np.count_nonzero(matrix, axis=1 if by_row else 0)
    if counts.max(initial=0) > 1:
        return False
    values = _entries(matrix)
    return bool((np.abs(np.frexp(values[values != 0])[0]) == 0.5).all())


def _keeps_numbers(A: Matrix, W: Matrix) -> bool:
    """Say whether every entry of AW is an entry of A times a power of two."""
    if _moves_numbers(W, by_row=False):
        return True
    if not (is_sparse(A) and is_sparse(W) and _moves_numbers(W, by_row=True)):
        return False
    # Row k of W sends column k of A to one place: no two entries of a row of A may meet there.
    ones = A.copy()  # places are not shared: SciPy sorts them where they lie
    ones.data[:] = 1
    meet = ones @ scipy.sparse.csr_array(abs(W) > 0, dtype=np.float64)
    return bool(meet.data.max(initial=0.0) <= 1)


def _are_disjoint(a: Matrix, b: Matrix) -> bool:
    if is_sparse(a) and is_sparse(b):
        return not (a != 0).multiply(b != 0).count_nonzero()
    return not ((to_dense(a) != 0) & (to_dense(b) != 0)).any()


def _refuse_extremes(A: Matrix, others: Sequence[Matrix | Array]) -> None:
    """Refuse products below the normal numbers, whose rounding error is not relative."""

    def least(matrix: Matrix | Array) -> float:
        values = np.abs(_entries(matrix))
        return float(np.min(values[values > 0], initial=1.0))

    smallest = least(A) * min(map(least, others), default=1.0)
    if smallest < _LEAST:
        raise ConversionError(
            f"products of its numbers are as small as {smallest:.1e}, where float64 loses their "
            "digits: set weights below 1e-100 to zero"
        )


def _check(affine: AffineMap) -> AffineMap:
    if not all(np.isfinite(_entries(m)).all() for m in (*affine.sizes.values(), affine.bias_size)):
        raise ConversionError("products of its numbers leave the range of float64")
    return affine

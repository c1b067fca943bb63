"""What is known of a tensor inside a network? It is an affine expression of units, with a shape.

A converter carries expressions through the operations of a network. Affine operations compose their
maps. An activation makes a block of units, and its result is the expression that reads this block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import scipy.sparse

from lben.interop import maps
from lben.interop.maps import ConversionError, Indices
from lben.rigorous import Array
from lben.weights.activation import RELU, Activation
from lben.weights.network import AffineMap, Block, Network, is_sparse

Shape = tuple[int, ...]


class Builder:
    """The blocks of a network so far.

    Args:
        input_shape: of one sample.

    Attributes:
        blocks: in their order.
        unit_error: how far activations of the source are from those of the blocks, in every unit.
    """

    def __init__(self, input_shape: Shape) -> None:
        self.input_shape = input_shape
        self.blocks: list[Block] = []
        self.unit_error = 0.0

    def input(self) -> Expression:
        """Return the input."""
        return self._read(0, self.input_shape)

    def activate(self, x: Expression, activation: Activation) -> Expression:
        """Return σ(x), units of a new block."""
        self.blocks.append(Block(affine=x.map, activation=activation))
        return self._read(len(self.blocks), x.shape)

    def finish(self, y: Expression) -> Network:
        """Return the network whose output is y, without blocks that it does not read."""
        read = set(y.map.matrices)
        for k in range(len(self.blocks), 0, -1):
            if k in read:
                read |= set(self.blocks[k - 1].affine.matrices)
        needed = [k for k in range(1, len(self.blocks) + 1) if k in read]
        numbers = {0: 0, **{k: place for place, k in enumerate(needed, start=1)}}

        def renumber(affine: AffineMap) -> AffineMap:
            for matrix in (*affine.matrices.values(), *affine.sizes.values()):
                if is_sparse(matrix):
                    matrix.sort_indices()  # one order of entries, hence one fingerprint
            return replace(
                affine, matrices={numbers[j]: m for j, m in affine.matrices.items()},
                sizes={numbers[j]: m for j, m in affine.sizes.items()},
            )  # fmt: skip

        blocks = (self.blocks[k - 1] for k in needed)
        return Network(
            input_shape=self.input_shape, output=renumber(y.map),
            blocks=tuple(replace(block, affine=renumber(block.affine)) for block in blocks),
        )  # fmt: skip

    def _read(self, block: int, shape: Shape) -> Expression:
        units = math.prod(shape)
        identity = scipy.sparse.eye_array(units, format="csr")
        affine = maps.make_map(identity, np.zeros(units), operations=0)
        affine = replace(affine, matrices={block: identity}, sizes={block: identity})
        return Expression(self, affine, shape)


@dataclass(frozen=True, eq=False)
class Expression:
    """An affine expression of units, with the shape of one sample.

    Attributes:
        builder: of the network that it belongs to.
        map: the expression, flattened in C order.
        shape: without the batch.
    """

    builder: Builder
    map: AffineMap
    shape: Shape

    @property
    def size(self) -> int:
        """How many numbers it has."""
        return self.map.units

    @property
    def places(self) -> Indices:
        """The places 0, 1, …, in its shape."""
        return np.arange(self.size).reshape(self.shape)

    def constant(self, values: Array) -> Expression:
        """Return an expression of the same network that reads nothing."""
        return Expression(
            self.builder, maps.make_constant(values.astype(np.float64).ravel()), values.shape
        )

    def then(self, step: AffineMap, shape: Sequence[int]) -> Expression:
        """Return A·(this) + b in a shape."""
        return replace(self, map=maps.compose(step, self.map), shape=tuple(shape))

    def select(self, indices: Indices) -> Expression:
        """Return entries of it, in the shape of the indices; 0 where they are negative."""
        indices = np.asarray(indices)
        if np.array_equal(indices.ravel(), np.arange(self.size)):
            return replace(self, shape=indices.shape)
        step = maps.make_selection(indices.ravel(), self.size)
        return self.then(step, indices.shape)

    def broadcast(self, shape: Shape) -> Expression:
        """Return it in a larger shape, by the rules of NumPy."""
        return self.select(np.broadcast_to(self.places, shape))

    def plus(self, other: Expression) -> Expression:
        """Return the sum of two expressions of one shape."""
        return replace(self, map=maps.add(self.map, other.map))

    def times(self, factors: Array, *, roundings: int = 0, exact: bool = True) -> Expression:
        """Return it with its entries multiplied by numbers of its shape, see `maps.scale`."""
        factors = np.broadcast_to(factors, self.shape).ravel().astype(np.float64)
        return replace(self, map=maps.scale(factors, self.map, roundings=roundings, exact=exact))

    def negate(self) -> Expression:
        """Return −(this), exact."""
        return self.times(np.array(-1.0))

    def minus(self, other: Expression) -> Expression:
        """Return the difference of two expressions of one shape."""
        return self.plus(other.negate())

    def is_activation_of(self, v: Expression, activation: Activation) -> bool:
        """Say whether this is σ(v), entry by entry."""
        k = maps.find_block(self.map)
        if not k or self.shape != v.shape:
            return False
        block = self.builder.blocks[k - 1]
        return block.activation == activation and block.affine is v.map

    def activate(self, activation: Activation) -> Expression:
        """Return σ(this)."""
        return self.builder.activate(self, activation)

    def maximum(self, other: Expression) -> Expression:
        """Return the larger one of two expressions of one shape, by max(a, b) = a + σ(b − a)."""
        return self.plus(other.minus(self).activate(RELU))

    def minimum(self, other: Expression) -> Expression:
        """Return the smaller one of two expressions of one shape."""
        return self.minus(self.minus(other).activate(RELU))


def join(parts: Sequence[Expression]) -> Expression:
    """Return all entries of all parts, one after the other, in one dimension."""
    whole = maps.stack([part.map for part in parts])
    return Expression(parts[0].builder, whole, (whole.units,))


# Note [Places in a batch]
# What a function does that only moves entries is seen on numbers 1, 2, … in place of the entries of
# a batch; 0 stands for padding. Its result must be the same within every sample.


def number_places(parts: Sequence[Expression], batch: int) -> list[Array]:
    """Return tensors of places, one for each part, for a batch of samples."""
    total, start, found = sum(part.size for part in parts), 1, []
    for part in parts:
        first = part.places + float(start)
        found.append(np.stack([first + k * total for k in range(batch)]))
        start += part.size
    return found


def read_places(places: Array, total: int, batch: int) -> Indices:
    """Return where the entries of one sample come from.

    Args:
        places: what a function made of `number_places`.
        total: the entries of one sample, of all parts.
        batch: samples.

    Raises:
        ConversionError: if samples are mixed.
    """
    if places.ndim and len(places) == batch:
        first = places[0]
        expected = [np.where(first > 0, first + k * total, 0.0) for k in range(batch)]
        if np.array_equal(places, np.stack(expected)) and (first <= total).all():
            indices: Indices = first.astype(np.int64) - 1
            return indices
    raise ConversionError(
        "it mixes samples of a batch, or moves the batch from the first dimension: keep the batch "
        "first, as x.flatten(1) and x.view(x.size(0), -1) do"
    )


def within_a_sample(values: Array) -> Array:
    """Return the values of one sample of a constant that is the same for all of them.

    Raises:
        ConversionError: if it differs.
    """
    if not values.ndim or not (values == values[:1]).all():
        raise ConversionError("a constant differs between samples of the batch")
    one: Array = values[0]
    return one


def broadcast_constant(x: Expression, value: object) -> Array:
    """Return a constant that broadcasts with one sample of x.

    Args:
        x: the expression, of one sample.
        value: a number, or an array that broadcasts with a batch of x.

    Raises:
        ConversionError: if it is no finite constant, or does not fit.
    """
    if isinstance(value, Expression):
        raise ConversionError(
            "both operands depend on the input, and a product of them has no bounded slope: only "
            "sums, differences, maxima and minima of two tensors can be converted"
        )
    values = np.asarray(value, dtype=np.float64)
    if not np.isfinite(values).all():
        raise ConversionError("a constant is not finite")
    if values.ndim == len(x.shape) + 1:
        return within_a_sample(values)
    if values.ndim > len(x.shape):
        raise ConversionError(f"a constant of shape {values.shape} meets the shape {x.shape}")
    return values

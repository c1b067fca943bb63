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
from lben.interop.maps import Indices
from lben.rigorous import Array
from lben.weights.activation import RELU, Activation
from lben.weights.network import AffineMap, Block, Network

Shape = tuple[int, ...]


class Builder:
    """The blocks of a network so far.

    Args:
        input_shape: of one sample.
    """

    def __init__(self, input_shape: Shape) -> None:
        self.input_shape = input_shape
        self.blocks: list[Block] = []

    def input(self) -> Expression:
        """Return the input."""
        return self._read(0, self.input_shape)

    def activate(self, x: Expression, activation: Activation) -> Expression:
        """Return σ(x), units of a new block."""
        self.blocks.append(Block(affine=x.map, activation=activation))
        return self._read(len(self.blocks), x.shape)

    def finish(self, y: Expression) -> Network:
        """Return the network whose output is y."""
        return Network(input_shape=self.input_shape, blocks=tuple(self.blocks), output=y.map)

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

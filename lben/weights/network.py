"""What is an ordinary network once its modules are gone? Blocks of units, fed by earlier blocks.

Let z₀ = x be the flattened input. For k = 1 … K,

    z_k = σ_k(v_k),   v_k = Σ_{j<k} W_kj z_j + b_k,   and   y = Σ_j C_j z_j + b_y.

So a network is z = σ(Wz + Ux + b), y = Cz + Dx + b_y with a strictly block lower triangular W
(docs/glossary.md). Its chain structure is kept: W is never written out.

Note [Numbers]
An affine map stands for a row of modules one after the other: a convolution, batch normalisation,
average pooling, a residual sum. Where its numbers are one module's own, they are exact. Where they
are products of several modules' numbers, evaluated in float64, they are off by roundoff. `sizes`
holds the same products of absolute values, and `operations` counts roundings on the way from z_j to
v_k. So by Higham (2002), section 3.1, with γ_k = ku/(1 − ku) for unit roundoff u,

- the exact numbers lie within γ_k · sizes of the numbers stored, for u of float64;
- v_k, evaluated module by module with unit roundoff u, is off by at most
  γ_k (Σ_j sizes_j |z_j| + bias_size), besides the effect of errors in z_j.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeAlias, TypeGuard

import numpy as np
import scipy.sparse
import torch

from lben.rigorous import Array, Enclosure, gamma_k
from lben.weights.activation import Activation
from lben.weights.base import digest
from lben.weights.dense import DenseWeights

Matrix: TypeAlias = Array | scipy.sparse.csr_array
"""Float64; sparse for convolutions."""


def is_sparse(matrix: Matrix) -> TypeGuard[scipy.sparse.csr_array]:
    """Say whether a matrix is stored by its entries that are not zero."""
    return scipy.sparse.issparse(matrix)


def to_dense(matrix: Matrix) -> Array:
    """Return a matrix with all its entries."""
    return matrix.toarray() if is_sparse(matrix) else np.asarray(matrix)


@dataclass(frozen=True, kw_only=True, eq=False)
class AffineMap:
    """The map v = Σ_j W_j z_j + b of a network, with what is known of its numbers.

    Attributes:
        matrices: W_j by block j; 0 is the input. A block that does not feed v is absent.
        bias: b.
        sizes: upper bounds of the products of absolute values behind each W_j; see Note [Numbers].
        bias_size: the same for b.
        operations: roundings on the way, of the longest sum of products.
        exact: whether matrices and bias are the exact numbers.

    Example:
        >>> import numpy as np
        >>> from lben.weights.network import AffineMap
        >>> W, b = np.array([[1.0, -2.0]]), np.zeros(1)
        >>> affine = AffineMap.of({0: W}, b)
        >>> affine.units, affine.operations, affine.enclosure(0).radius.tolist()
        (1, 3, [[0.0, 0.0]])
    """

    matrices: Mapping[int, Matrix]
    bias: Array
    sizes: Mapping[int, Matrix]
    bias_size: Array
    operations: int
    exact: bool

    def __post_init__(self) -> None:
        if set(self.matrices) != set(self.sizes):
            raise ValueError("an affine map needs sizes for the same blocks as matrices")
        for j, matrix in self.matrices.items():
            if matrix.shape[0] != len(self.bias) or matrix.shape != self.sizes[j].shape:
                raise ValueError(
                    f"the matrix from block {j} must have {len(self.bias)} rows, one for each "
                    f"number of the bias, got shape {tuple(matrix.shape)}"
                )

    @classmethod
    def of(cls, matrices: Mapping[int, Matrix], bias: Array) -> AffineMap:
        """Return the affine map of exact numbers, evaluated by one product and one sum."""
        terms = [int(matrix.shape[1]) for matrix in matrices.values()]
        return cls(
            matrices=matrices, bias=bias, sizes={j: abs(m) for j, m in matrices.items()},
            bias_size=np.abs(bias), operations=sum(terms) + 1, exact=True,
        )  # fmt: skip

    @property
    def units(self) -> int:
        """The number of rows."""
        return len(self.bias)

    @property
    def relative_radius(self) -> float:
        """How far the exact numbers may be from those stored, in units of `sizes`."""
        return 0.0 if self.exact else gamma_k(self.operations)

    def enclosure(self, block: int) -> Enclosure:
        """Return all its entries from one block, with the exact ones inside."""
        mid = to_dense(self.matrices[block])
        return Enclosure(mid, self.relative_radius * to_dense(self.sizes[block]))

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Return names and numbers, of which a fingerprint is made."""
        yield "bias", torch.from_numpy(np.ascontiguousarray(self.bias))
        for j, matrix in self.matrices.items():
            if is_sparse(matrix):
                entries = matrix.tocoo()
                rows, columns = entries.coords
                yield f"{j}.values", torch.from_numpy(np.ascontiguousarray(entries.data))
                yield f"{j}.rows", torch.from_numpy(rows.astype(np.int64))
                yield f"{j}.columns", torch.from_numpy(columns.astype(np.int64))
            else:
                yield f"{j}", torch.from_numpy(np.ascontiguousarray(matrix))


@dataclass(frozen=True, kw_only=True, eq=False)
class Block:
    """Units z = σ(v) with one activation.

    Attributes:
        affine: v in terms of earlier blocks.
        activation: σ.
    """

    affine: AffineMap
    activation: Activation


@dataclass(frozen=True, kw_only=True, eq=False)
class Network:
    """A feed-forward network as blocks of units, in float64.

    Attributes:
        input_shape: of one sample; the input is flattened in C order.
        blocks: z_1 … z_K.
        output: y in terms of the blocks.

    Raises:
        ValueError: if a block is fed by itself or a later one, or sizes do not fit.

    Example:
        >>> import numpy as np
        >>> from lben.weights.activation import RELU
        >>> from lben.weights.network import AffineMap, Block, Network
        >>> W, C = np.array([[1.0], [-1.0]]), np.array([[1.0, 1.0]])
        >>> hidden = Block(affine=AffineMap.of({0: W}, np.zeros(2)), activation=RELU)
        >>> network = Network(
        ...     input_shape=(1,), blocks=(hidden,), output=AffineMap.of({1: C}, np.zeros(1))
        ... )  # |x| = σ(x) + σ(−x)
        >>> network.widths, network.evaluate(np.array([[-3.0], [2.0]])).tolist()
        ((1, 2), [[3.0], [2.0]])
    """

    input_shape: tuple[int, ...]
    blocks: tuple[Block, ...]
    output: AffineMap
    _widths: tuple[int, ...] = field(init=False, default=())

    def __post_init__(self) -> None:
        widths = [math.prod(self.input_shape)]
        for affine in (*(block.affine for block in self.blocks), self.output):
            for j, matrix in affine.matrices.items():
                if not 0 <= j < len(widths) or matrix.shape[1] != widths[j]:
                    known = widths[j] if 0 <= j < len(widths) else "no earlier block"
                    raise ValueError(
                        f"block {len(widths)} reads {matrix.shape[1]} numbers of block {j}, which "
                        f"has {known}"
                    )
            widths.append(affine.units)
        object.__setattr__(self, "_widths", tuple(widths[:-1]))

    @property
    def widths(self) -> tuple[int, ...]:
        """How many numbers z₀ = x, z_1, … z_K have."""
        return self._widths

    @property
    def units(self) -> int:
        """n, the number of all units."""
        return sum(self._widths[1:])

    @property
    def out_features(self) -> int:
        """q."""
        return self.output.units

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all numbers, activations and the input shape."""
        tensors, header = {}, [f"network;{self.input_shape}"]
        maps = [*(block.affine for block in self.blocks), self.output]
        for k, affine in enumerate(maps):
            activation = repr(self.blocks[k].activation) if k < len(self.blocks) else "output"
            header.append(f"{k}:{activation},{affine.exact},{affine.operations}")
            tensors.update({f"{k}.{name}": t for name, t in affine.tensors()})
        return digest(";".join(header), tensors)

    def pre_activations(self, x: Array) -> tuple[list[Array], Array]:
        """Return v_1 … v_K and y for a batch of inputs.

        Args:
            x: batch × p, or batch × the input's shape.

        Returns:
            Each v_k as batch × n_k, and y as batch × q; evaluated in float64.

        Raises:
            ValueError: for another input shape.
        """
        x = np.asarray(x, dtype=np.float64)
        if x.shape[1:] not in (self.input_shape, (self.widths[0],)):
            raise ValueError(f"x must be a batch of {self.input_shape}, got {tuple(x.shape)}")
        states, values = [x.reshape(len(x), -1)], []
        for block in self.blocks:
            values.append(self._apply(block.affine, states))
            states.append(block.activation(torch.from_numpy(values[-1])).numpy())
        return values, self._apply(self.output, states)

    def evaluate(self, x: Array) -> Array:
        """Return y for a batch of inputs, evaluated in float64."""
        return self.pre_activations(x)[1]

    @staticmethod
    def _apply(affine: AffineMap, states: list[Array]) -> Array:
        v = np.broadcast_to(affine.bias, (len(states[0]), affine.units)).copy()
        for j, matrix in affine.matrices.items():
            v += np.asarray((matrix @ states[j].T).T)
        return v

    def dense(self) -> DenseWeights:
        """Return W, U, C and D written out, for activations with slopes in [0, 1].

        Returns:
            The weights with Λ = 1 and no claim.

        Raises:
            ValueError: if numbers are not exact, or an activation has other slopes.
        """
        for k, block in enumerate(self.blocks):
            if block.activation.low < 0 or block.activation.high > 1:
                raise ValueError(
                    f"block {k + 1} has slopes in [{block.activation.low}, "
                    f"{block.activation.high}], and a layer needs [0, 1]: certify the network"
                )
        if not all(affine.exact for affine in (*(b.affine for b in self.blocks), self.output)):
            raise ValueError(
                "the numbers of this network are rounded products of several modules' numbers, and "
                "a layer needs exact ones: certify the network"
            )
        offsets = np.cumsum((0, *self.widths[1:]))
        n, p, q = self.units, self.widths[0], self.out_features
        W, U, C, D = np.zeros((n, n)), np.zeros((n, p)), np.zeros((q, n)), np.zeros((q, p))
        for k, block in enumerate(self.blocks):
            rows = slice(offsets[k], offsets[k + 1])
            for j, matrix in block.affine.matrices.items():
                part = U[rows] if j == 0 else W[rows, offsets[j - 1] : offsets[j]]
                part[:] = to_dense(matrix)
        for j, matrix in self.output.matrices.items():
            part = D if j == 0 else C[:, offsets[j - 1] : offsets[j]]
            part[:] = to_dense(matrix)
        b = np.concatenate([np.zeros(0), *(block.affine.bias for block in self.blocks)])
        tensors = {k: torch.from_numpy(v) for k, v in {"W": W, "U": U, "b": b, "C": C}.items()}
        return DenseWeights(
            **tensors, D=torch.from_numpy(D) if D.any() else None,
            b_y=torch.from_numpy(self.output.bias.copy()),
            Lambda=torch.ones(n, dtype=torch.float64), gamma=None,
        )  # fmt: skip

"""Which linear equations tie the units of a network, feed-forward or at equilibrium, to its input?

Let x = (ξ − mean)/std be the normalised input, and let the units be grouped into blocks z_1 … z_K.
Every network of this package is

    v_k = Σ_j W_kj z_j + b_k,   z_k = σ_k(v_k) for k ≤ K,   y = v_{K+1},

where block 0 is x. Level k names the equation of v_k, so level K + 1 is the output. A feed-forward
network (`Network`) reads earlier blocks only. An equilibrium (`DenseWeights`) has one block, which
reads itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import scipy.sparse
import torch
from jaxtyping import Float
from torch import Tensor

from lben.rigorous import Array, gamma_k
from lben.weights.activation import Activation
from lben.weights.base import digest
from lben.weights.dense import DenseWeights
from lben.weights.network import AffineMap, Matrix, Network, is_sparse

_FLOOR = 2.0**-400
"""Added to norms: more than what squares and products lose to underflow."""
_NEWTON_STEPS, _HALVINGS = 25, 6
_SLACK = 1 + 2.0**-30
"""More than the rounding of a norm of up to 2²⁰ numbers."""


@dataclass(frozen=True, kw_only=True, eq=False)
class AffineSystem:
    """The equations v_k = Σ_j W_kj z_j + b_k of a network, and how far their numbers may be off.

    Levels and blocks are counted from 1; block 0 is the normalised input.

    Attributes:
        matrices: W_kj by level and block, dense or sparse.
        biases: b_k by level.
        activations: σ_k by block.
        mean, std: of the normalisation, one number per input.
        metric: Λ of an equilibrium, positive numbers, one a unit; None for a feed-forward network.
        columns: upper bounds of the l2 norms of the columns of each W_kj.
        bias_sizes: upper bounds of ‖b_k‖₂.
        radii: how far the exact numbers may be from those stored, relative to their sizes.
        sizes: |W_kj|, or what bounds it, see Note [Numbers] of lben/weights/network.py.
        bias_magnitudes: the same for b_k.

    Example:
        >>> import torch
        >>> from lben.weights import DenseWeights
        >>> from lben.weights.activation import RELU
        >>> from lben.weights.affine_system import AffineSystem
        >>> one, zero = torch.ones(1, 1), torch.zeros(1)
        >>> weights = DenseWeights(
        ...     W=-one, U=2 * one, b=zero, C=one, D=None, b_y=zero, Lambda=one[0], gamma=None
        ... )
        >>> system = AffineSystem.of_weights(weights, RELU)
        >>> system.output, system.blocks(2), system.blocks(1), system.recurrent
        (2, (1,), (1,), True)
        >>> system.pull(0, {1: 3 * one.double()}).tolist()  # Uᵀλ
        [[6.0]]
    """

    matrices: tuple[Mapping[int, Tensor], ...]
    biases: tuple[Tensor, ...]
    activations: tuple[Activation, ...]
    mean: Float[Tensor, " p"]
    std: Float[Tensor, " p"]
    metric: Float[Tensor, " n"] | None
    columns: tuple[Mapping[int, Tensor], ...]
    bias_sizes: tuple[float, ...]
    radii: tuple[float, ...]
    sizes: tuple[Mapping[int, Tensor], ...]
    bias_magnitudes: tuple[Tensor, ...]

    @classmethod
    def of_network(
        cls, network: Network, mean: float | Tensor = 0.0, std: float | Tensor = 1.0
    ) -> AffineSystem:
        """Return the equations of a feed-forward network.

        Args:
            network: any.
            mean, std: of the normalisation: numbers, or tensors that broadcast to the input's
                shape.

        Raises:
            ValueError: if the normalisation does not fit, or a number is not finite.
        """
        maps = (*(block.affine for block in network.blocks), network.output)
        activations = tuple(block.activation for block in network.blocks)
        return cls._of(maps, activations, network.input_shape, mean, std)

    @classmethod
    def of_weights(
        cls,
        weights: DenseWeights,
        activation: Activation,
        mean: float | Tensor = 0.0,
        std: float | Tensor = 1.0,
    ) -> AffineSystem:
        """Return the equations of an equilibrium z = σ(Wz + Ux + b), y = Cz + Dx + b_y.

        Args:
            weights: float32 or float64.
            activation: σ.
            mean, std: of the normalisation: numbers, or one number per input.

        Raises:
            ValueError: if the normalisation does not fit, or a number is not finite.
        """

        def numbers(t: Tensor) -> Array:
            return t.detach().cpu().double().numpy().copy()

        w = weights
        state = AffineMap.of({0: numbers(w.U), 1: numbers(w.W)}, numbers(w.b))
        parts: dict[int, Matrix] = {1: numbers(w.C)}
        if w.D is not None:
            parts[0] = numbers(w.D)
        output = AffineMap.of(parts, numbers(w.b_y))
        system = cls._of((state, output), (activation,), w.sample_shape, mean, std)
        return replace(system, metric=torch.from_numpy(numbers(w.Lambda)))

    @classmethod
    def _of(
        cls,
        maps: tuple[AffineMap, ...],
        activations: tuple[Activation, ...],
        shape: tuple[int, ...],
        mean: float | Tensor,
        std: float | Tensor,
    ) -> AffineSystem:
        for level, affine in enumerate(maps, 1):
            numbers = [affine.bias, *(m.data if is_sparse(m) else m for m in
                                      affine.matrices.values())]  # fmt: skip
            if not all(np.isfinite(np.asarray(a)).all() for a in numbers):
                raise ValueError(
                    f"the weights of level {level} contain NaN or infinity, and nothing can be "
                    "proved of them: look for the step of training that made them"
                )
        sizes = [{j: _bound_sizes(a, j) for j in a.matrices} for a in maps]
        shift, scale = (
            _normalization(name, t, shape) for name, t in (("mean", mean), ("std", std))
        )
        if not bool(((scale > 2.0**-60) & (scale < 2.0**60) & (shift.abs() < 2.0**60)).all()):
            raise ValueError(
                f"std must be positive, and mean and std within 2^±60, got mean {mean}, std {std}"
            )
        return cls(
            matrices=tuple({j: _tensor(m) for j, m in a.matrices.items()} for a in maps),
            biases=tuple(torch.from_numpy(a.bias.copy()) for a in maps),
            activations=activations, mean=shift, std=scale, metric=None,
            columns=tuple({j: _norms(s, 0) for j, s in parts.items()} for parts in sizes),
            bias_sizes=tuple(
                float(np.linalg.norm(np.maximum(np.abs(a.bias), a.bias_size))) * _SLACK + _FLOOR
                for a in maps
            ),
            radii=tuple(a.relative_radius for a in maps),
            sizes=tuple({j: _tensor(s) for j, s in parts.items()} for parts in sizes),
            bias_magnitudes=tuple(
                torch.from_numpy(np.maximum(np.abs(a.bias), a.bias_size)) for a in maps
            ),
        )  # fmt: skip

    @property
    def recurrent(self) -> bool:
        """Whether the only block reads itself."""
        return self.metric is not None

    @property
    def output(self) -> int:
        """The level of y."""
        return len(self.biases)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all equations, activations and the normalisation."""
        tensors = {"mean": self.mean, "std": self.std}
        header = f"equations;recurrent={self.recurrent};{self.activations!r};{self.radii!r}"
        for k, parts in enumerate(self.matrices, 1):
            tensors[f"{k}.bias"] = self.biases[k - 1]
            for j, matrix in parts.items():
                if matrix.is_sparse:
                    header += f";{k}.{j}:{tuple(matrix.shape)}"
                    tensors[f"{k}.{j}.places"] = matrix.indices()
                tensors[f"{k}.{j}"] = matrix.values() if matrix.is_sparse else matrix
        return digest(header, tensors)

    @property
    def inputs(self) -> int:
        """p."""
        return len(self.mean)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of all products."""
        return self.mean.dtype

    def units(self, level: int) -> int:
        """Return how many numbers v_k has."""
        return len(self.biases[level - 1])

    def blocks(self, level: int) -> tuple[int, ...]:
        """Return the blocks that a level may depend on, besides the input."""
        return (1,) if self.recurrent else tuple(range(1, level))

    def reads(self, level: int) -> tuple[int, ...]:
        """Return the blocks that the equation of a level reads; 0 is the input."""
        return tuple(self.matrices[level - 1])

    def rows(self, level: int, block: int) -> Float[Tensor, "units columns"]:
        """Return W_kj with all its entries."""
        matrix = self.matrices[level - 1][block]
        return matrix.to_dense() if matrix.is_sparse else matrix

    def pull(
        self, block: int, multipliers: Mapping[int, Float[Tensor, "batch units"]]
    ) -> Float[Tensor, "batch columns"]:
        """Return Σ_k W_kjᵀ λ_k: what a combination of equations asks of one block.

        Args:
            block: j.
            multipliers: λ_k by level.

        Returns:
            One row per member of the batch.
        """
        batch = len(next(iter(multipliers.values())))
        width = self.inputs if block == 0 else self.units(block)
        total = torch.zeros(batch, width, dtype=self.dtype)
        for level, lam in multipliers.items():
            matrix = self.matrices[level - 1].get(block)
            if matrix is not None:
                total = total + _multiply_rows(lam, matrix)
        return total

    def push(self, level: int, states: Mapping[int, Tensor]) -> Float[Tensor, "batch units"]:
        """Return v_k for the states of the blocks, block 0 being the normalised input."""
        total = self.biases[level - 1].expand(len(next(iter(states.values()))), -1)
        for j, matrix in self.matrices[level - 1].items():
            total = total + _multiply(matrix, states[j])
        return total

    def push_sizes(self, level: int, sizes: Mapping[int, Tensor]) -> Float[Tensor, "batch units"]:
        """Return Σ_j |W_kj| s_j for non-negative numbers s, without the bias."""
        parts = (_multiply(m, sizes[j]) for j, m in self.sizes[level - 1].items())
        return torch.stack(list(parts)).sum(0)

    @torch.no_grad()
    def evaluate(self, inputs: Float[Tensor, "batch p"]) -> list[Float[Tensor, "batch units"]]:
        """Return v_1 … v_K and y for raw inputs, as computed: nothing is proved of them."""
        states = {0: (inputs - self.mean) / self.std}
        if self.recurrent:
            v = self._solve(states[0])
            states[1] = self.activations[0](v)
            return [v, self.push(2, states)]
        values = []
        for level in range(1, self.output + 1):
            values.append(self.push(level, states))
            if level < self.output:
                states[level] = self.activations[level - 1](values[-1])
        return values

    def _solve(self, x: Tensor) -> Tensor:
        """Return v = Wσ(v) + Ux + b by Newton's method, with steps halved until they descend."""
        W = self.rows(1, 1)
        drive = self.push(1, {0: x, 1: x.new_zeros(len(x), len(W))})
        v, eye = drive.clone(), torch.eye(len(W), dtype=self.dtype)

        def residual(v: Tensor) -> Tensor:
            return drive + self.activations[0](v) @ W.T - v

        for _ in range(_NEWTON_STEPS):
            r = residual(v)
            slope = slope_at(self.activations[0], v)
            step = torch.linalg.solve(eye - W * slope[:, None, :], r[:, :, None])[:, :, 0]
            size, length = torch.linalg.vector_norm(r, dim=1), torch.ones(len(v), dtype=self.dtype)
            for _ in range(_HALVINGS):
                worse = torch.linalg.vector_norm(residual(v + length[:, None] * step), dim=1) > size
                length = torch.where(worse, length / 2, length)
            v = v + length[:, None] * step
        return v

    @cached_property
    def single(self) -> AffineSystem:
        """The same equations in float32, for proposals."""
        return replace(
            self,
            matrices=tuple({j: m.float() for j, m in parts.items()} for parts in self.matrices),
            biases=tuple(b.float() for b in self.biases), mean=self.mean.float(),
            std=self.std.float(),
            metric=None if self.metric is None else self.metric.float(),
        )  # fmt: skip

    def terms(self) -> int:
        """Return an upper bound of the number of terms of any sum over levels, blocks or inputs."""
        return self.inputs + sum(len(b) for b in self.biases)

    def rate(self, level: int) -> float:
        """Return how far a sum of products with numbers of a level is off, relative to sizes."""
        return (gamma_k(self.terms() + 16) + 2 * self.radii[level - 1]) * _SLACK


def slope_at(activation: Activation, v: Tensor) -> Tensor:
    """Return σ′(v), as computed."""
    with torch.enable_grad():
        point = v.detach().requires_grad_()
        (slope,) = torch.autograd.grad(activation(point).sum(), point)
    return slope


def _normalization(name: str, value: float | Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return one float64 number per input."""
    t = torch.as_tensor(value).detach().cpu().double()
    if not bool(t.isfinite().all()):
        raise ValueError(f"{name} must be finite, got {value}")
    try:
        return torch.empty(shape, dtype=torch.float64).copy_(t.expand(shape)).reshape(-1)
    except RuntimeError:
        raise ValueError(
            f"{name} must broadcast to the input's shape {shape}, got {tuple(t.shape)}; numbers of "
            "channels need the shape (channels, 1, 1)"
        ) from None


def _bound_sizes(affine: AffineMap, block: int) -> Matrix:
    size, matrix = affine.sizes[block], abs(affine.matrices[block])
    if is_sparse(size) or is_sparse(matrix):
        return scipy.sparse.csr_array(scipy.sparse.csr_array(size).maximum(matrix))
    return np.asarray(np.maximum(size, matrix))


def _tensor(matrix: Matrix) -> Tensor:
    if not is_sparse(matrix):
        return torch.from_numpy(np.array(matrix, dtype=np.float64))
    entries = matrix.tocoo()
    index = torch.from_numpy(np.stack(entries.coords).astype(np.int64))
    values = torch.from_numpy(np.array(entries.data, dtype=np.float64))
    return torch.sparse_coo_tensor(index, values, matrix.shape, check_invariants=True).coalesce()


def _norms(sizes: Matrix, axis: int) -> Float[Tensor, " columns"]:
    """Return upper bounds of l2 norms; infinite where a square leaves the range."""
    with np.errstate(over="ignore"):
        squares = sizes.power(2) if is_sparse(sizes) else np.square(sizes)
        norms = np.sqrt(np.asarray(squares.sum(axis=axis))) * _SLACK + _FLOOR
    return torch.from_numpy(np.asarray(norms, dtype=np.float64))


def _multiply(matrix: Tensor, states: Tensor) -> Tensor:
    """Return one row Az per row z."""
    if matrix.is_sparse:
        return torch.sparse.mm(matrix, states.T).T
    return states @ matrix.T


def _multiply_rows(rows: Tensor, matrix: Tensor) -> Tensor:
    """Return one row Aᵀλ per row λ."""
    if matrix.is_sparse:
        return torch.sparse.mm(matrix.T, rows.T).T
    return rows @ matrix

"""How far is a network, evaluated in floating point, from the exact network?

Let ẑ be the states that float64 finds at x, and e_k a bound of the l2 distance of the states of an
evaluation to the exact ones. By Note [Numbers] of lben/weights/network.py, with s_k for the sum
Σ_j sizes_kj |ẑ_j| + bias_size_k,

    e_v = Σ_j ‖W_kj‖ e_j + γ (‖s_k‖₂ + 2 Σ_j ‖sizes_kj‖ e_j),   e_k = slope_k · e_v + rounding of σ.

γ counts the roundings of the evaluation and those of the numbers. At another input within r of x
the exact states differ by at most r times their gains. This makes the bound affine in r.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from lben.certificates.network_norms import NetworkNorms, network_norms
from lben.rigorous import Array, gamma_k, norms_up
from lben.weights.network import AffineMap, Network, is_sparse

_OUTWARDS = 1 + 2.0**-40
"""Far above the rounding of the float64 operations here."""


@dataclass(frozen=True, eq=False)
class Rounded:
    """The output of a network at x, with bounds of the l2 distance to the exact output.

    Attributes:
        value: y in float64, batch × q.
        error: of every evaluation that rounds as was asked for, per sample.
        slope: by how much the bound grows per unit of the distance to x.
        size: ‖s‖₂ of the output, per sample: how large the terms are that y is the sum of.
    """

    value: Array
    error: Array
    slope: float
    size: Array


class RoundingModel:
    """Bounds of the rounding of a network.

    Args:
        network: any.
    """

    def __init__(self, network: Network) -> None:
        self.network = network

    @cached_property
    def norms(self) -> NetworkNorms:
        """Norms of its maps."""
        return network_norms(self.network, products=1e8)  # a second each

    def evaluate(
        self, x: Array, dtype: torch.dtype = torch.float64, unit_error: float = 0.0
    ) -> Rounded:
        """Return y, and bounds of the rounding of every evaluation in a dtype.

        This includes evaluations module by module, of what the network was made from.

        Args:
            x: batch × the input's shape.
            dtype: float32 or float64.
            unit_error: what the activations of another runtime may be off by, in every unit.
        """
        network, norms = self.network, self.norms
        values, y = network.pre_activations(x)
        info = torch.finfo(dtype)
        scale = info.eps / 2.0**-52  # how much coarser than float64
        states = [np.asarray(x, dtype=np.float64).reshape(len(x), -1)]
        errors, slopes = [np.zeros(len(x))], [0.0]
        for k, block in enumerate(network.blocks):
            sigma = block.activation
            error, slope, _ = self._through(k, block.affine, states, errors, slopes, info)
            states.append(sigma(torch.from_numpy(values[k])).numpy())
            steep = max(abs(sigma.low), abs(sigma.high))
            relative = sigma.relative_error * scale
            absolute = sigma.absolute_error * scale + 2 * info.tiny + unit_error
            rounded = relative * norms_up(states[-1], 1) + absolute * math.sqrt(block.affine.units)
            grow = (1 + 4 * relative) * _OUTWARDS
            errors.append((steep * error + rounded) * grow)
            slopes.append((steep * slope + relative * norms.gains[k + 1]) * grow)
        error, slope, size = self._through(
            len(network.blocks), network.output, states, errors, slopes, info
        )
        return Rounded(y, np.where(np.isnan(error), np.inf, error), slope, size)

    def _through(
        self, k: int, affine: AffineMap, states: list[Array], errors: list[Array],
        slopes: list[float], info: torch.finfo,
    ) -> tuple[Array, float, Array]:  # fmt: skip
        """Return bounds of the error of v_k at x and per unit of the distance to x, and ‖s_k‖."""
        maps, sizes, gains = self.norms.maps[k], self.norms.sizes[k], self.norms.gains
        unit = gamma_k(max(affine.operations, _count_terms(affine)) + 2) * (info.eps / 2.0**-52)
        unit = unit * 2 + affine.relative_radius if unit < 0.25 else math.inf
        size = np.broadcast_to(affine.bias_size, (len(states[0]), affine.units)).copy()
        error, largest, slope = np.zeros(len(states[0])), np.ones(len(states[0])), 0.0
        for j, matrix in affine.sizes.items():
            size += np.asarray((matrix @ np.abs(states[j]).T).T)
            error = error + (maps[j] + 2 * unit * sizes[j]) * errors[j]
            slope += maps[j] * slopes[j] + unit * sizes[j] * (2 * slopes[j] + gains[j])
            largest = largest + sizes[j] + norms_up(states[j], 1)
        lost = 8 * info.tiny * (affine.operations + 4) * math.sqrt(affine.units) * largest
        terms = norms_up(size, 1)
        return (error + unit * terms + lost) * _OUTWARDS, slope * _OUTWARDS, terms


def _count_terms(affine: AffineMap) -> int:
    """Return how many products an entry of v sums at most, as stored."""
    counts = [
        int(np.diff(m.indptr).max(initial=0)) if is_sparse(m) else m.shape[1]
        for m in affine.matrices.values()
    ]
    return sum(counts) + 1

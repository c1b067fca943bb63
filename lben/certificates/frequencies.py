"""How does a convolution act on one frequency, with every rounding enclosed?

Symbols: docs/glossary.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
from torch import Tensor

from lben.certificates.inequality import Inequality
from lben.rigorous import Array, Enclosure, block
from lben.weights import ConvolutionalWeights


def at_frequencies(weights: ConvolutionalWeights, grid: tuple[int, int]) -> list[Inequality]:
    """Return the inequality of a convolutional layer at each frequency of a torus.

    A complex symbol A + iB is embedded as the real matrix [A −B; B A]. The embedding maps products
    to products and conjugate transposes to transposes. The symbols at ω and −ω are conjugate, so
    one of the two is enough.

    Args:
        weights: float64, on the CPU.
        grid: height and width of the torus.

    Returns:
        One inequality per pair of frequencies ±ω.
    """

    def evaluate(kernel: Tensor, anchor: int) -> list[Enclosure]:
        return _symbols(kernel.numpy(), grid, anchor)

    W, U, C, D = weights.W, weights.U, weights.C, weights.D
    inputs = evaluate(U, U.shape[-1] // 2)
    outputs = evaluate(C, C.shape[-1] - 1 - C.shape[-1] // 2)
    count = len(inputs)
    states: Sequence[Enclosure | None] = [None] * count
    if W is not None:
        states = evaluate(W, W.shape[-1] // 2)
    through: Sequence[Enclosure | float | None] = [None] * count
    if isinstance(D, Tensor):
        through = evaluate(D, D.shape[-1] // 2)
    elif D is not None:
        through = [D] * count
    Lambda = Enclosure(np.tile(weights.Lambda.numpy(), 2)[:, None])
    return [
        Inequality(W=w, U=u, C=c, D=d, Lambda=Lambda)
        for w, u, c, d in zip(states, inputs, outputs, through, strict=True)
    ]


def _symbols(kernel: Array, grid: tuple[int, int], anchor: int) -> list[Enclosure]:
    """Return Σₜ K[·, ·, t] exp(iω·(t − anchor)) at every frequency, embedded in the reals."""
    out, inputs, rows, columns = kernel.shape
    cos, sin = _phases((rows, columns), grid, anchor)
    flat = Enclosure(kernel.reshape(out * inputs, rows * columns))
    real, imaginary = flat @ cos, flat @ sin
    embedded = []
    for f in range(cos.mid.shape[1]):
        a, b = (
            Enclosure(e.mid[:, f].reshape(out, inputs), e.radius[:, f].reshape(out, inputs))
            for e in (real, imaginary)
        )
        embedded.append(block([[a, -b], [b, a]]))
    return embedded


def _phases(
    kernel: tuple[int, int], grid: tuple[int, int], anchor: int
) -> tuple[Enclosure, Enclosure]:
    """Return cos and sin of ω·(t − anchor), offsets × frequencies.

    The angle is reduced in integers. The reduced angle has a rounding error of at most 2π·3u, with
    u = 2⁻⁵² in any rounding mode. The cosine adds a few units in the last place. Both together are
    below 2⁻⁴⁶.
    """
    height, width = grid
    columns = []
    for j, i in product(range(height), range(width // 2 + 1)):
        columns.append(
            [
                (j * (s - anchor) * width + i * (t - anchor) * height) % (height * width)
                for s, t in product(range(kernel[0]), range(kernel[1]))
            ]
        )
    angle = 2 * np.pi * (np.array(columns, dtype=np.float64).T / (height * width))
    radius = np.full_like(angle, 2.0**-46)
    return Enclosure(np.cos(angle), radius), Enclosure(np.sin(angle), radius)

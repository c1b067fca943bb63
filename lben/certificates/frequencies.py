"""What does a convolution do to one frequency, with every rounding enclosed?"""

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

    Complex symbols A + iB are embedded as [A −B; B A], under which products and conjugate
    transposes of the one are products and transposes of the other. Of ω and −ω, whose symbols are
    conjugate, one is enough.

    Args:
        weights: float64, on the CPU.
        grid: height and width of the torus.
    """

    def at(kernel: Tensor, anchor: int) -> list[Enclosure]:
        return _symbols(kernel.numpy(), grid, anchor)

    W, U, C, D = weights.W, weights.U, weights.C, weights.D
    inputs = at(U, U.shape[-1] // 2)
    outputs = at(C, C.shape[-1] - 1 - C.shape[-1] // 2)
    count = len(inputs)
    states: Sequence[Enclosure | None] = [None] * count
    if W is not None:
        states = at(W, W.shape[-1] // 2)
    through: Sequence[Enclosure | float | None] = [None] * count
    if isinstance(D, Tensor):
        through = at(D, D.shape[-1] // 2)
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

    The angle is reduced in integers; what is left rounds by at most 2π·3u before the cosine, with
    u = 2⁻⁵² in any rounding mode, and by a few units in the last place in it: under 2⁻⁴⁶ in all.
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

"""What does a convolution do to one frequency, with every rounding enclosed?"""

from __future__ import annotations

from itertools import product

import numpy as np

from lben.inequality import Inequality
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
    k = weights.U.shape[-1]
    U = _symbols(weights.U.numpy(), grid, k // 2)
    C = _symbols(weights.C.numpy(), grid, k - 1 - k // 2)
    D = weights.D
    if D is None or isinstance(D, float):
        through: list[Enclosure] | list[float | None] = [D] * len(U)
    else:
        through = _symbols(D.numpy(), grid, D.shape[-1] // 2)
    Lambda = Enclosure(np.tile(weights.Lambda.numpy(), 2)[:, None])
    return [
        Inequality(W=None, U=u, C=c, D=d, Lambda=Lambda)
        for u, c, d in zip(U, C, through, strict=True)
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

    The angle is reduced in integers; what is left rounds by at most 2π·3u before the cosine and by
    one unit in the last place in it: under 2⁻⁴⁸ altogether.
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
    radius = np.full_like(angle, 2.0**-48)
    return Enclosure(np.cos(angle), radius), Enclosure(np.sin(angle), radius)

"""How large is the spectral norm of a matrix or of a convolution at most?

Bounds from powers of UUᵀ. Symbols: docs/glossary.md.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from lben.parameterizations.multipliers import (
    MultiplierRule,
    depth,
    gamma,
    gram,
    power_of_two,
    root,
)
from lben.weights.sizes import integer


class Spectral(MultiplierRule):
    """T = τI with τ ≥ ‖U‖₂², as in CPL (Meunier et al. 2022) and in spectral normalisation.

    For a matrix let A = UUᵀ. Then ‖A‖₂ = ‖A^(2ˢ)‖₂^(1/2ˢ) ≤ ‖A^(2ˢ)‖_F^(1/2ˢ), the Gram iteration.
    It is an upper bound at every s, which a power iteration is not, and its factor over ‖A‖₂ is at
    most n^(1/2ˢ⁺¹).

    For a convolution of images of any size with any padding, ‖U‖₂² is at most the supremum of
    ‖Û(ω)Û(ω)ᴴ‖₂ over all frequencies ω. For every x, xᴴÛ(ω)Û(ω)ᴴx is a real trigonometric
    polynomial of degree d = k − 1 in both variables. So its supremum is at most cos(πd/N)⁻² times
    its maximum on N × N equispaced points; N = 16d makes that factor 1.04. The gradient is taken at
    the frequency of the maximum.

    Args:
        squarings: s.

    Raises:
        ValueError: if squarings is negative.

    Reference:
        Delattre, Barthélemy, Araujo and Allauzen (2023), "Efficient bound of Lipschitz constant for
        convolutional layers by Gram iteration", for the iteration; Ehlich and Zeller (1964) and
        Pfister and Bresler (2018) for the supremum between points.

    Example:
        >>> import torch
        >>> from lben.parameterizations import Spectral
        >>> U = torch.diag(torch.tensor([2.0, 1.0]))
        >>> [round(t, 2) for t in Spectral(squarings=4)(U).tolist()]
        [4.0, 4.0]
    """

    def __init__(self, squarings: int = 3) -> None:
        super().__init__()
        self.squarings = integer("squarings", squarings, least=0)

    def bound(self, U: Tensor) -> Tensor:
        n = U.shape[0]
        if U.shape[1] < n:
            U = U.transpose(0, 1)  # UᵀU has the same norm
        square = self._convolution(U) if U.ndim > 2 else self._matrix(U)
        return square.expand(n)

    def _matrix(self, U: Float[Tensor, "n p"]) -> Float[Tensor, ""]:
        size = U.detach().square().sum() * (1 + gamma(U.numel() + 4, U))
        return self._norms(gram(U)[None], 1.01 * gamma(depth(U) + 4, U) * size)[0]

    def _convolution(self, U: Float[Tensor, "n p k k"]) -> Float[Tensor, ""]:
        U, k = U.double(), U.shape[-1]
        points = max(1, 16 * (k - 1))
        phases = _phases(k, points, U)
        size = U.detach().abs().sum((2, 3)).square().sum()
        # Roundings: k² terms and the phases in a symbol, 8p terms in products of symbols.
        unit = 2 * (gamma(2 * k * k + 4, U) + 2.0**-48) + gamma(8 * U.shape[1] + 8, U)
        error = 1.01 * unit * size
        with torch.no_grad():
            everywhere = self._norms(_grams(U.detach(), phases), error.detach())
            worst = everywhere.argmax().reshape(1)
        largest = self._norms(_grams(U, phases.index_select(1, worst)), error)
        # Alone, a frequency may round otherwise than among the others: take the larger bound.
        most = everywhere.index_select(0, worst)
        least = largest.detach().clamp_min(torch.finfo(largest.dtype).tiny)  # of zero weights
        ratio = torch.maximum(most, least) / least * (1 + 2.0**-40)
        between = math.cos(math.pi * (k - 1) / points) ** -2 * (1 + 2.0**-40)
        return (largest * ratio * between)[0]

    def _norms(self, P: Tensor, error: Tensor) -> Float[Tensor, " f"]:
        """Return upper bounds of ‖P + E‖₂ of positive semi-definite matrices with ‖E‖_F ≤ error.

        P is scaled by powers of two, which is exact. With e = ‖E‖_F, the computed P² differs from
        (P + E)² by at most 2e‖P‖ + e² + γ‖P‖² in the Frobenius norm.
        """
        n = P.shape[-1]
        product, total = gamma(8 * n + 8, error), gamma(2 * n * n + 8, error)
        scale = power_of_two(_parts(P.detach()).abs().amax(1))
        P, error = P / scale[:, None, None], error / scale
        for step in range(self.squarings):
            size = _frobenius(P.detach()) * (1 + total)
            unit = power_of_two(size)
            P, error, size = P / unit[:, None, None], error / unit, size / unit
            scale = scale * root(unit, step)
            error = (2 * error * size + error**2 + product * size**2) * (1 + 2.0**-20)
            P = P @ P
        sizes = _frobenius(P) * (1 + total)
        return root(sizes + error, self.squarings) * scale

    def extra_repr(self) -> str:
        """Describe the rule in `repr`."""
        return f"squarings={self.squarings}"


def _parts(P: Tensor) -> Tensor:
    """Return the real and imaginary parts of the entries, one row per matrix."""
    return (torch.view_as_real(P) if P.is_complex() else P).flatten(1)


def _frobenius(P: Tensor) -> Tensor:
    return torch.linalg.vector_norm(_parts(P), dim=1)


def _phases(k: int, points: int, like: Tensor) -> Tensor:
    """Return exp(iω·t), k² × frequencies; half of a grid of points × points suffices for real U."""
    index = torch.arange(points, device=like.device)
    tap = torch.arange(k, device=like.device)
    turns = (tap[:, None] * index) % points  # reduced in integers
    angle = turns.to(like.dtype) * (2 * math.pi / points)
    one = torch.polar(torch.ones_like(angle), angle)
    both = one[:, None, :, None] * one[None, :, None, : points // 2 + 1]
    return both.reshape(k * k, -1)


def _grams(U: Tensor, phases: Tensor) -> Tensor:
    """Return Û(ω)Û(ω)ᴴ, frequencies first."""
    symbols = (U.flatten(2).to(phases.dtype) @ phases).permute(2, 0, 1)
    return symbols @ symbols.mH

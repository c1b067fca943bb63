"""Which matrices, and which convolutions of a torus, are orthogonal? Cayley transforms.

Symbols: docs/glossary.md.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from lben.parameterizations.feedforward import PROOF_SLACK, UNIT_BOUND, FeedforwardParameterization
from lben.weights import ConvolutionalWeights, DenseWeights
from lben.weights.sizes import image_size
from solvers.precision import cast


def cayley(V: Tensor) -> Tensor:
    """Return the Cayley transforms of matrices V: orthonormal columns, (..., m, n), m ≥ n.

    With V = [A; B], A square, and S = A − Aᴴ + BᴴB it is [(I − S)(I + S)⁻¹; −2B(I + S)⁻¹].

    Reference:
        Trockman and Kolter (2021), "Orthogonalizing convolutional layers with the Cayley
        transform".
    """
    n = V.shape[-1]
    A, B = V[..., :n, :], V[..., n:, :]
    identity = torch.eye(n, dtype=V.dtype, device=V.device)
    S = A - A.mH + B.mH @ B
    inverse, info = torch.linalg.inv_ex(identity + S)
    # I + S is never singular, but its rounding may be: then NaN, which is refused later.
    inverse = torch.where((info == 0)[..., None, None], inverse, math.nan)
    return torch.cat([(identity - S) @ inverse, -2 * B @ inverse], dim=-2)


def register_orthogonal(module: nn.Module, name: str, orthogonal_map: str) -> None:
    """Register torch's orthogonal parametrization of a weight, on the meta device too.

    On that device torch cannot draw the matrix that the parametrization starts from, and leaves it
    out of the state dict; here it is an unset tensor.
    """
    weight = getattr(module, name)
    parametrizations.orthogonal(module, name, orthogonal_map=orthogonal_map)
    parametrization: Any = module.parametrizations[name][0]  # type: ignore[index]
    base = parametrization.base
    if base is None:
        base = weight.detach().new_empty([max(weight.shape)] * 2)
    if orthogonal_map == "householder":
        parametrization = _Reflections(weight, parametrization.orthogonal_map)
        module.parametrizations[name][0] = parametrization  # type: ignore[index]
    parametrization.base = base


class _Reflections(parametrizations._Orthogonal):
    """torch's Householder map, with the diagonal of X fixed at −1.

    torch truncates the diagonal to integers; it is −1 and has no gradient. Weight decay would move
    it to −0.99…, which truncates to 0, and the whole matrix would be 0.
    """

    def forward(self, X: Float[Tensor, "n m"]) -> Float[Tensor, "n m"]:
        """Return the orthogonal matrix that the off-diagonal entries of X parameterize."""
        signs = X.new_full((min(X.shape),), -1.0)
        return super().forward(torch.diagonal_scatter(X, signs))


class CayleyRows(nn.Module):
    """Map a free V, n × m with n ≤ m, to a matrix with orthonormal rows.

    For torch's `register_parametrization`. It takes one n × n inverse; torch's own Cayley map
    solves an m × m system.

    Reference:
        Trockman and Kolter (2021), "Orthogonalizing convolutional layers with the Cayley
        transform".

    Example:
        >>> import torch
        >>> from lben.parameterizations import CayleyRows
        >>> _ = torch.manual_seed(0)
        >>> Q = CayleyRows()(torch.randn(2, 3, dtype=torch.float64))
        >>> torch.allclose(Q @ Q.T, torch.eye(2, dtype=torch.float64))
        True
    """

    def forward(self, V: Float[Tensor, "n m"]) -> Float[Tensor, "n m"]:
        """Return Q with QQᵀ = I: the transpose of the Cayley transform of Vᵀ."""
        return cayley(V.T).T


class CayleyConvolution(FeedforwardParameterization):
    """Free k × k kernel V and b of y = Q ∗ x + b, QᵀQ = I (QQᵀ = I for fewer outputs than inputs).

    The symbol Q̂(ω) is the Cayley transform of V̂(ω); its columns are orthonormal at every frequency
    ω. The layer runs with the tensors (Q̂, b, s). s ≤ 1 is 1/‖Q̂‖₂ for the rounded Q̂, bounded in
    float64, so that sQ̂ has a norm of at most 1.

    Args:
        shape: of V: (q, p, k, k).
        image: height and width of the torus.
        device, dtype: as in torch.nn.

    Raises:
        ValueError: if a size is not positive, or the image smaller than the kernel.

    Reference:
        Trockman and Kolter (2021), "Orthogonalizing convolutional layers with the Cayley
        transform".
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        image: tuple[int, int],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(shape)
        shape, image = self.shape, image_size(image)
        if min(image) < shape[-1]:
            raise ValueError(
                f"a circular image of {image[0]} × {image[1]} is smaller than the kernel "
                f"({shape[-1]} × {shape[-1]})"
            )
        self.image = image
        self.V = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.b_y = nn.Parameter(torch.zeros(shape[0], device=device, dtype=dtype))
        nn.init.xavier_normal_(self.V)

    def forward(self, compute_dtype: torch.dtype) -> tuple[Tensor, ...]:
        V = torch.fft.rfft2(self.V, s=self.image).permute(2, 3, 0, 1)
        wide = V.shape[2] < V.shape[3]
        V = V.mH if wide else V
        Q = cayley(V)
        (s,) = self.in_range([self._shrink(Q)], [self.b_y])
        return (Q.mH if wide else Q), self.b_y, s

    @staticmethod
    def _shrink(Q: Tensor) -> Tensor:
        """Return s ≤ 1/‖Q̂‖₂ over all frequencies: ‖QᴴQ − I‖₂ by its row sums, in float64."""
        Q = Q.detach().to(torch.complex128)
        gap = Q.mH @ Q - torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
        # An entry of the product misses at most 8m roundings of Σ|Q||Q|, a row n entries of that.
        size = Q.abs().square().sum((-2, -1)).amax().clamp_min(1)
        defect = gap.abs().sum(-1).amax() + 64 * Q.shape[-2] ** 2 * 2.0**-52 * size
        return ((1 - PROOF_SLACK / 4) / (1 + defect).sqrt()).to(torch.float32).double()

    def blank(self, like: Tensor) -> list[Tensor]:
        rows, columns = self.image
        symbols = like.new_empty(
            (rows, columns // 2 + 1, *self.shape[:2]), dtype=like.dtype.to_complex()
        )
        b = like.new_empty(self.shape[:1])
        return [symbols, b, like.new_empty((), dtype=torch.float64)]

    def to_exact(self, compute_dtype: torch.dtype) -> tuple[Tensor, ...]:
        Q, b_y, s = self(compute_dtype)
        return Q.to(torch.complex128), cast(b_y, torch.float64), s

    def dense(self, compute_dtype: torch.dtype) -> DenseWeights:
        raise ValueError("a convolution has no dense weights: use convolutional()")

    def convolutional(self, compute_dtype: torch.dtype, *, circular: bool) -> ConvolutionalWeights:
        Q, b_y, s = self.to_exact(compute_dtype)
        D = torch.fft.irfft2((Q * s).permute(2, 3, 0, 1), s=self.image)
        q, p = D.shape[:2]
        return ConvolutionalWeights(
            U=D.new_zeros(0, p, 1, 1), b=D.new_zeros(0), C=D.new_zeros(q, 0, 1, 1), D=D,
            b_y=b_y, Lambda=D.new_zeros(0), gamma=UNIT_BOUND, circular=True,
        )  # fmt: skip

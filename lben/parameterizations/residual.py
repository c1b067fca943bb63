"""Which residual layers are 1-Lipschitz? y = x − 2UᵀT⁻¹σ(Ux + b) for every diagonal T ⪰ UUᵀ.

With W = 0, C = −2UᵀT⁻¹, D = I and Λ = 2T⁻¹ the matrix M(Λ, 1) is zero except for its lower right
block 4T⁻¹(T − UUᵀ)T⁻¹ ⪰ 0. Symbols: docs/glossary.md.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lben.parameterizations.feedforward import (
    PROOF_SLACK,
    UNIT_BOUND,
    FeedforwardParameterization,
)
from lben.parameterizations.multipliers import MultiplierRule
from lben.weights import ConvolutionalWeights, DenseWeights
from lben.weights.linear_maps import mirror, taps


class ResidualParameterization(FeedforwardParameterization):
    """Free tensors U and b of y = x − 2UᵀT⁻¹σ(Ux + b), 1-Lipschitz for every value.

    The layer runs with the tensors (U, b, 2T⁻¹). It is SLL with T from `Gershgorin`, and CPL
    (Meunier et al. 2022) with T from `Spectral`.

    Args:
        shape: of U: (n, p), or (n, p, k, k) for a convolution.
        rule: T ⪰ UUᵀ.
        device, dtype: as in torch.nn.

    Raises:
        ValueError: if a size is not positive.

    Reference:
        Araujo, Havens, Delattre, Allauzen and Hu (2023), "A unified algebraic perspective on
        Lipschitz neural networks", Theorem 1, with K = Uᵀ.

    Example:
        >>> import torch
        >>> from lben import certify
        >>> from lben.parameterizations import Gershgorin, ResidualParameterization
        >>> _ = torch.manual_seed(0)
        >>> free = ResidualParameterization((8, 4), Gershgorin(8))
        >>> weights = free.dense(torch.float32)
        >>> tuple(weights.U.shape), certify(weights).bound
        ((8, 4), 1.000001)
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        rule: MultiplierRule,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(shape)
        self.U = nn.Parameter(torch.empty(self.shape, device=device, dtype=dtype))
        self.b = nn.Parameter(torch.empty(self.shape[0], device=device, dtype=dtype))
        self.rule = rule
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw U from the normal distribution of Glorot and Bengio, b as torch.nn.Linear does."""
        nn.init.xavier_normal_(self.U)
        bound = 1 / math.sqrt(self.U[0].numel())
        nn.init.uniform_(self.b, -bound, bound)

    def forward(self, compute_dtype: torch.dtype) -> tuple[Tensor, ...]:
        U = self.rounded(self.U, compute_dtype)
        (scale,) = self.in_range([2 * (1 - PROOF_SLACK) / self.rule(U)], [self.b])
        return U, self.b, scale

    def blank(self, like: Tensor) -> list[Tensor]:
        n = self.shape[:1]
        return [like.new_empty(shape) for shape in (self.shape, n, n)]

    def dense(self, compute_dtype: torch.dtype) -> DenseWeights:
        U, b, scale = self.to_exact(compute_dtype)
        p = U.shape[1]
        return DenseWeights(
            W=U.new_zeros(len(U), len(U)), U=U, b=b, C=-U.T * scale,
            D=torch.eye(p, dtype=U.dtype, device=U.device), b_y=U.new_zeros(p),
            Lambda=scale, gamma=UNIT_BOUND,
        )  # fmt: skip

    def convolutional(self, compute_dtype: torch.dtype, *, circular: bool) -> ConvolutionalWeights:
        U, b, scale = self.to_exact(compute_dtype)
        return ConvolutionalWeights(
            U=U, b=b, C=-mirror(U) * taps(scale), D=1.0, b_y=U.new_zeros(U.shape[1]),
            Lambda=scale, gamma=UNIT_BOUND, circular=circular,
        )  # fmt: skip

"""Which layers without a skip are 1-Lipschitz? y = √2 AᵀS Ψσ(√2 Ψ⁻¹S Bx + b), S²T ⪯ I.

Wang and Manchester (2023) have S = I and [A B] with orthonormal rows. Here T ⪰ AAᵀ + BBᵀ comes from
any rule and S = T^(−½), so convolutions need nothing else. With Λ = Ψ² the matrix M(Λ, 1) has the
blocks I and 2Ψ² − 2ΨS AAᵀ SΨ on its diagonal; the Schur complement of I is
2Ψ(I − S(AAᵀ + BBᵀ)S)Ψ ⪰ 0. Symbols: docs/glossary.md.
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
from lben.weights.sizes import integer


class SandwichParameterization(FeedforwardParameterization):
    """Free tensors [A B], log Ψ, b and b_y of a sandwich layer, 1-Lipschitz for every value.

    The layer runs with the tensors (A, B, b, b_y, √2 SΨ⁻¹, √2 SΨ).

    Args:
        shape: of [A B]: (n, q + p), or (n, q + p, k, k) for a convolution.
        outputs: q.
        rule: T ⪰ [A B][A B]ᵀ.
        device, dtype: as in torch.nn.

    Raises:
        ValueError: if a size is not positive, or outputs leaves no column for inputs.

    Reference:
        Wang and Manchester (2023), "Direct parameterization of Lipschitz-bounded deep networks",
        section 3.

    Example:
        >>> import torch
        >>> from lben import certify
        >>> from lben.parameterizations import SandwichParameterization, Spectral
        >>> _ = torch.manual_seed(0)
        >>> free = SandwichParameterization((8, 3 + 4), 3, Spectral())
        >>> weights = free.dense(torch.float32)
        >>> tuple(weights.U.shape), tuple(weights.C.shape), certify(weights).bound
        ((8, 4), (3, 8), 1.000001)
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        outputs: int,
        rule: MultiplierRule,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(shape)
        shape, outputs = self.shape, integer("outputs", outputs, least=0)
        if not 0 < outputs < shape[1]:
            raise ValueError(f"outputs must lie in [1, {shape[1] - 1}], got {outputs}")

        def parameter(*size: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(size, device=device, dtype=dtype))

        self.outputs, self.rule = outputs, rule
        self.AB = parameter(*shape)
        self.log_psi, self.b, self.b_y = (
            parameter(shape[0]),
            parameter(shape[0]),
            parameter(outputs),
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw [A B] from the normal distribution of Glorot and Bengio; Ψ = I; b as torch.nn.

        A kernel is a tenth of such a draw plus an orthogonal matrix at its centre. Then T is near
        1, and the signal does not fade from layer to layer.
        """
        nn.init.xavier_normal_(self.AB)
        if self.AB.ndim > 2:
            centre = self.AB.shape[-1] // 2
            with torch.no_grad():
                own = torch.nn.init.orthogonal_(torch.empty_like(self.AB[:, :, 0, 0]))
                self.AB.mul_(0.1)[:, :, centre, centre] += own
        nn.init.zeros_(self.log_psi)
        nn.init.zeros_(self.b_y)
        bound = 1 / math.sqrt(self.AB[0].numel())
        nn.init.uniform_(self.b, -bound, bound)

    def forward(self, compute_dtype: torch.dtype) -> tuple[Tensor, ...]:
        AB = self.rounded(self.AB, compute_dtype)
        S = math.sqrt(2.0) * (1 - PROOF_SLACK / 2) * self.rule(AB).rsqrt()
        psi = self.log_psi.exp()
        A, B = AB[:, : self.outputs], AB[:, self.outputs :]
        inner, outer = self.in_range([S / psi, S * psi], [self.b, self.b_y])
        return A, B, self.b, self.b_y, inner, outer

    def blank(self, like: Tensor) -> list[Tensor]:
        (n, columns, *kernel), q = self.shape, self.outputs
        shapes = (n, q, *kernel), (n, columns - q, *kernel), (n,), (q,), (n,), (n,)
        return [like.new_empty(shape) for shape in shapes]

    def dense(self, compute_dtype: torch.dtype) -> DenseWeights:
        A, B, b, b_y, inner, outer = self.to_exact(compute_dtype)
        return DenseWeights(
            W=A.new_zeros(len(A), len(A)), U=inner[:, None] * B, b=b, C=A.T * outer, D=None,
            b_y=b_y, Lambda=outer / inner, gamma=UNIT_BOUND,
        )  # fmt: skip

    def convolutional(self, compute_dtype: torch.dtype, *, circular: bool) -> ConvolutionalWeights:
        A, B, b, b_y, inner, outer = self.to_exact(compute_dtype)
        return ConvolutionalWeights(
            U=taps(inner)[:, None] * B, b=b, C=mirror(A) * taps(outer), D=None, b_y=b_y,
            Lambda=outer / inner, gamma=UNIT_BOUND, circular=circular,
        )  # fmt: skip

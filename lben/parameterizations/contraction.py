"""Which linear maps are 1-Lipschitz? y = V T^(−½) x + b for every diagonal T ⪰ VᵀV."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lben.parameterizations.feedforward import (
    PROOF_SLACK,
    UNIT_BOUND,
    FeedforwardParameterization,
    compute,
)
from lben.parameterizations.multipliers import MultiplierRule
from lben.weights import ConvolutionalWeights, DenseWeights
from lben.weights.linear_maps import taps


class ContractionParameterization(FeedforwardParameterization):
    """Free tensors V and b of y = V T^(−½) x + b, with ‖VT^(−½)‖₂ ≤ 1 for every value.

    The layer runs with the tensors (V, b, T^(−½)). The rule for T makes its kind: AOL (Prach and
    Lampert 2022) with `Gershgorin(p, learn_q=False)`; with trained q the linear map of Araujo et
    al. (2023), Theorem 2; spectral normalisation with `Spectral()`; an orthogonal map with
    `Orthonormal()` and a parametrization of V that keeps it orthogonal.

    Args:
        shape: of V: (q, p), or (q, p, k, k) for a convolution.
        rule: T, one entry for each of the p columns of V.
        device, dtype: as in torch.nn.

    Raises:
        ValueError: if a size is not positive.

    Reference:
        Prach and Lampert (2022), "Almost-orthogonal layers for efficient general-purpose Lipschitz
        networks", Theorem 1.

    Example:
        >>> import torch
        >>> from lben import certify
        >>> from lben.parameterizations import ContractionParameterization, Spectral
        >>> _ = torch.manual_seed(0)
        >>> free = ContractionParameterization((3, 4), Spectral())
        >>> weights = free.dense(torch.float32)
        >>> tuple(weights.D.shape), certify(weights).bound
        ((3, 4), 1.000001)
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
        self.V = nn.Parameter(torch.empty(self.shape, device=device, dtype=dtype))
        self.b_y = nn.Parameter(torch.empty(self.shape[0], device=device, dtype=dtype))
        self.rule = rule
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw a linear residual map (identity plus noise) where q = p, else an orthogonal one.

        In a kernel they stand in the centre tap, with noise around. b is drawn as torch.nn.Linear
        draws it. The residual start is that of LiResNet (Hu, Zou, Wang, Leino and Fredrikson 2023).
        """
        V, (rows, columns) = self.V, (self.shape[-2] // 2, self.shape[-1] // 2)
        centre = V if V.ndim == 2 else V[:, :, rows, columns]
        bound = 1 / math.sqrt(self.V[0].numel())
        with torch.no_grad():
            nn.init.normal_(V, std=0.3 * bound)
            if self.shape[0] == self.shape[1]:
                centre.add_(torch.eye(self.shape[0], device=centre.device, dtype=centre.dtype))
            else:
                centre.copy_(nn.init.orthogonal_(torch.empty_like(centre)))
        nn.init.uniform_(self.b_y, -bound, bound)

    def forward(self, compute_dtype: torch.dtype) -> tuple[Tensor, ...]:
        V = self.rounded(compute(self, "V"), compute_dtype)
        T = self.rule(V.transpose(0, 1))
        (scale,) = self.in_range([(1 - PROOF_SLACK / 2) * T.rsqrt()], [self.b_y])
        return V, self.b_y, scale

    def blank(self, like: Tensor) -> list[Tensor]:
        return [like.new_empty(shape) for shape in (self.shape, self.shape[:1], self.shape[1:2])]

    def dense(self, compute_dtype: torch.dtype) -> DenseWeights:
        V, b_y, scale = self.to_exact(compute_dtype)
        return DenseWeights.affine(V * scale, b_y, UNIT_BOUND)

    def convolutional(self, compute_dtype: torch.dtype, *, circular: bool) -> ConvolutionalWeights:
        V, b_y, scale = self.to_exact(compute_dtype)
        q, p = V.shape[:2]
        return ConvolutionalWeights(
            U=V.new_zeros(0, p, 1, 1), b=V.new_zeros(0), C=V.new_zeros(q, 0, 1, 1),
            D=V * taps(scale), b_y=b_y, Lambda=V.new_zeros(0), gamma=UNIT_BOUND, circular=circular,
        )  # fmt: skip

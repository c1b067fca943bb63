"""How far may a computed product be from Wz, in the norm ‖z‖_Λ = √(zᵀΛz)?

By sizes alone: |W| times |z|, the number of roundings on the way, and what underflow may lose.
"""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor

from solvers.operators import running_error
from solvers.operators.memo import Memoized
from solvers.precision import cast


class RoundedProduct(Memoized):
    """The products of W and Wᵀ as floating point computes them, and the norm of Λ."""

    metric: Float[Tensor, " n"]
    """Λ, positive."""

    @property
    def n(self) -> int:
        """Number of units."""
        return self.metric.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """The type of the numbers."""
        return self.metric.dtype

    @property
    def device(self) -> torch.device:
        """Where the numbers are."""
        return self.metric.device

    def _own_metric(self) -> Tensor:
        return self.metric

    @property
    @abstractmethod
    def T(self) -> RoundedProduct:
        """Wᵀ, monotone in Λ⁻¹ where W is monotone in Λ, sharing every factor."""

    @abstractmethod
    def to(self, dtype: torch.dtype) -> RoundedProduct:
        """Return the same operator in another precision, detached; built once."""

    # Note [Rounding of a product]
    # A sum of k products, added in any order and in any number of accumulators, with or without
    # fused multiply-adds, errs by at most γ_k Σ|aᵢbᵢ| with γ_k = ku/(1 − ku), u half an eps (Higham
    # 2002, section 3.1). A further term that some accumulator starts with, as v in addmm, is one
    # more summand: γ_{k+1}(Σ|aᵢbᵢ| + |v|). Strassen's and Winograd's products are not covered; no
    # BLAS uses them by default, nor does oneDNN for the convolutions of PyTorch on a CPU, but cuDNN
    # may for float32 convolutions. What is below the smallest normal number may be flushed to zero:
    # in a product or a sum that is at most 2 of that number for each operation; in an argument it
    # is that number times the other argument, up to |W|1 for z (`losses`) and Σ|z| for W
    # (`unread`). All bounds here take eps for u, twice what is needed, are evaluated in float64,
    # and are infinite where they overflow.
    def rounding(self, z: Float[Tensor, "*batch n"]) -> Float[Tensor, " *batch"]:
        """Return a bound of the rounding error of `mv(z)` in the Λ norm, in float64.

        For the product in the dtype of z; see Note [Rounding of a product] for what it covers.
        """
        exact, finfo = self.to(torch.float64), torch.finfo(z.dtype)
        size = cast(z.detach(), torch.float64).abs()
        unit = (self.summands + 4) * finfo.eps
        lost = finfo.tiny * (exact.losses() + exact.unread(size))
        return exact.norm_above(unit * exact.magnitude(size) + lost)

    def magnitude(self, z: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        """Return |W| z for non-negative z, or more; rounding errors of Wz are below
        γ_summands · magnitude(|z|)."""
        return self._bounded(z).bound

    @property
    def summands(self) -> int:
        """The longest chain of roundings in one entry of Wz."""
        zero = torch.zeros_like(self.metric.detach())
        return self.memo(("summands", self.transposed), lambda: self._bounded(zero).depth)

    def losses(self) -> Float[Tensor, " n"]:
        """Return what Wz may lose to underflow, per unit, in units of the smallest normal number.

        2 for each operation, times what is multiplied by it later, and |W|1.
        """
        return self._bounded(torch.zeros_like(self.metric.detach())).lost

    def unread(self, size: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        """Return what Wz may miss where entries of W are read as zero, in the same units.

        At most linear in size = |z|, `losses` aside.
        """
        return self._bounded(size).lost

    @abstractmethod
    def _bounded(self, size: Tensor) -> running_error.Magnitude:
        """Return bounds of |Wz| and of its rounding for |z| ≤ size."""

    def _losses_of_sums(self) -> Float[Tensor, " n"]:
        """Return `losses` where every entry of Wz is one sum of products: 2 per operation, |W|1."""
        ones = torch.ones_like(self.metric.detach())
        return 2.0 * (self.summands + 4) + self.magnitude(ones)

    def _unread_of_sums(self, size: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        """Return `unread` where every entry of Wz is one sum of products: Σ|z|."""
        return size.sum(-1, keepdim=True).expand_as(size)

    @property
    def by_kernels(self) -> bool:
        """Whether products are convolutions by kernels, which a device may evaluate by Winograd's
        method."""
        return False

    def rounding_gain(self, dtype: torch.dtype) -> float:
        """Return r with: `rounding(z)` in this dtype is at most r ‖z‖_Λ, `losses` aside."""
        finfo = torch.finfo(dtype)
        return (self.summands + 4) * finfo.eps * self.absolute_gain() + self._unread_gain(dtype)

    def _unread_gain(self, dtype: torch.dtype) -> float:
        exact = self.to(torch.float64)
        missed = exact.norm_above(exact.unread(1 / exact.root_metric))
        return torch.finfo(dtype).tiny * float(missed)

    def absolute_gain(self) -> float:
        """Return at least ‖Λ^½ |W| Λ^(−½)‖₂ ≤ √(‖·‖₁ ‖·‖_∞), from two products with |W|."""
        return self.memo("absolute gain", self._absolute_gain)

    def _absolute_gain(self) -> float:
        exact = self.to(torch.float64)
        root = exact.root_metric
        rows = (root * exact.magnitude(1 / root)).max()
        columns = (exact.T.magnitude(root) / root).max()
        gain = float(rows.sqrt() * columns.sqrt())
        terms = self.summands + 16
        gain = gain * (1 + 2 * terms * torch.finfo(torch.float64).eps)
        return math.inf if math.isnan(gain) else gain

    def _dual_metric(self) -> Tensor:
        """Return Λ⁻¹, the metric in which Wᵀ is monotone where W is in Λ; of Wᵀ itself, Λ again."""

        def build() -> Tensor:
            other = self._memo.get(("values of Λ", not self.transposed))
            return 1 / self._own_metric().detach() if other is None else other.copies[0]

        return self.memo(("metric of the transpose", self.transposed), build)

    @property
    def root_metric(self) -> Float[Tensor, " n"]:
        """Λ^½."""
        return self.memo(("root metric", self.transposed), lambda: self.metric.detach().sqrt())

    def norm(self, z: Float[Tensor, "*batch n"]) -> Float[Tensor, " *batch"]:
        """Return ‖z‖_Λ per sample."""
        weighted = z * self.root_metric
        # Scaled by the largest entry, so that squares neither overflow nor vanish.
        largest = weighted.abs().amax(-1, keepdim=True)
        largest.clamp_min_(torch.finfo(z.dtype).tiny)
        return torch.linalg.vector_norm(weighted / largest, dim=-1) * largest.squeeze(-1)

    def norm_above(self, z: Float[Tensor, "*batch n"]) -> Float[Tensor, " *batch"]:
        """Return at least ‖z‖_Λ per sample, rounding and underflow included; infinite for NaN."""
        finfo, root = torch.finfo(z.dtype), self.root_metric
        lost = 8 * finfo.tiny * (math.sqrt(self.n) + torch.linalg.vector_norm(root))
        norm = self.norm(z) * (1 + (self.n + 16) * finfo.eps) + lost
        return torch.where(norm.isnan(), torch.inf, norm)

"""What is proved of z when a solve says that it has converged?

A solve evaluates z̃ = σ(Wz + v) and its norms in floating point. `acceptance` bounds by how much the
exact z̃ of the stored problem may differ. The bound needs nothing but ‖z‖_Λ and ‖v‖_Λ, so it holds
for all inputs of a ball before any of them is solved.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from solvers.activations import ProximalActivation
from solvers.operators import LinearOperator


@dataclass(frozen=True, kw_only=True)
class Acceptance:
    """State what holds for every z that a solve returns as converged.

        ‖z̃ − z‖_Λ ≤ tol·max(‖z̃‖_Λ, ‖z‖_Λ) + ρ,      ρ = state·‖z‖_Λ + bias·‖v‖_Λ + absolute,

    where z̃ = σ(Wz + v) is exact.

    Attributes:
        tol: the relative tolerance of the solve.
        state, bias, absolute: the coefficients of ρ, each at least 0.

    Example:
        >>> Acceptance(tol=1e-4, state=0.5, bias=0.25, absolute=0.0).rounding(2.0, 4.0) >= 2.0
        True
    """

    tol: float
    state: float
    bias: float
    absolute: float

    def rounding(self, state: float, bias: float) -> float:
        """Return an upper bound of ρ for all z and v of bounded size.

        Args:
            state: bound of ‖z‖_Λ.
            bias: bound of ‖v‖_Λ.

        Returns:
            ρ in the Λ norm, rounded upwards.
        """
        rho = self.state * state + self.bias * bias + self.absolute
        return math.inf if math.isnan(rho) else rho * (1 + 2.0**-48)


_PARTS = 24
"""What float32 products in parts leave out, in eps of float32, relative to |W||z|."""


# Note [What rounding adds]
# A loop has ẑ for z̃, and norms N̂ for norms. With u half an eps:
# - Wz + v errs by at most γ_{s+1}(|W||z| + |v|), s the longest chain of summands, wherever v enters
#   the sum; a product by Fourier transforms by its own bound (`LinearOperator.rounding_gain`) and
#   one addition. σ does not enlarge it, and adds `ProximalActivation.ulps` eps of |ẑ|, where
#   ‖ẑ‖ ≤ ‖σ(0)‖ + ‖Wz‖ + ‖v‖ up to rounding, for σ is 1-Lipschitz. Call the sum e ≥ ‖ẑ − z̃‖_Λ.
# - Each norm, with its subtraction and its root of Λ, has a relative error below η = (n + 10) eps.
#   N̂(ẑ − z) ≤ tol·max(N̂(ẑ), N̂(z)) in floating point gives ‖ẑ − z‖ ≤ tol(1 + 4η) max(‖ẑ‖, ‖z‖).
# - The kernels for CUDA multiply float32 numbers in parts, three products of TF32 or six of
#   bfloat16: what they leave out is below 3·2⁻²⁰ of |W||z|, 24 eps, where parts are truncated. The
#   tensor cores add them with truncation, so each addition errs by eps in place of u: twice γ. Of
#   six products the small ones come first, 5n additions at 2⁻⁸ of the size: 5 eps for 256 units,
#   beside 1 eps that six leave out.
# Together ‖z̃ − z‖ ≤ tol·max(‖z̃‖, ‖z‖) + (1 + tol) e + 4η tol·max(‖ẑ‖, ‖z‖). What underflows is
# bounded as in `LinearOperator.rounding`; fused loops solve in a unit of each sample, at most the
# largest |v|, in which what they lose counts.
def acceptance(operator: LinearOperator, activation: ProximalActivation, tol: float) -> Acceptance:
    """Return what is proved of every converged solve with this W, σ and tolerance.

    It holds for every loop of this package: in PyTorch, compiled, and in Triton. It also holds
    where a float32 problem continues in float64 or a float64 problem iterates in float32, because
    the residual that decides is evaluated in the dtype of the problem or a wider one.
    Reference: Higham (2002), Accuracy and Stability of Numerical Algorithms, section 3.1; see
    Note [What rounding adds].

    Args:
        operator: W, in the precision of the solve.
        activation: σ.
        tol: the relative tolerance of the solve.

    Returns:
        The coefficients of the bound, in the Λ norm.

    Raises:
        ValueError: for a float32 convolution on a CUDA device, whose products cuDNN may evaluate by
            Winograd's method: no bound is claimed there.

    Example:
        >>> from solvers import DenseOperator, ReLU
        >>> W = DenseOperator(torch.tensor([[0.0, -0.5], [0.5, 0.0]], dtype=torch.float64))
        >>> claim = acceptance(W, ReLU(), tol=1e-10)
        >>> claim.tol, claim.rounding(state=2.0, bias=2.0) < 1e-13
        (1e-10, True)
    """
    check_rounding(operator)
    exact, finfo = operator.to(torch.float64), torch.finfo(operator.dtype)
    root = exact.root_metric
    size = float(torch.linalg.vector_norm(root))
    terms = operator.summands + 8
    gain = 1 + exact.constants().L  # ‖W‖ in Λ
    ulps, eta = activation.ulps + 1, (operator.n + 10) * finfo.eps
    unit, unit_v = operator.rounding_gain(operator.dtype), terms * finfo.eps
    if operator.device.type == "cuda" and operator.dtype == torch.float32:
        unit = 2 * unit + _PARTS * finfo.eps * operator.absolute_gain()
        unit_v = 2 * unit_v
    # e = e_z ‖z‖ + e_v ‖v‖ + e_0, and the second order in a factor.
    zero = float(exact.norm(activation(exact.metric.new_zeros(1, exact.n)))[0])
    once = 1 + ulps * finfo.eps
    e_z = once * unit + ulps * finfo.eps * gain * (1 + unit) + finfo.eps * gain
    e_v = once * unit_v + ulps * finfo.eps * (1 + unit_v)
    lost = float(exact.norm_above((exact.losses() + 16.0) * torch.ones_like(root)))
    lost = finfo.tiny * (lost + 16 * math.sqrt(exact.n) + 16 * size)
    smallest = float(root.min())
    norms = 4 * eta * tol
    slack = 1 + 4 * (eta + terms * finfo.eps) + 2.0**-40
    return Acceptance(
        tol=tol,
        state=slack * ((1 + tol) * e_z + norms * (1 + gain + e_z)),
        bias=slack * ((1 + tol) * (e_v + lost / smallest) + norms * (1 + e_v + lost / smallest)),
        absolute=slack * (
            (1 + tol) * (lost + ulps * finfo.eps * zero) + norms * (2 * zero + lost)
        ),
    )  # fmt: skip


def check_rounding(operator: LinearOperator) -> None:
    """Check that the rounding of products with W is bounded.

    Raises:
        ValueError: for a float32 convolution on a CUDA device, whose products cuDNN may evaluate by
            Winograd's method.
    """
    if operator.device.type == "cuda" and operator.dtype == torch.float32 and operator.by_kernels:
        raise ValueError(
            "no bound of rounding is claimed for float32 convolutions on a CUDA device, where "
            "cuDNN may use Winograd's method: use float64 there, or float32 on a CPU"
        )

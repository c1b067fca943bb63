"""What is the problem, and how far is a point from its solution?

The problem is z = σ(Wz + v), which reads 0 ∈ (I − W)z − v + ∂f(z) where σ is the proximal operator
of a convex f. How far a point z is from the solution z*, its residual ‖σ(Wz + v) − z‖ tells: with
it `Inclusion.error_bound` bounds ‖z − z*‖.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from solvers.activations import LinearSlope, ProximalActivation, check_activation
from solvers.dependencies import Sendable
from solvers.operators import Constants, LinearOperator
from solvers.operators.base import check_tensors
from solvers.precision import cast


class NonFiniteError(ValueError):
    """Tell that a problem contains NaN or Inf.

    Example:
        >>> from solvers import DenseOperator, ReLU
        >>> v = torch.tensor([[1.0, torch.nan]])
        >>> Inclusion(DenseOperator(torch.zeros(2, 2)), v, ReLU()).check_finite()
        Traceback (most recent call last):
        solvers.inclusion.NonFiniteError: bias contains NaN or Inf in 1 of 1 samples
    """


@dataclass(frozen=True, eq=False)
class Inclusion(Sendable):
    """Pose the fixed-point problem z = σ(Wz + v), that is 0 ∈ (I − W)z − v + ∂f(z), σ = prox_f.

    Args:
        operator: W with its metric Λ.
        bias: v, one row of n numbers per sample; any leading batch dimensions.
        activation: σ.

    Raises:
        TypeError, ValueError: as `check` does.

    Example:
        >>> from solvers import DenseOperator, ReLU
        >>> W, v = torch.tensor([[0.0, -0.5], [0.5, 0.0]]), torch.ones(1, 2)
        >>> problem = Inclusion(DenseOperator(W), v, ReLU())
        >>> problem.image(torch.zeros(1, 2))  # σ(v)
        tensor([[1., 1.]])
        >>> problem.relative_residual(torch.zeros(1, 2))
        tensor([1.])
        >>> problem.error_bound(torch.zeros(1, 2)).shape
        torch.Size([1])
    """

    operator: LinearOperator
    bias: Float[Tensor, "*batch n"]
    activation: ProximalActivation

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Check that operator, bias and activation fit each other.

        Raises:
            TypeError: if the operator is no `LinearOperator`, the bias no tensor of real numbers or
                the activation no `ProximalActivation`.
            ValueError: if the bias has another number of units, dtype or device than W, or the
                activation another batch than the bias.
        """
        W, v = self.operator, self.bias
        if not isinstance(W, LinearOperator):
            raise TypeError(
                f"operator must be a LinearOperator, got {type(W).__name__}: pass DenseOperator(W) "
                "for a matrix W"
            )
        check_tensors(bias=v)
        check_activation(self.activation)
        if v.ndim < 1 or v.shape[-1] != W.n:
            raise ValueError(
                f"bias must have {W.n} units in its last dimension, got shape {tuple(v.shape)}"
            )
        if v.dtype != W.dtype or v.device != W.device:
            raise ValueError(f"bias is {v.dtype} on {v.device}, W is {W.dtype} on {W.device}")
        if isinstance(self.activation, LinearSlope):
            d = self.activation.d
            if d.shape != v.shape or d.dtype != v.dtype or d.device != v.device:
                raise ValueError(
                    f"slopes must have the shape {tuple(v.shape)}, dtype {v.dtype} and device of "
                    f"the bias, got {tuple(d.shape)}, {d.dtype} on {d.device}"
                )

    def check_finite(self) -> None:
        """Check that the bias and the weights are finite.

        Raises:
            NonFiniteError: if either contains NaN or Inf.
        """
        v = self.bias.detach()
        if not bool(torch.isfinite(v).all()):
            bad = int((~torch.isfinite(v)).reshape(-1, v.shape[-1]).any(-1).sum())
            raise NonFiniteError(
                f"bias contains NaN or Inf in {bad} of {v.numel() // max(v.shape[-1], 1)} samples"
            )
        if not all(bool(torch.isfinite(t.detach()).all()) for t in self.operator.tensors):
            raise NonFiniteError("the weights contain NaN or Inf")

    @property
    def metric(self) -> Float[Tensor, " n"]:
        """Return Λ, the diagonal metric in which every norm of this problem is taken."""
        return self.operator.metric

    def detach(self) -> Inclusion:
        """Return the same problem cut from the graph, sharing all cached factors."""
        tensors, activation = self.operator.tensors, self.activation
        slopes = (activation.d,) if isinstance(activation, LinearSlope) else ()
        if not any(t.requires_grad for t in (self.bias, *tensors, *slopes)):
            return self
        tensors = tuple(t.detach() for t in tensors)
        if isinstance(activation, LinearSlope):
            activation = LinearSlope(activation.d.detach())
        return Inclusion(self.operator.rebuild(tensors), self.bias.detach(), activation)

    def flatten(self) -> Inclusion:
        """Return the same problem with all batch dimensions merged into one."""
        if self.bias.ndim == 2:
            return self
        activation = self.activation
        if isinstance(activation, LinearSlope):
            activation = LinearSlope(activation.d.reshape(-1, self.operator.n))
        return Inclusion(self.operator, self.bias.reshape(-1, self.operator.n), activation)

    def to(self, dtype: torch.dtype) -> Inclusion:
        """Return the same problem in another precision, cut from the graph.

        Args:
            dtype: float32 or float64.
        """
        activation = self.activation
        if isinstance(activation, LinearSlope):
            activation = LinearSlope(cast(activation.d.detach(), dtype))
        return Inclusion(self.operator.to(dtype), cast(self.bias.detach(), dtype), activation)

    def select(self, index: Tensor) -> Inclusion:
        """Return the problem of the samples in `index`."""
        return Inclusion(self.operator, self.bias[index], self.activation.select(index))

    def image(self, z: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        """Return z̃ = σ(Wz + v), of the shape of z."""
        return self.activation(self.operator.affine(z, self.bias))

    def relative_residual(
        self, z: Float[Tensor, "*batch n"], allowance: Float[Tensor, " *batch"] | None = None
    ) -> Float[Tensor, " *batch"]:
        """Return ‖z̃ − z‖_Λ / max(‖z̃‖_Λ, ‖z‖_Λ) with z̃ = σ(Wz + v).

        `solvers.acceptance` bounds the rounding of this evaluation.

        Args:
            z: approximate solution.
            allowance: a number per sample, in the Λ norm, that is subtracted from the numerator,
                which then is at least 0; nothing when omitted.

        Returns:
            One number per sample; 0 where z and z̃ are both 0.
        """
        image = self.image(z)
        change, size, unit = self._sizes(z, image)
        if allowance is not None:
            change = torch.relu(change - allowance / unit)
        return change / size

    def residual_and_roundoff(
        self, z: Float[Tensor, "*batch n"]
    ) -> tuple[Float[Tensor, " *batch"], Float[Tensor, " *batch"]]:
        """Return the relative residual of z and the share of it that the rounding of v explains.

        Returns:
            `relative_residual(z)`, and 16 eps ‖v_A‖_Λ relative to the same size, both per sample.
            v_A is v on the units that are not zero in z or z̃; on the others z̃ has no rounding.
        """
        image = self.image(z)
        change, size, unit = self._sizes(z, image)
        active = self.bias * torch.logical_or(image, z)
        floor = 16 * torch.finfo(z.dtype).eps * self.operator.norm(active) / unit
        return change / size, floor / size

    def _sizes(self, z: Tensor, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return ‖z̃ − z‖_Λ, max(‖z̃‖_Λ, ‖z‖_Λ) (1 if it is 0), and the unit that both are in."""
        root = self.operator.root_metric
        change, image, z = (image - z) * root, image * root, z * root
        # In units of the largest entry no square overflows, and none that matters vanishes.
        unit = torch.maximum(image.abs(), z.abs()).amax(-1, keepdim=True)
        unit = torch.where(unit == 0, 1.0, unit)
        change, image, z = (torch.linalg.vector_norm(x / unit, dim=-1) for x in (change, image, z))
        size = torch.maximum(image, z)
        return change, torch.where(size == 0, 1.0, size), unit.squeeze(-1)

    def is_rounding_limited(
        self, z: Float[Tensor, "*batch n"], tol: float
    ) -> Bool[Tensor, " *batch"]:
        """Return of which samples the residual, less what rounding may have added, is within tol.

        Rounding enters twice. Wz + v is rounded in the dtype of the problem, and v may enter that
        sum at any place. z itself is rounded, which moves z̃ − z by up to half an ulp of
        (I + |W|)|z|.

        Args:
            z: approximate solution.
            tol: relative tolerance in the Λ norm.
        """
        operator, norm = self.operator, self.operator.norm
        eps = torch.finfo(z.dtype).eps
        sizes = norm(z) + (operator.summands + 2) * norm(self.bias)
        allowance = (operator.rounding(z) + eps * sizes).to(z.dtype)
        return self.relative_residual(z, allowance) <= tol

    @property
    def roundoff_share(self) -> float:
        """Return 16 eps: a loop at rest ascribes at most this share of ‖v‖ to rounding."""
        return 16 * torch.finfo(self.bias.dtype).eps

    @property
    def noise(self) -> Float[Tensor, " *batch"]:
        """Return 16 eps ‖v‖_Λ per sample."""
        return self.roundoff_share * self.operator.norm(self.bias)

    def error_bound(
        self, z: Float[Tensor, "*batch n"], constants: Constants | None = None
    ) -> Float[Tensor, " *batch"]:
        """Return a bound of ‖z − z*‖_Λ.

        With z̃ = σ(Wz + v), the sector condition of σ at the pairs (z̃, Wz + v) and (z*, Wz* + v)
        gives m ‖z̃ − z*‖²_Λ ≤ ⟨z̃ − z*, W(z − z̃)⟩_Λ, hence

            ‖z − z*‖_Λ ≤ ‖z − z̃‖_Λ + ‖W(z̃ − z)‖_Λ / m.

        Everything is evaluated in float64 on the problem as stored. Wz comes first and v is added
        to it in one addition, because a product that starts its accumulators with v (addmm) would
        round n times at the size of v. The rounding e of z̃ is the sum of three: that of the product
        (`LinearOperator.rounding`), of one addition, and of σ (`ProximalActivation.ulps`). It moves
        the bound by at most (1 + ‖W‖/m) ‖e‖_Λ with ‖W‖ ≤ 1 + L. Underflow is included, whether or
        not the process has subnormal numbers.

        Args:
            z: approximate solution.
            constants: proved (m, L) of the operator; the operator's own when omitted.

        Returns:
            One bound per sample, in float64. It is infinite where m ≤ 0, where z is not finite, and
            where a `LinearSlope` has slopes outside [0, 1].
        """
        exact = self.to(torch.float64)
        operator = exact.operator
        z = cast(z.detach(), torch.float64)
        constants = operator.constants() if constants is None else constants
        if constants.m <= 0:
            return torch.full(z.shape[:-1], torch.inf, dtype=torch.float64, device=z.device)
        sum_ = operator.mv(z) + exact.bias
        image = exact.activation(sum_)
        u = torch.finfo(torch.float64).eps
        own = u * sum_.abs() + exact.activation.ulps * u * image.abs()
        rounding = operator.rounding(z) + operator.norm_above(own)
        norm_W = 1 + constants.L
        moved = image - z
        product = operator.norm_above(operator.mv(moved)) + operator.rounding(moved)
        bound = operator.norm_above(moved) + product / constants.m
        if isinstance(exact.activation, LinearSlope):
            d = exact.activation.d
            bound = torch.where(((d >= 0) & (d <= 1)).all(-1), bound, torch.inf)
        # The few sums, products and the division here carry less than 16 u relative error.
        bound = (bound + (2 + 2 * norm_W / constants.m) * rounding) * (1 + 16 * u)
        return torch.where(bound.isnan(), torch.inf, bound)

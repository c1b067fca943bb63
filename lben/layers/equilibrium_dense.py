"""How is an equilibrium of vectors evaluated: by matrices, for any number of batch dimensions?"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lben.certificates import Certificate, certify
from lben.layers.autocast import leave_half
from lben.layers.equilibrium import EquilibriumLayer
from lben.layers.growth import absolute_norm, norms_up
from lben.layers.inputs import tensor
from lben.layers.roundoff import not_nan, underflow
from lben.layers.uniform import Rates
from lben.parameterizations import CompleteParameterization, DirectParameterization
from lben.parameterizations.sizes import real
from lben.radii.local import OperatingPoints, network_fingerprint
from lben.rigorous import gamma_k
from lben.weights import DenseWeights
from solvers import DenseOperator, Gradient, Method, ProximalActivation
from solvers.solution import OnFailure


class DenseEquilibriumLayer(EquilibriumLayer):
    """An equilibrium layer of vectors, with any parameterization that returns `DenseWeights`.

    Args:
        parameterization: of the weights.
        options: of `EquilibriumLayer`.
    """

    def __init__(
        self, parameterization: DirectParameterization | CompleteParameterization, **options: Any
    ) -> None:
        super().__init__(parameterization, **options)
        with torch.no_grad():
            weights = parameterization()
        self.in_features, self.hidden_features = weights.in_features, weights.hidden_features
        self.out_features = weights.out_features

    def _bias(self, weights: DenseWeights, x: Tensor) -> Tensor:
        return nn.functional.linear(x, weights.U, weights.b)

    def _readout(self, weights: DenseWeights, x: Tensor, z: Tensor) -> Tensor:
        y = nn.functional.linear(z, weights.C, weights.b_y)
        return y if weights.D is None else y + x @ weights.D.T

    def _new_operator(self, weights: DenseWeights) -> DenseOperator:
        return DenseOperator(weights.W.detach(), weights.Lambda.detach())

    def _operator_tensors(self, weights: DenseWeights) -> tuple[Tensor, ...]:
        return (weights.W,)

    def _prove(self, weights: DenseWeights) -> Certificate:
        return certify(weights)

    def _rounding(self, weights: DenseWeights, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        w, size = weights, x.abs()
        u_n, u_p = gamma_k(w.hidden_features + 4), gamma_k(w.in_features + 4)
        # A bias that an accumulator starts with is one more summand.
        v = u_p * (size @ w.U.abs().T + w.b.abs()) + underflow(w.in_features, x, w.U)
        y = u_n * (z.abs() @ w.C.abs().T + w.b_y.abs())
        y = y + underflow(w.hidden_features, z, w.C)
        if w.D is not None:
            y = y + u_p * (size @ w.D.abs().T) + underflow(w.in_features, x, w.D)
        return norms_up(v * w.Lambda.sqrt(), 1), norms_up(y, 1)

    def _rates(self, weights: DenseWeights, unit: float) -> Rates:
        w, root = weights, weights.Lambda.sqrt()
        drive, inputs = absolute_norm(root[:, None] * w.U), (w.in_features + 4) * unit
        return Rates(
            drive=drive,
            drive_rounding=inputs * drive,
            readout=(w.hidden_features + 8) * unit * absolute_norm(w.C / root),
            through=0.0 if w.D is None else (inputs + 4 * unit) * absolute_norm(w.D),
        )

    @torch.no_grad()
    def operating_points(self, x: Float[Tensor, "batch p"], proof: Certificate) -> OperatingPoints:
        """Return what is known of the layer at some inputs, for proofs around them.

        Raises:
            CertificateError: if the proof is for other weights.
        """
        if x.ndim != 2:
            raise ValueError(f"x must be (batch, p), got {tuple(x.shape)}: pass x.reshape(-1, p)")
        x = leave_half(tensor(x), self._reference().dtype)
        with self._outside_autocast():
            return self._operating_points(x, proof)

    def _operating_points(self, x: Tensor, proof: Certificate) -> OperatingPoints:
        exact, found = self._evaluated(x, proof)
        w, x, z = exact.weights, exact.x, exact.z
        moved = torch.linalg.vector_norm(w.W / w.Lambda.sqrt(), dim=1)
        unit = gamma_k(w.hidden_features + w.in_features + 8)
        size = z.abs() @ w.W.abs().T + x.abs() @ w.U.abs().T + w.b.abs()
        lost = underflow(w.hidden_features, z, w.W)
        lost = lost + underflow(w.in_features, x, w.U)
        state = exact.state_error[:, None]
        return OperatingPoints(
            v=exact.problem.operator.affine(z, exact.problem.bias),
            v_error=not_nan((state * moved + 2 * unit * size + lost) * (1 + 1e-9)),
            logits=found.value.double(),
            logit_error=found.error,
            elsewhere=found.uniform,
            fingerprint=network_fingerprint(self.weights(), self.activation),
        )

    def _check_shape(self, x: Tensor) -> None:
        if x.ndim < 1 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"expected {self.in_features} features in the last dimension of x, "
                f"got shape {tuple(x.shape)}"
            )

    def extra_repr(self) -> str:
        """Describe the layer in `repr`."""
        return (
            f"{self.in_features}, {self.hidden_features}, {self.out_features}, "
            f"gamma={self.gamma}, activation={self.activation}, method={self.method}, "
            f"tol={self.tol}"
        )


class EquilibriumLinear(DenseEquilibriumLayer):
    """y = Cz + Dx + b_y with z = σ(Wz + Ux + b), γ-Lipschitz in l2 for every parameter value.

    Args:
        in_features: p.
        hidden_features: n, equilibrium units.
        out_features: q.
        gamma: l2 Lipschitz bound of x ↦ y; None for a layer that is only well-posed.
        activation: σ.
        feedthrough: whether y has a term Dx.
        learn_metric: whether Λ is trained. gamma=None with learn_metric=False is monDEQ.
        epsilon: slack of the certificate, m ≥ epsilon.
        method: how forward and backward are solved; `Auto()` when omitted.
        gradient: what is passed back; the exact `ImplicitGradient()` when omitted.
        tol: relative tolerance of both solves, per sample, in the Λ norm.
        max_steps: iteration limit of both solves.
        on_failure: "warn" or "raise" when a sample misses the tolerance.
        device, dtype: as in torch.nn.

    Raises:
        ValueError: for sizes, gamma or epsilon that are not positive.

    Reference: Revay, Wang and Manchester (2020), arXiv 2010.01732.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int,
        *,
        gamma: float | None = 1.0,
        activation: ProximalActivation | None = None,
        feedthrough: bool = False,
        learn_metric: bool = True,
        epsilon: float = 1e-3,
        method: Method | None = None,
        gradient: Gradient | None = None,
        tol: float = 1e-4,
        max_steps: int = 5000,
        on_failure: OnFailure = "warn",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            DirectParameterization(
                in_features, hidden_features, out_features, gamma=gamma, feedthrough=feedthrough,
                learn_metric=learn_metric, epsilon=epsilon, device=device, dtype=real(dtype),
            ),
            activation=activation, method=method, gradient=gradient, tol=tol,
            max_steps=max_steps, on_failure=on_failure,
        )  # fmt: skip

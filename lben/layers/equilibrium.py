"""How is an equilibrium layer evaluated, and when may its factors be reused?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lben.certificates import Certificate, certify
from lben.parameterizations import CompleteParameterization, DirectParameterization
from lben.weights import ExplicitWeights
from solvers import (
    Auto,
    DenseOperator,
    Gradient,
    ImplicitGradient,
    Inclusion,
    Method,
    ProximalActivation,
    ReLU,
    Solution,
    equilibrium,
)
from solvers.solution import OnFailure


class EquilibriumLayer(nn.Module):
    """y = Cz + Dx + b_y with z = σ(Wz + Ux + b), the weights from a parameterization.

    Args:
        parameterization: a module that returns `ExplicitWeights` and has their γ as `gamma`.
        activation: σ; ReLU when omitted.
        method: how forward and backward are solved; `Auto()` when omitted.
        gradient: what is passed back; the exact `ImplicitGradient()` when omitted.
        tol: relative tolerance of both solves, per sample, in the Λ norm.
        max_steps: iteration limit of both solves.
        on_failure: "warn" or "raise" when a sample misses the tolerance.
    """

    def __init__(
        self,
        parameterization: DirectParameterization | CompleteParameterization,
        *,
        activation: ProximalActivation | None = None,
        method: Method | None = None,
        gradient: Gradient | None = None,
        tol: float = 1e-4,
        max_steps: int = 5000,
        on_failure: OnFailure = "warn",
    ) -> None:
        super().__init__()
        self.parameterization = parameterization
        with torch.no_grad():
            weights = parameterization()
        self.in_features, self.hidden_features = weights.in_features, weights.hidden_features
        self.out_features = weights.out_features
        self.activation = ReLU() if activation is None else activation
        self.method = Auto() if method is None else method
        self.gradient = ImplicitGradient() if gradient is None else gradient
        self.tol, self.max_steps, self.on_failure = tol, max_steps, on_failure
        self._cache: _Cache | None = None

    @property
    def gamma(self) -> float | None:
        """The Lipschitz bound that the parameterization promises."""
        return self.parameterization.gamma

    def forward(self, x: Float[Tensor, "*batch p"]) -> Float[Tensor, "*batch q"]:
        """Return y.

        Raises:
            ValueError: for a wrong feature count, dtype, device, or NaN or Inf in x.
            SolveError: if a solve misses its tolerance and on_failure is "raise".
        """
        weights = self.weights()
        return self.readout(x, self._solve(weights, x, None).value, weights)

    def readout(self, x: Tensor, z: Tensor, weights: ExplicitWeights | None = None) -> Tensor:
        """Return Cz + Dx + b_y."""
        weights = self.weights() if weights is None else weights
        y = nn.functional.linear(z, weights.C, weights.b_y)
        return y if weights.D is None else y + x @ weights.D.T

    def equilibrium(
        self, x: Float[Tensor, "*batch p"], z0: Float[Tensor, "*batch n"] | None = None
    ) -> Solution:
        """Solve for z, optionally from a warm start, and return it with its evidence."""
        return self._solve(self.weights(), x, z0)

    def _solve(self, weights: ExplicitWeights, x: Tensor, z0: Tensor | None) -> Solution:
        return equilibrium(
            self._inclusion(weights, x),
            self.method,
            tol=self.tol,
            max_steps=self.max_steps,
            z0=z0,
            gradient=self.gradient,
            on_failure=self.on_failure,
            require_monotone=False,  # m ≥ epsilon by construction
        )

    def inclusion(self, x: Float[Tensor, "*batch p"]) -> Inclusion:
        """Return the fixed-point problem of x."""
        return self._inclusion(self.weights(), x)

    def _inclusion(self, weights: ExplicitWeights, x: Tensor) -> Inclusion:
        self._check_input(x)
        v = nn.functional.linear(x, weights.U, weights.b)
        if not bool(torch.isfinite(v.detach()).all()):
            self._explain_non_finite(x)
        return Inclusion(self._operator(weights), v, self.activation)

    def weights(self) -> ExplicitWeights:
        """Return the explicit weights.

        Without grad mode, or when no parameter requires a gradient, they are computed once and
        reused until a parameter changes.
        """
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters()):
            return self.parameterization()
        cache = self._current_cache()
        if cache.weights is None:
            with torch.no_grad():
                cache.weights = self.parameterization().apply(Tensor.detach)
        return cache.weights

    def certificate(self) -> Certificate:
        """Prove the layer's bound for the weights that run now.

        Raises:
            CertificateError: if the proof fails.
        """
        with torch.no_grad():
            return certify(self.weights())

    def _operator(self, weights: ExplicitWeights) -> DenseOperator:
        cache = self._current_cache()
        if cache.operator is None:
            cache.operator = DenseOperator(weights.W.detach(), weights.Lambda.detach())
        return cache.operator.rebuild((weights.W,))

    def _current_cache(self) -> _Cache:
        parameters = tuple(self.parameters())
        if self._cache is None or not self._cache.fits(parameters):
            self._cache = _Cache.of(parameters)
        return self._cache

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": None}

    def _check_input(self, x: Tensor) -> None:
        reference = self.parameterization.b
        if x.ndim < 1 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"expected {self.in_features} features in the last dimension of x, "
                f"got shape {tuple(x.shape)}"
            )
        if x.dtype != reference.dtype:
            raise ValueError(
                f"x is {x.dtype}, the layer is {reference.dtype}: "
                f"convert one of them, for example x.to({reference.dtype})"
            )
        if x.device != reference.device:
            raise ValueError(f"x is on {x.device}, the layer on {reference.device}")

    def _explain_non_finite(self, x: Tensor) -> None:
        bad = (~torch.isfinite(x.detach())).reshape(-1, self.in_features)
        if bool(bad.any()):
            sample, feature = (int(i) for i in bad.nonzero()[0])
            raise ValueError(
                f"x contains NaN or Inf in {int(bad.any(1).sum())} of {len(bad)} samples "
                f"(first at sample {sample}, feature {feature})"
            )
        for name, parameter in self.named_parameters():
            if not bool(torch.isfinite(parameter.detach()).all()):
                raise ValueError(f"parameter {name} contains NaN or Inf: training diverged?")
        raise ValueError(f"Ux + b overflows {x.dtype}: scale the input or use float64")

    def extra_repr(self) -> str:
        """Describe the layer in `repr`."""
        return (
            f"{self.in_features}, {self.hidden_features}, {self.out_features}, "
            f"gamma={self.gamma}, activation={self.activation}, method={self.method}, "
            f"tol={self.tol}"
        )


class EquilibriumLinear(EquilibriumLayer):
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
                learn_metric=learn_metric, epsilon=epsilon, device=device, dtype=dtype,
            ),
            activation=activation, method=method, gradient=gradient, tol=tol,
            max_steps=max_steps, on_failure=on_failure,
        )  # fmt: skip


@dataclass(eq=False)
class _Cache:
    """Weights and factors of one set of parameter values.

    Note [When a parameter has changed]
    Version counters see every ordinary in-place update and give the quick "no". They miss writes
    through `.data` and swaps by `.to()`, so a "yes" is confirmed by comparing the values with a
    snapshot: one pass over the parameters, far below the cost of assembling W.
    """

    versions: tuple[int, ...]
    snapshot: tuple[Tensor, ...]
    weights: ExplicitWeights | None = None
    operator: DenseOperator | None = None

    @classmethod
    def of(cls, parameters: tuple[Tensor, ...]) -> _Cache:
        return cls(
            tuple(p._version for p in parameters), tuple(p.detach().clone() for p in parameters)
        )

    def fits(self, parameters: tuple[Tensor, ...]) -> bool:
        return self.versions == tuple(p._version for p in parameters) and all(
            p.dtype == s.dtype and p.device == s.device and torch.equal(p, s)
            for p, s in zip(parameters, self.snapshot, strict=True)
        )

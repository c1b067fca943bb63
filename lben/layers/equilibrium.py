"""How is an equilibrium layer evaluated, and when may its factors be reused?"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lben import precision
from lben.certificates import Certificate, certify
from lben.layers.inputs import non_finite, tensor
from lben.layers.roundoff import norms_above, not_nan, underflow
from lben.local import Anchors
from lben.parameterizations import CompleteParameterization, DirectParameterization
from lben.radii import logit_error
from lben.rigorous import gamma_k
from lben.weights import ExplicitWeights
from solvers import (
    Auto,
    DenseOperator,
    Gradient,
    ImplicitGradient,
    Inclusion,
    LinearOperator,
    Method,
    ProximalActivation,
    ReLU,
    Solution,
    equilibrium,
)
from solvers.activations import check_activation
from solvers.gradient import check_gradient
from solvers.method import check_method
from solvers.solution import OnFailure, check_options


class EquilibriumLayer(nn.Module, ABC):
    """y = Cz + Dx + b_y with z = σ(Wz + Ux + b), the weights from a parameterization.

    A subclass says how inputs become v = Ux + b and states become y, and which operator W is; the
    solver, its gradient and the reuse of weights and factors are the same for all.

    Args:
        parameterization: a module that returns explicit weights and has their γ as `gamma`.
        activation: σ; ReLU when omitted.
        method: how forward and backward are solved; `Auto()` when omitted.
        gradient: what is passed back; the exact `ImplicitGradient()` when omitted.
        tol: relative tolerance of both solves, per sample, in the Λ norm.
        max_steps: iteration limit of both solves.
        on_failure: "warn" or "raise" when a sample misses the tolerance.
    """

    _sample_dimensions, _entry = 1, "feature"

    def __init__(
        self,
        parameterization: nn.Module,
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
        self.activation = ReLU() if activation is None else activation
        self.method = Auto() if method is None else method
        self.gradient = ImplicitGradient() if gradient is None else gradient
        check_activation(self.activation)
        check_method(self.method)
        check_gradient(self.gradient)
        self.tol, self.max_steps = check_options(tol, max_steps, on_failure)
        self.on_failure: OnFailure = on_failure
        self._cache: _Cache | None = None

    @property
    def gamma(self) -> float | None:
        """The Lipschitz bound that the parameterization promises."""
        gamma: float | None = self.parameterization.gamma  # type: ignore[assignment]
        return gamma

    def forward(self, x: Tensor) -> Tensor:
        """Return y.

        Raises:
            ValueError: for a wrong shape, dtype, device, or NaN or Inf in x.
            SolveError: if a solve misses its tolerance and on_failure is "raise".
        """
        weights = self.weights()
        with precision.full():
            return self._readout(weights, x, self._solve(weights, x, None).value)

    def readout(self, x: Tensor, z: Float[Tensor, "*batch n"], weights: Any = None) -> Tensor:
        """Return Cz + Dx + b_y, for the weights that run now or for those given."""
        return self._readout(self.weights() if weights is None else weights, x, z)

    def equilibrium(self, x: Tensor, z0: Float[Tensor, "*batch n"] | None = None) -> Solution:
        """Solve for z, optionally from a warm start, and return it with its evidence."""
        return self._solve(self.weights(), x, z0)

    def inclusion(self, x: Tensor) -> Inclusion:
        """Return the fixed-point problem of x."""
        return self._inclusion(self.weights(), x)

    @torch.no_grad()
    def with_error(self, x: Tensor, proof: Certificate) -> tuple[Tensor, Tensor, int]:
        """Return y, a bound of its l2 distance to the exact y of x, and the most solver steps.

        y and the state are those of the precision that the layer runs in. The exact y is that of
        the same weights in real arithmetic. The bound is evaluated in float64 from the state that
        was found, so it knows nothing of how it was found, and needs no model of its rounding.

        Args:
            x: as the layer takes it, float32 or float64.
            proof: for these weights.

        Raises:
            CertificateError: if the proof is for other weights.
        """
        solution, y, error = self._evaluated(x, proof)
        return y, error, solution.stats.max_steps

    def _evaluated(self, x: Tensor, proof: Certificate) -> tuple[Solution, Tensor, Tensor]:
        """Return the state with its evidence, y, and the bound of `with_error`."""
        weights = self.weights()
        proof.check(weights)
        solution = self._solve(weights, x, None)
        with precision.full():
            y = self._readout(weights, x, solution.value)
        exact = weights.apply(Tensor.double)
        problem, z, x = self._exactly(exact, x), solution.value.double(), x.double()
        reference = self._readout(exact, x, z)
        error = logit_error(
            proof, problem.error_bound(z, proof.constants), *self._rounding(exact, x, z)
        )
        dimensions = y.ndim - x.ndim + self._sample_dimensions  # of the output of one sample
        away = norms_above((y - reference).flatten(-dimensions))
        return solution, y, error + away * (1 + 1e-9)

    def _exactly(self, exact: Any, x: Tensor) -> Inclusion:
        """Return the fixed-point problem in float64, for the same weights in float64."""
        operator = self._operator(self.weights()).to(torch.float64)
        return Inclusion(operator, self._bias(exact, x.double()), self._sigma)

    def certificate(self) -> Certificate:
        """Prove the layer's bound for the weights that run now.

        Raises:
            CertificateError: if the proof fails.
        """
        with torch.no_grad():
            return self._prove(self.weights())

    def weights(self) -> Any:
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

    @abstractmethod
    def _bias(self, weights: Any, x: Tensor) -> Float[Tensor, "*batch n"]:
        """Return v = Ux + b."""

    @abstractmethod
    def _readout(self, weights: Any, x: Tensor, z: Float[Tensor, "*batch n"]) -> Tensor:
        """Return Cz + Dx + b_y."""

    @abstractmethod
    def _new_operator(self, weights: Any) -> LinearOperator:
        """Return W as an operator."""

    @abstractmethod
    def _operator_tensors(self, weights: Any) -> tuple[Tensor, ...]:
        """Return the tensors that define W, as `LinearOperator.tensors`."""

    @abstractmethod
    def _prove(self, weights: Any) -> Certificate:
        """Prove the bound of these weights."""

    @abstractmethod
    def _rounding(self, weights: Any, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Bound the rounding of v in the Λ norm and that of y, given z, in l2; per sample."""

    @abstractmethod
    def _check_shape(self, x: Tensor) -> None:
        """Raise ValueError unless x has the layer's shape."""

    @property
    def _sigma(self) -> ProximalActivation:
        """The activation of the problem that is solved."""
        return self.activation

    def _solve(self, weights: Any, x: Tensor, z0: Tensor | None) -> Solution:
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

    def _inclusion(self, weights: Any, x: Tensor) -> Inclusion:
        self._check_input(x)
        with precision.full():
            v = self._bias(weights, x)
        if not bool(torch.isfinite(v.detach()).all()):
            raise non_finite(self, x, self._sample_dimensions, self._entry)
        return Inclusion(self._operator(weights), v, self._sigma)

    def _operator(self, weights: Any) -> LinearOperator:
        cache = self._current_cache()
        if cache.operator is None:
            cache.operator = self._new_operator(weights.apply(Tensor.detach))
        return cache.operator.rebuild(self._operator_tensors(weights))

    def _current_cache(self) -> _Cache:
        parameters = tuple(self.parameters())
        if self._cache is None or not self._cache.fits(parameters):
            self._cache = _Cache.of(parameters)
        return self._cache

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": None}

    def _check_input(self, x: Tensor) -> None:
        self._check_shape(tensor(x))
        reference = next(self.parameters())
        if x.dtype != reference.dtype:
            raise ValueError(
                f"x is {x.dtype}, the layer is {reference.dtype}: "
                f"convert one of them, for example x.to({reference.dtype})"
            )
        if x.device != reference.device:
            raise ValueError(f"x is on {x.device}, the layer on {reference.device}")


class DenseEquilibriumLayer(EquilibriumLayer):
    """An equilibrium layer of vectors, with any parameterization that returns `ExplicitWeights`.

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

    def _bias(self, weights: ExplicitWeights, x: Tensor) -> Tensor:
        return nn.functional.linear(x, weights.U, weights.b)

    def _readout(self, weights: ExplicitWeights, x: Tensor, z: Tensor) -> Tensor:
        y = nn.functional.linear(z, weights.C, weights.b_y)
        return y if weights.D is None else y + x @ weights.D.T

    def _new_operator(self, weights: ExplicitWeights) -> DenseOperator:
        return DenseOperator(weights.W, weights.Lambda)

    def _operator_tensors(self, weights: ExplicitWeights) -> tuple[Tensor, ...]:
        return (weights.W,)

    def _prove(self, weights: ExplicitWeights) -> Certificate:
        return certify(weights)

    def _rounding(self, weights: ExplicitWeights, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        w, size = weights, x.abs()
        u_n, u_p = gamma_k(w.hidden_features + 4), gamma_k(w.in_features + 4)
        # A bias that an accumulator starts with is one more summand.
        v = u_p * (size @ w.U.abs().T + w.b.abs()) + underflow(w.in_features)
        y = u_n * (z.abs() @ w.C.abs().T + w.b_y.abs()) + underflow(w.hidden_features)
        if w.D is not None:
            y = y + u_p * (size @ w.D.abs().T) + underflow(w.in_features)
        return norms_above(v * w.Lambda.sqrt()), norms_above(y)

    @torch.no_grad()
    def anchors(self, x: Float[Tensor, "batch p"], proof: Certificate) -> Anchors:
        """Return what is known of the layer at some inputs, for proofs around them.

        Raises:
            CertificateError: if the proof is for other weights.
        """
        if x.ndim != 2:
            raise ValueError(f"x must be (batch, p), got {tuple(x.shape)}: pass x.reshape(-1, p)")
        solution, logits, logit_error = self._evaluated(x, proof)
        w = self.weights().apply(Tensor.double)
        problem, z = self._exactly(w, x), solution.value.double()
        x = x.double()
        bias_error, _ = self._rounding(w, x, z)
        state_error = problem.error_bound(z, proof.constants)
        moved = torch.linalg.vector_norm(w.W / w.Lambda.sqrt(), dim=1)
        unit = gamma_k(w.hidden_features + w.in_features + 8)
        size = z.abs() @ w.W.abs().T + x.abs() @ w.U.abs().T + w.b.abs()
        lost = underflow(w.hidden_features + w.in_features)
        state = (state_error + 2 * bias_error / proof.m)[:, None]
        return Anchors(
            v=problem.operator.affine(z, problem.bias),
            v_error=not_nan((state * moved + 2 * unit * size + lost) * (1 + 1e-9)),
            logits=logits.double(),
            logit_error=logit_error,
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
    weights: Any = None
    operator: LinearOperator | None = None

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

"""How is an equilibrium layer evaluated, and when may its factors be reused?"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lben import precision
from lben.certificates import Certificate, certify
from lben.layers.autocast import outside_autocast, taken
from lben.layers.kept import KeepingLayer, OwnWeights
from lben.local import Anchors
from lben.parameterizations import CompleteParameterization, DirectParameterization
from lben.radii import logit_error
from lben.rigorous import UNIT, gamma_k
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
from solvers.dependencies import full_precision, in_autocast, nothing_may_be_kept
from solvers.solution import OnFailure


class EquilibriumLayer(KeepingLayer, ABC):
    """y = Cz + Dx + b_y with z = σ(Wz + Ux + b), the weights from a parameterization.

    A subclass says how inputs become v = Ux + b and states become y, and which operator W is; the
    solver, its gradient and the reuse of weights and factors are the same for all.

    It leaves autocast, from whose type it converts x, and takes vmap and the backward transforms of
    torch.func, over samples and weights.

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
        super().__init__(parameterization)
        self.activation = ReLU() if activation is None else activation
        self.method = Auto() if method is None else method
        self.gradient = ImplicitGradient() if gradient is None else gradient
        self.tol, self.max_steps, self.on_failure = tol, max_steps, on_failure

    @property
    def gamma(self) -> float | None:
        """The Lipschitz bound that the parameterization promises."""
        gamma: float | None = self.parameterization.gamma
        return gamma

    def forward(self, x: Tensor) -> Tensor:
        """Return y.

        Raises:
            ValueError: for a wrong shape, dtype, device, or NaN or Inf in x, or parameters in half
                precision.
            SolveError: if a solve misses its tolerance and on_failure is "raise".
        """
        x = taken(x, self._reference().dtype)
        if torch.is_grad_enabled() and in_autocast(x.device.type) and not nothing_may_be_kept():
            return outside_autocast(self, x)
        with self._outside_autocast(), precision.full():
            weights = self._weights()
            return self._readout(weights, x, self._solve(weights, x, None).value)

    def readout(self, x: Tensor, z: Float[Tensor, "*batch n"], weights: Any = None) -> Tensor:
        """Return Cz + Dx + b_y, for the weights that run now or for those given."""
        x = taken(x, self._reference().dtype)
        with self._outside_autocast():
            return self._readout(self._weights() if weights is None else weights, x, z)

    def equilibrium(self, x: Tensor, z0: Float[Tensor, "*batch n"] | None = None) -> Solution:
        """Solve for z, optionally from a warm start, and return it with its evidence."""
        x = taken(x, self._reference().dtype)
        with self._outside_autocast():
            return self._solve(self._weights(), x, z0)

    def inclusion(self, x: Tensor) -> Inclusion:
        """Return the fixed-point problem of x."""
        x = taken(x, self._reference().dtype)
        with self._outside_autocast():
            return self._inclusion(self._weights(), x)

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
        x = taken(x, self._reference().dtype)
        with self._outside_autocast():
            solution, y, error = self._evaluated(x, proof)
        return y, error, solution.stats.max_steps

    def _evaluated(self, x: Tensor, proof: Certificate) -> tuple[Solution, Tensor, Tensor]:
        """Return the state with its evidence, y, and the bound of `with_error`."""
        weights = self._weights()
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
        away = torch.linalg.vector_norm((y - reference).flatten(1), dim=1)
        return solution, y, error + away * (1 + 1e-9)

    def _exactly(self, exact: Any, x: Tensor) -> Inclusion:
        """Return the fixed-point problem in float64, for the same weights in float64."""
        operator = self._operator(self._weights()).to(torch.float64)
        return Inclusion(operator, self._bias(exact, x.double()), self._sigma)

    def certificate(self) -> Certificate:
        """Prove the layer's bound for the weights that run now.

        Raises:
            CertificateError: if the proof fails.
        """
        with torch.no_grad(), self._outside_autocast():
            return self._prove(self._weights())

    def weights(self) -> Any:
        """Return the explicit weights, also under autocast in the precision of the parameters.

        Without grad mode, or when no parameter requires a gradient, they are computed once and
        reused until a parameter, or whatever else they depend on, changes.

        Raises:
            ValueError: for parameters in half precision.
        """
        with self._outside_autocast():
            return self._weights()

    def _weights(self) -> Any:
        own = self._reference().dtype
        if own not in (torch.float32, torch.float64):
            raise ValueError(
                f"an equilibrium is solved for and proved in float32 or float64, the parameters "
                f"are {own}: convert the layer, for example by layer.float()"
            )
        if self._is_tracked() or nothing_may_be_kept():
            return self.parameterization()
        kept = self._record()
        return kept.get("weights", lambda: OwnWeights(kept.twin()), OwnWeights.is_untouched).weights

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
        # Within a transform numbers cannot be looked at: the solve says what it finds.
        if not nothing_may_be_kept() and not bool(torch.isfinite(v.detach()).all()):
            self._explain_non_finite(x)
        return Inclusion(self._operator(weights), v, self._sigma)

    def _operator(self, weights: Any) -> LinearOperator:
        operator = self._new_operator(weights.apply(Tensor.detach))
        if not nothing_may_be_kept():
            last = self._last  # another thread may set it meanwhile
            if last is not None:
                operator.adopt(last)  # whose factors serve while the values are the same
            self._last = operator
        return operator.rebuild(self._operator_tensors(weights))

    def _outside_autocast(self) -> AbstractContextManager[None]:
        return full_precision(self._reference().device.type)

    def _check_input(self, x: Tensor) -> None:
        self._check_shape(x)
        reference = self._reference()
        if x.dtype != reference.dtype:
            raise ValueError(
                f"x is {x.dtype}, the layer is {reference.dtype}: "
                f"convert one of them, for example x.to({reference.dtype})"
            )
        if x.device != reference.device:
            raise ValueError(f"x is on {x.device}, the layer on {reference.device}")

    def _explain_non_finite(self, x: Tensor) -> None:
        bad = (~torch.isfinite(x.detach())).flatten(-self._sample_dimensions)
        bad = bad.reshape(-1, bad.shape[-1])
        if bool(bad.any()):
            sample, entry = (int(i) for i in bad.nonzero()[0])
            raise ValueError(
                f"x contains NaN or Inf in {int(bad.any(1).sum())} of {len(bad)} samples "
                f"(first at sample {sample}, {self._entry} {entry})"
            )
        for name, parameter in self.named_parameters():
            if not bool(torch.isfinite(parameter.detach()).all()):
                raise ValueError(f"parameter {name} contains NaN or Inf: training diverged?")
        raise ValueError(f"Ux + b overflows {x.dtype}: scale the input or use float64")


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
        v = u_p * (size @ w.U.abs().T + w.b.abs()) * w.Lambda.sqrt()
        y = u_n * (z.abs() @ w.C.abs().T) + 4 * UNIT * w.b_y.abs()
        if w.D is not None:
            y = y + u_p * (size @ w.D.abs().T)
        return torch.linalg.vector_norm(v, dim=-1), torch.linalg.vector_norm(y, dim=-1)

    @torch.no_grad()
    def anchors(self, x: Float[Tensor, "batch p"], proof: Certificate) -> Anchors:
        """Return what is known of the layer at some inputs, for proofs around them.

        Raises:
            CertificateError: if the proof is for other weights.
        """
        x = taken(x, self._reference().dtype)
        with self._outside_autocast():
            return self._anchors(x, proof)

    def _anchors(self, x: Tensor, proof: Certificate) -> Anchors:
        solution, logits, logit_error = self._evaluated(x, proof)
        w = self._weights().apply(Tensor.double)
        problem, z = self._exactly(w, x), solution.value.double()
        x = x.double()
        bias_error, _ = self._rounding(w, x, z)
        state_error = problem.error_bound(z, proof.constants)
        moved = torch.linalg.vector_norm(w.W / w.Lambda.sqrt(), dim=1)
        unit = gamma_k(w.hidden_features + w.in_features + 8)
        size = z.abs() @ w.W.abs().T + x.abs() @ w.U.abs().T + w.b.abs()
        state = (state_error + 2 * bias_error / proof.m)[:, None]
        return Anchors(
            v=problem.operator.affine(z, problem.bias),
            v_error=(state * moved + 2 * unit * size) * (1 + 1e-9),
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

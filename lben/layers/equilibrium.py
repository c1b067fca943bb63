"""How is an equilibrium layer evaluated, and when may its factors be reused?"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from lben import precision
from lben.certificates import Certificate, sensitivity
from lben.layers.autocast import leave_half, outside_autocast
from lben.layers.cache import CachedWeights, CachingLayer
from lben.layers.graphs import is_traced, refuse_graphs
from lben.layers.growth import largest_up, norms_up
from lben.layers.hooks import refuse_hooks
from lben.layers.inputs import non_finite, tensor
from lben.layers.uniform import Rates, Running, uniform_error
from lben.radii.error_bounds import Certified
from lben.radii.margin import logit_error
from solvers import (
    Auto,
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
from solvers.acceptance import check_rounding
from solvers.dependencies import must_not_cache
from solvers.gradient import check_gradient
from solvers.methods.base import check_method
from solvers.operators.matrix import is_finite
from solvers.precision import cast, full_precision, in_autocast
from solvers.solution import OnFailure, check_options


@dataclass(frozen=True, kw_only=True, eq=False)
class _Exactly:
    """A state that was found, and its problem, in float64.

    Attributes:
        weights, x, z: as they ran, in float64.
        problem: of these weights and x.
        state_error: bound of ‖z − z*‖_Λ.
        bias_error: bound of the rounding of that v, in the Λ norm.
        output_error: bound of the rounding of y, given z, in float64.
    """

    weights: Any
    x: Tensor
    z: Tensor
    problem: Inclusion
    state_error: Tensor
    bias_error: Tensor
    output_error: Tensor


def _exact(t: Tensor) -> Tensor:
    return cast(t, torch.float64)


class EquilibriumLayer(CachingLayer, ABC):
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
        check_method(self.method)
        check_gradient(self.gradient)
        self.tol, self.max_steps = check_options(tol, max_steps, on_failure)
        self.on_failure: OnFailure = on_failure

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
        refuse_graphs(x)
        if torch.compiler.is_compiling():
            return _as_it_is(self, x)
        x = leave_half(tensor(x), self._reference().dtype)
        if is_traced() and x.dtype == torch.float32:
            x = _InFull.apply(x)  # type: ignore[no-untyped-call]
        if torch.is_grad_enabled() and in_autocast(x.device.type) and not must_not_cache():
            return outside_autocast(self, x)
        with self._outside_autocast():
            weights = self._weights()
            if x.is_meta:  # without numbers to solve for, but with the shape of their outcome
                self._check_input(x)
                return self._readout(weights, x, self._bias(weights, x))
            return self._readout(weights, x, self._solve(weights, x, None).value)

    def readout(self, x: Tensor, z: Float[Tensor, "*batch n"], weights: Any = None) -> Tensor:
        """Return Cz + Dx + b_y, for the weights that run now or for those given."""
        x = leave_half(tensor(x), self._reference().dtype)
        with self._outside_autocast():
            return self._readout(self._weights() if weights is None else weights, x, z)

    def equilibrium(self, x: Tensor, z0: Float[Tensor, "*batch n"] | None = None) -> Solution:
        """Solve for z, optionally from a warm start, and return it with its evidence."""
        x = leave_half(tensor(x), self._reference().dtype)
        with self._outside_autocast():
            return self._solve(self._weights(), x, z0)

    def inclusion(self, x: Tensor) -> Inclusion:
        """Return the fixed-point problem of x."""
        x = leave_half(tensor(x), self._reference().dtype)
        with self._outside_autocast():
            return self._inclusion(self._weights(), x)

    @torch.no_grad()
    def certified(self, x: Tensor, proof: Certificate) -> Certified:
        """Return y as the layer runs, with bounds of its distance to the exact y, here and around.

        y and the state are those of the precision that the layer runs in. The exact y is that of
        the same weights in real arithmetic. The bound at x is evaluated in float64 from the state
        that was found, so it knows nothing of how it was found, and needs no model of its rounding.
        The bound around x is that of `lben.layers.uniform`, for solves that meet the tolerance.

        Args:
            x: as the layer takes it, float32 or float64.
            proof: for these weights and images of this size.

        Raises:
            CertificateError: if the proof is for something else.
        """
        x = leave_half(tensor(x), self._reference().dtype)
        with self._outside_autocast():
            return self._evaluated(x, proof)[1]

    def with_error(self, x: Tensor, proof: Certificate) -> tuple[Tensor, Tensor, int]:
        """Return y, a bound of its l2 distance to the exact y of x, and the most solver steps.

        These are `value`, `error` and `steps` of `certified`.
        """
        found = self.certified(x, proof)
        return found.value, found.error, found.steps

    def _evaluated(self, x: Tensor, proof: Certificate) -> tuple[_Exactly, Certified]:
        """Return the problem of x in float64 with the state that was found, and what is proved."""
        refuse_hooks(self)
        weights = self._weights()
        self._check_proof(weights, proof)
        solution = self._solve(weights, x, None)
        y = self._readout(weights, x, solution.value)
        exact = self._exactly(weights, x, solution.value, proof)
        reference = self._readout(exact.weights, exact.x, exact.z)
        dimensions = y.ndim - x.ndim + self._sample_dimensions  # of the output of one sample
        away = norms_up(_exact(y) - reference, dimensions)
        # Cz moves less with the drive than ‖CΛ^(−½)‖/m allows.
        gains = sensitivity(weights, proof) if proof.sensitivity is None else proof.sensitivity
        tighter = replace(proof, m=gains.effective_m)
        error = logit_error(
            tighter, exact.problem.error_bound(exact.z, tighter.constants), exact.bias_error,
            exact.output_error,
        )  # fmt: skip
        return exact, Certified(
            value=y,
            error=error + away * (1 + 1e-9),
            uniform=uniform_error(self._running(exact, solution.value.detach(), y), gains),
            steps=solution.stats.max_steps,
        )

    def _exactly(self, weights: Any, x: Tensor, z: Tensor, proof: Certificate) -> _Exactly:
        exact = weights.apply(_exact)
        x, z = _exact(x), _exact(z)
        operator = self._operator(weights).to(torch.float64)
        problem = Inclusion(operator, self._bias(exact, x), self._sigma)
        bias_error, output_error = self._rounding(exact, x, z)
        state_error = problem.error_bound(z, proof.constants) + 2 * bias_error / proof.m
        return _Exactly(
            weights=exact, x=x, z=z, problem=problem, state_error=state_error * (1 + 1e-9),
            bias_error=bias_error, output_error=output_error,
        )  # fmt: skip

    def _running(self, exact: _Exactly, z: Tensor, y: Tensor) -> Running:
        """Return how the layer runs in a precision, and what is known at x, where it found z and y.

        Raises:
            ValueError: if the rounding of what runs is not bounded.
        """
        operator, dtype = self._operator(self._weights()), z.dtype
        check_rounding(operator)
        unit, terms = torch.finfo(dtype).eps, operator.summands + operator.n + 32
        if not terms * unit < 2.0**-4:
            raise ValueError(f"rounding in {dtype} is not bounded for sums of {terms} terms")
        # From 2⁻⁵² to half an ulp of the precision that runs (rounding to nearest), second order
        # included.
        ratio = 0.55 * unit / torch.finfo(torch.float64).eps
        norm, root = exact.problem.operator.norm_above, exact.problem.operator.root_metric
        # What underflows: a product of a and b loses up to t(1 + |a| + |b|), t the smallest normal
        # number, also where denormal numbers count as zero.
        sample = exact.x.ndim - self._sample_dimensions  # where the shape of a sample begins
        inputs, outputs = (math.prod(t.shape[sample:]) for t in (exact.x, y))
        tiny = 16 * (terms + inputs) * torch.finfo(dtype).tiny
        lost, spread = norm(torch.full_like(exact.z, tiny)), math.sqrt(outputs) * tiny
        narrow, ones = 1 / float(root.min()), norm(torch.ones_like(root)) * tiny
        size = norms_up(exact.x, self._sample_dimensions)
        state, bias = norm(exact.z), norm(exact.problem.bias) + exact.bias_error
        tensors = exact.weights.tensors()
        largest = sum(largest_up(tensors[name]) for name in ("U", "C", "D") if name in tensors)
        if isinstance(skip := getattr(exact.weights, "D", None), float):
            largest += abs(skip)
        vanished = lost * (1 + bias + largest + size + state * narrow)
        rates = self._rates(exact.weights, 0.55 * unit)
        ulps = (self.activation.ulps + 2) * unit
        return Running(
            tol=self.tol * (1 + 2.0**-20 + 4 * (operator.n + 16) * unit) + ulps,
            product=operator.rounding_gain(dtype) + float(ones) * narrow,
            sum=(operator.summands + 8) * unit,
            rates=replace(
                rates,
                drive_rounding=rates.drive_rounding + float(ones),
                readout=rates.readout + spread * narrow,
                through=rates.through + spread,
            ),
            state=state + vanished,
            state_error=exact.state_error,
            product_rounding=operator.rounding(z).double() + vanished,
            bias=bias,
            bias_rounding=ratio * exact.bias_error + vanished,
            output_rounding=(
                ratio * exact.output_error + spread * (1 + largest + size + state * narrow)
            ),
            size=size,
            unit=unit / 2,
            largest=torch.finfo(dtype).max / 16 * min(1.0, float(root.min())),
        )

    def _check_proof(self, weights: Any, proof: Certificate) -> None:
        """Raise CertificateError unless a proof is for these weights and this size of images."""
        proof.check(weights)

    def certificate(self) -> Certificate:
        """Prove the layer's bound for the weights that run now.

        Raises:
            CertificateError: if the proof fails.
        """
        with torch.no_grad(), self._outside_autocast():
            weights = self._weights()
            proof = self._prove(weights)
            return replace(proof, sensitivity=sensitivity(weights, proof))

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
        if self._is_tracked() or must_not_cache():
            return self.parameterization()
        kept = self._record()
        return kept.get(
            "weights", lambda: CachedWeights(kept.twin()), CachedWeights.is_untouched
        ).weights

    @abstractmethod
    def _bias(self, weights: Any, x: Tensor) -> Float[Tensor, "*batch n"]:
        """Return v = Ux + b."""

    @abstractmethod
    def _readout(self, weights: Any, x: Tensor, z: Float[Tensor, "*batch n"]) -> Tensor:
        """Return Cz + Dx + b_y."""

    @abstractmethod
    def _new_operator(self, weights: Any) -> LinearOperator:
        """Return W as an operator, without a graph."""

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
    def _rates(self, weights: Any, unit: float) -> Rates:
        """Return how sizes and roundings grow, for weights in float64 that run with a unit."""

    @abstractmethod
    def _check_shape(self, x: Tensor) -> None:
        """Raise ValueError unless x has the layer's shape."""

    @property
    def _sigma(self) -> ProximalActivation:
        """The activation of the problem that is solved."""
        return self.activation

    def _solve(self, weights: Any, x: Tensor, z0: Tensor | None) -> Solution:
        problem = self._inclusion(weights, x)
        return equilibrium(
            problem,
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
        v = self._bias(weights, x)
        # Within a transform numbers cannot be looked at: the solve says what it finds.
        if not v.is_meta and not must_not_cache() and not is_finite(v):
            raise non_finite(self, x, self._sample_dimensions, self._entry)
        return Inclusion(self._operator(weights), v, self._sigma)

    def _operator(self, weights: Any) -> LinearOperator:
        operator = self._new_operator(weights)
        if not must_not_cache():
            last = self._last  # another thread may set it meanwhile
            if last is not None:
                operator.adopt(last)  # whose factors serve while the values are the same
            self._last = operator
        return operator.rebuild(self._operator_tensors(weights))

    def _outside_autocast(self) -> AbstractContextManager[None]:
        return full_precision(self._reference())

    def _check_input(self, x: Tensor) -> None:
        self._check_shape(tensor(x))
        reference = self._reference()
        if x.dtype != reference.dtype:
            raise ValueError(
                f"x is {x.dtype}, the layer is {reference.dtype}: "
                f"convert one of them, for example x.to({reference.dtype})"
            )
        if x.device != reference.device:
            raise ValueError(f"x is on {x.device}, the layer on {reference.device}")


class _InFull(torch.autograd.Function):
    """x itself, refused at every run of a trace in which products would be shortened."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        precision.refuse_reduced(x.device.type, convolution=x.ndim > 2)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


@_disable_dynamo
def _as_it_is(layer: EquilibriumLayer, x: Tensor) -> Tensor:
    """Return the layer's output, which a compiler leaves alone: a solve looks at numbers."""
    y: Tensor = layer(x)
    return y

"""How is an equilibrium layer evaluated, and what is known of the answer?

One class serves every kind of weights. It asks them for an operator and for products with their
rounding, and solves z = σ(Wz + Ux + b).

Symbols: docs/glossary.md.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Generic, TypedDict, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.autograd.function import FunctionCtx

from lben import precision
from lben.certificates import (
    LayerCertificate,
    LipschitzCertificate,
    certify,
    sensitivity,
)
from lben.layers.autocast import leave_half, outside_autocast
from lben.layers.bounded import ErrorIn, refuse_other_image, require_kind
from lben.layers.cache import CachedWeights, CachingLayer
from lben.layers.graphs import is_traced, refuse_graphs
from lben.layers.hooks import refuse_hooks
from lben.layers.inputs import non_finite, tensor
from lben.layers.uniform import Running, uniform_error
from lben.parameterizations import EquilibriumParameterization
from lben.radii.error_bounds import Certified
from lben.radii.local import OperatingPoints, network_fingerprint
from lben.radii.margin import logit_error
from lben.weights import DenseWeights, Weights
from lben.weights.growth import norms_up
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
from solvers.methods import check_method
from solvers.operators.matrix import is_finite
from solvers.precision import cast, in_autocast, use_full_precision
from solvers.solution import OnFailure, check_options

W_ = TypeVar("W_", bound=Weights)


class SolveOptions(TypedDict, total=False):
    """How a layer is solved: the keyword arguments of `EquilibriumLayer`."""

    activation: ProximalActivation | None
    method: Method | None
    gradient: Gradient | None
    tol: float
    max_steps: int
    on_failure: OnFailure


@dataclass(frozen=True, kw_only=True, eq=False)
class _Evaluated:
    """The state that a solve found and the problem that it solves, both in float64.

    Attributes:
        weights, x, z: as they ran, in float64.
        problem: of these weights and x.
        state_error: bound of ‖z − z*‖_Λ.
        bias_error: bound of the rounding of v = Ux + b in that problem, in the Λ norm.
        output_error: bound of the rounding of y, given z, in float64.
    """

    weights: Weights
    x: Tensor
    z: Tensor
    problem: Inclusion
    state_error: Tensor
    bias_error: Tensor
    output_error: Tensor


def _to_exact(t: Tensor) -> Tensor:
    return cast(t, torch.float64)


class EquilibriumLayer(CachingLayer, Generic[W_]):
    """y = Cz + Dx + b_y with z = σ(Wz + Ux + b), for a parameterization of any kind of weights.

    The layer leaves autocast: it converts x from the dtype of autocast to its own. It supports vmap
    and the backward transforms of torch.func, over samples and over weights.

    Args:
        parameterization: of the weights.
        activation: σ; ReLU when omitted.
        method: how forward and backward are solved; `Auto()` when omitted.
        gradient: what is passed back; the exact `ImplicitGradient()` when omitted.
        tol: relative tolerance of both solves, per sample, in the Λ norm.
        max_steps: iteration limit of both solves.
        on_failure: "warn" or "raise" when a sample misses the tolerance.

    Raises:
        ValueError: for options out of range, or weights that are of no image size.

    Reference: Revay, Wang and Manchester (2020), arXiv 2010.01732.

    Example:
        >>> from lben.parameterizations import DirectParameterization
        >>> layer = EquilibriumLayer(DirectParameterization(4, 6, 2, gamma=0.5), tol=1e-6)
        >>> layer(torch.ones(3, 4)).shape, layer.certificate().bound
        (torch.Size([3, 2]), 0.5)
    """

    parameterization: EquilibriumParameterization[W_]

    def __init__(
        self,
        parameterization: EquilibriumParameterization[W_],
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
        with torch.no_grad():
            weights: W_ = parameterization()
        self._sample_shape, self._entry = weights.sample_shape, weights.entry

    @property
    def gamma(self) -> float | None:
        """The Lipschitz bound that the parameterization promises."""
        return self.parameterization.gamma

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """The shape of one x."""
        return self._sample_shape

    def forward(self, x: Tensor) -> Tensor:
        """Return y.

        Raises:
            ValueError: for a wrong shape, dtype, device, or NaN or Inf in x, or parameters in half
                precision.
            SolveError: if a solve misses its tolerance and on_failure is "raise".
        """
        refuse_graphs(x)
        if torch.compiler.is_compiling():
            return _run_eagerly(self, x)
        x = leave_half(tensor(x), self._reference().dtype)
        if is_traced() and x.dtype == torch.float32:
            x = _InFull.apply(x)  # type: ignore[no-untyped-call]
        if torch.is_grad_enabled() and in_autocast(x.device.type) and not must_not_cache():
            return outside_autocast(self, x)
        with self._outside_autocast():
            weights = self._weights()
            if x.is_meta:  # a meta tensor has no numbers to solve for: only the shape is returned
                self._check_input(weights, x)
                return weights.readout(x, weights.drive(x))
            return weights.readout(x, self._solve(weights, x, None).value)

    def readout(
        self, x: Tensor, z: Float[Tensor, "*batch n"], weights: Weights | None = None
    ) -> Tensor:
        """Return Cz + Dx + b_y, for the weights that run now or for those given."""
        x = leave_half(tensor(x), self._reference().dtype)
        with self._outside_autocast():
            return (self._weights() if weights is None else weights).readout(x, z)

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
    def forward_with_error(
        self,
        x: Tensor,
        certificate: LipschitzCertificate,
        error_in: ErrorIn = 0.0,
    ) -> Certified:
        """Return y as the layer runs, with bounds of its distance to the exact y, here and around.

        The layer computes y and the state in the precision that it runs in. The exact y is computed
        from the same weights in real arithmetic. The bound at x is evaluated in float64 from the
        state alone, so it holds however the state was found and needs no model of the solver's
        rounding. The bound around x is `lben.layers.uniform.uniform_error`; it holds for solves
        that meet the tolerance.

        Args:
            x: as the layer takes it, float32 or float64.
            certificate: for these weights and images of this size.
            error_in: bound of the l2 distance of x to the exact input, per sample.

        Returns:
            y with bounds of ‖y − y*‖₂ per sample: at x, and at every input in a ball around x.

        Raises:
            CertificateError: if the certificate is for something else.
        """
        x = leave_half(tensor(x), self._reference().dtype)
        with self._outside_autocast():
            found = self._evaluate(x, self._check(certificate))[1]
            return found.after(error_in, certificate.bound)

    @torch.no_grad()
    def operating_points(
        self, x: Float[Tensor, "batch p"], certificate: LipschitzCertificate
    ) -> OperatingPoints:
        """Return the operating points of the layer at some inputs, for proofs around these inputs.

        Raises:
            ValueError: if x is no batch of features, or the layer is not of dense weights.
            CertificateError: if the certificate is for other weights.
        """
        if x.ndim != 2:
            raise ValueError(f"x must be (batch, p), got {tuple(x.shape)}: pass x.reshape(-1, p)")
        x = leave_half(tensor(x), self._reference().dtype)
        with self._outside_autocast():
            evaluated, found = self._evaluate(x, self._check(certificate))
            weights, own = evaluated.weights, self._weights()
            if not isinstance(weights, DenseWeights) or not isinstance(own, DenseWeights):
                raise ValueError(
                    f"proofs around inputs are for dense weights, the layer has "
                    f"{type(weights).__name__}"
                )
            x, z, problem = evaluated.x, evaluated.z, evaluated.problem
            return OperatingPoints(
                v=problem.operator.affine(z, problem.bias),
                v_error=weights.preactivation_error(x, z, evaluated.state_error),
                logits=found.value.double(),
                logit_error=found.error,
                elsewhere=found.uniform,
                fingerprint=network_fingerprint(own, self.activation),
            )

    def _evaluate(self, x: Tensor, proof: LayerCertificate) -> tuple[_Evaluated, Certified]:
        """Return the solved problem of x in float64, and y with its proved error bounds."""
        weights = self._weights()
        solution = self._solve(weights, x, None)
        y = weights.readout(x, solution.value)
        exact = self._in_float64(weights, x, solution.value, proof)
        reference = exact.weights.readout(exact.x, exact.z)
        dims = y.ndim - x.ndim + len(self._sample_shape)  # of the output of one sample
        away = norms_up(_to_exact(y) - reference, dims)
        # The proved gain from the drive to Cz is smaller than ‖CΛ^(−½)‖/m.
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

    def _in_float64(
        self, weights: Weights, x: Tensor, z: Tensor, proof: LayerCertificate
    ) -> _Evaluated:
        exact = weights.apply(_to_exact)
        x, z = _to_exact(x), _to_exact(z)
        operator = self._operator(weights).to(torch.float64)
        problem = Inclusion(operator, exact.drive(x), weights.restrict(self.activation))
        rounding = exact.rounding(x, z)
        state_error = problem.error_bound(z, proof.constants) + 2 * rounding.drive / proof.m
        return _Evaluated(
            weights=exact, x=x, z=z, problem=problem, state_error=state_error * (1 + 1e-9),
            bias_error=rounding.drive, output_error=rounding.output,
        )  # fmt: skip

    def _running(self, exact: _Evaluated, z: Tensor, y: Tensor) -> Running:
        """Return the error model of the layer in the dtype of z, for `uniform_error` around x.

        Raises:
            ValueError: if the rounding of what runs is not bounded.
        """
        operator, dtype = self._operator(self._weights()), z.dtype
        check_rounding(operator)
        unit, terms = torch.finfo(dtype).eps, operator.summands + operator.n + 32
        if not terms * unit < 2.0**-4:
            raise ValueError(f"rounding in {dtype} is not bounded for sums of {terms} terms")
        # Bounds in float64 count 2⁻⁵² per rounding. In the dtype that runs a rounding to nearest is
        # half an ulp; 0.55 in place of 0.5 covers the second order.
        ratio = 0.55 * unit / torch.finfo(torch.float64).eps
        norm, root = exact.problem.operator.norm_above, exact.problem.operator.root_metric
        # Underflow: a product of a and b loses at most t(1 + |a| + |b|), with t the smallest normal
        # number, even if denormal numbers are read as zero.
        sample = exact.x.ndim - len(self._sample_shape)  # where the shape of a sample begins
        inputs, outputs = (math.prod(t.shape[sample:]) for t in (exact.x, y))
        tiny = 16 * (terms + inputs) * torch.finfo(dtype).tiny
        lost, spread = norm(torch.full_like(exact.z, tiny)), math.sqrt(outputs) * tiny
        narrow, ones = 1 / float(root.min()), norm(torch.ones_like(root)) * tiny
        size = norms_up(exact.x, len(self._sample_shape))
        state, bias = norm(exact.z), norm(exact.problem.bias) + exact.bias_error
        largest = exact.weights.largest()
        vanished = lost * (1 + bias + largest + size + state * narrow)
        rates = exact.weights.rates(0.55 * unit)
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

    def _check(self, proof: LipschitzCertificate) -> LayerCertificate:
        """Refuse a certificate that is not for the weights that run now, or hooks.

        Raises:
            CertificateError: naming the difference.
        """
        refuse_hooks(self)
        certificate = require_kind(proof, LayerCertificate, "an equilibrium layer")
        weights = self._weights()
        certificate.check(weights)
        weights.check_sums()
        return certificate

    def certificate(self, image: tuple[int, ...] | None = None) -> LayerCertificate:
        """Prove the layer's bound for the weights that run now.

        Args:
            image: height and width, or the shape of one sample; may be omitted, as the layer is
                made for one size.

        Returns:
            The proved bound with m, L and the gains of errors.

        Raises:
            ValueError: for another image size.
            CertificateError: if the proof fails.
        """
        if len(self._sample_shape) == 3:
            refuse_other_image(image, self._sample_shape, "the layer")
        with torch.no_grad(), self._outside_autocast():
            weights = self._weights()
            proof = certify(weights)
            return replace(proof, sensitivity=sensitivity(weights, proof))

    def weights(self) -> W_:
        """Return the explicit weights in the precision of the parameters, also under autocast.

        Without grad mode, or when no parameter requires a gradient, they are cached until a
        parameter or another tensor that they depend on changes.

        Raises:
            ValueError: for parameters in half precision.
        """
        with self._outside_autocast():
            return self._weights()

    def _weights(self) -> W_:
        own = self._reference().dtype
        if own not in (torch.float32, torch.float64):
            raise ValueError(
                f"an equilibrium is solved for and proved in float32 or float64, the parameters "
                f"are {own}: convert the layer, for example by layer.float()"
            )
        if self._is_tracked() or must_not_cache():
            return self.parameterization()
        cache = self._cache()
        return cache.get(
            "weights", lambda: CachedWeights(cache.twin()), CachedWeights.is_untouched
        ).weights

    def _solve(self, weights: Weights, x: Tensor, z0: Tensor | None) -> Solution:
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

    def _inclusion(self, weights: Weights, x: Tensor) -> Inclusion:
        self._check_input(weights, x)
        v = weights.drive(x)
        # Inside a transform of torch.func values cannot be read: the solve reports NaN and Inf.
        if not v.is_meta and not must_not_cache() and not is_finite(v):
            raise non_finite(self, x, len(self._sample_shape), self._entry)
        return Inclusion(self._operator(weights), v, weights.restrict(self.activation))

    def _operator(self, weights: Weights) -> LinearOperator:
        operator = weights.operator()
        if not must_not_cache():
            last = self._last  # another thread may set it meanwhile
            if last is not None:
                operator.adopt(last)  # whose factors serve while the values are the same
            self._last = operator
        return operator.rebuild(weights.operator_tensors())

    def _outside_autocast(self) -> AbstractContextManager[None]:
        return use_full_precision(self._reference())

    def _check_input(self, weights: Weights, x: Tensor) -> None:
        weights.check_input(tensor(x))
        reference = self._reference()
        if x.dtype != reference.dtype:
            raise ValueError(
                f"x is {x.dtype}, the layer is {reference.dtype}: "
                f"convert one of them, for example x.to({reference.dtype})"
            )
        if x.device != reference.device:
            raise ValueError(f"x is on {x.device}, the layer on {reference.device}")

    def extra_repr(self) -> str:
        """Describe the layer in `repr`."""
        return (
            f"gamma={self.gamma}, activation={self.activation}, method={self.method}, "
            f"tol={self.tol}"
        )


class _InFull(torch.autograd.Function):
    """Return x itself; refuse every run of a trace in which float32 products are shortened."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        precision.refuse_reduced(x.device.type, convolution=x.ndim > 2)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: FunctionCtx, g: Tensor) -> Tensor:
        return g


@_disable_dynamo
def _run_eagerly(layer: EquilibriumLayer[W_], x: Tensor) -> Tensor:
    """Return the layer's output outside of any compiled graph: a solve reads values."""
    y: Tensor = layer(x)
    return y

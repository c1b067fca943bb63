"""How is an explicit 1-Lipschitz layer evaluated at the cost of its products alone?"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import replace

import torch
from torch import Tensor

from lben import precision
from lben.certificates import Certificate, certify, certify_convolution
from lben.convolutional import ConvolutionalWeights
from lben.layers.kept import KeepingLayer, Running
from lben.layers.maps import Convolution, LinearMap
from lben.parameterizations import (
    ContractionParameterization,
    ExplicitParameterization,
    ResidualParameterization,
    SandwichParameterization,
)
from lben.weights import ExplicitWeights
from solvers import ProximalActivation, ReLU, fused
from solvers.dependencies import full_precision, in_autocast, nothing_may_be_kept, read


class ExplicitLayer(KeepingLayer, ABC):
    """A layer whose multiplier T is computed once per change of its parameters.

    In eval mode a call is the layer's products and one pointwise pass. In training T is computed
    for the first forward pass after a step of the optimizer and kept with its graph, so that
    gradient accumulation pays for it once; a gradient to be differentiated again computes it anew.
    Under `torch.compile` nothing is kept and T is part of the compiled graph.

    float32 runs in float32, whatever torch allows its products to be rounded to (TF32 convolutions
    are torch's default on CUDA); a compiled graph obeys the settings of torch.backends, which have
    to be "ieee" for the certificate to be about it. Under autocast weights are rounded to its type
    first, and T is that of the rounded weights: the bound holds for what runs. The skip connection
    keeps the precision of the input; layers without one return bfloat16.

    Args:
        parameterization: of the weights.
        map: how they act.
        inputs: features or channels of x.
    """

    def __init__(
        self, parameterization: ExplicitParameterization, map: LinearMap, inputs: int
    ) -> None:
        super().__init__(parameterization)
        self.map, self.inputs = map, inputs

    @abstractmethod
    def evaluate(self, x: Tensor, run: torch.dtype, tensors: tuple[Tensor, ...]) -> Tensor:
        """Return y from the tensors that run, with products in the precision `run`."""

    @abstractmethod
    def _rounding(self, size: Tensor, tensors: tuple[Tensor, ...], pixels: int) -> Tensor:
        """Bound the rounding error of y from ‖x‖₂, without the factor γ_k."""

    def forward(self, x: Tensor) -> Tensor:
        """Return y.

        Raises:
            ValueError: for a wrong shape, device or dtype, or parameters in half precision.
        """
        self.map.check(tuple(x.shape), self.inputs)
        run = self._precision(x)
        with full_precision(x.device.type):
            if torch.compiler.is_compiling():
                return self.evaluate(x, run, self._tensors(run))
            with precision.full():
                return self.evaluate(x, run, self._tensors(run))

    def _precision(self, x: Tensor) -> torch.dtype:
        reference = self._reference()
        if reference.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"parameters must be float32 or float64, got {reference.dtype}: T cannot be "
                "bounded in it; use torch.autocast with bfloat16 for speed"
            )
        if x.device != reference.device:
            raise ValueError(f"x is on {x.device}, the layer on {reference.device}")
        if in_autocast(x.device.type):
            run = torch.get_autocast_dtype(x.device.type)
            if run != torch.bfloat16:
                raise ValueError(f"autocast to {run} overflows in T⁻¹: use bfloat16")
            return run
        if x.dtype != reference.dtype:
            raise ValueError(
                f"x is {x.dtype}, the layer is {reference.dtype}: convert one of them, "
                "or use torch.autocast"
            )
        return reference.dtype

    def _tensors(self, run: torch.dtype) -> tuple[Tensor, ...]:
        """Return what runs, computed or kept."""
        track = self._is_tracked()
        parameters = tuple(self.parameterization.parameters())
        own = {id(p) for p in parameters}
        if nothing_may_be_kept() or (track and self._has_strays(own)):
            return self.parameterization(run)
        running = self._running(run, tuple(p.requires_grad for p in parameters) if track else ())
        return running.attach(parameters) if track else running.values

    def _running(self, run: torch.dtype, tracked: tuple[bool, ...] = ()) -> Running:
        kept = self._record()
        return kept.get(
            ("runs", run),
            lambda: Running(kept, run, tracked),
            lambda running: tracked in ((), running.tracked),
        )

    def _has_strays(self, parameters: set[int]) -> bool:
        """Say whether another tensor than the parameters is to get a gradient."""
        tensors, _ = read(self.parameterization)
        return any(t.requires_grad and id(t) not in parameters for t in tensors)

    def weights(self, run: torch.dtype | None = None) -> ExplicitWeights | ConvolutionalWeights:
        """Return the float64 weights of the layer as it runs in a precision (its own if None)."""
        return self._weights(self.parameterization, self._reference().dtype if run is None else run)

    @torch.no_grad()
    def _weights(
        self, parameterization: ExplicitParameterization, run: torch.dtype
    ) -> ExplicitWeights | ConvolutionalWeights:
        if isinstance(self.map, Convolution):
            kernels = parameterization.convolutional(run, circular=self.map.circular)
            return kernels.apply(Tensor.detach)
        return parameterization.dense(run).apply(Tensor.detach)

    def certificate(
        self, image: tuple[int, int] | None = None, *, run: torch.dtype | None = None
    ) -> Certificate:
        """Prove the layer's bound for the weights that run.

        A stride leaves rows of the map out, which changes no bound.

        Args:
            image: height and width of the images, for a convolution.
            run: precision; that of the parameters when None.

        Raises:
            ValueError: if a convolution is given no image size.
            CertificateError: if the proof fails.
        """
        run = self._reference().dtype if run is None else run
        weights = self.weights(run)
        if isinstance(weights, ExplicitWeights):
            proof = certify(weights)
        elif image is None:
            raise ValueError("a convolution is proved for a size: certificate((height, width))")
        else:
            proof = certify_convolution(weights, image)
        return replace(proof, dtype=str(run).removeprefix("torch."))

    def check(self, proof: Certificate, x: Tensor) -> None:
        """Refuse a certificate of other weights, or of other images than x.

        Raises:
            CertificateError: naming the difference.
        """
        run = self._reference().dtype
        kept = self._record()
        fingerprint = kept.get(
            ("fingerprint", self.map), lambda: self._weights(kept.twin, run).fingerprint
        )
        proof.check_fingerprint(fingerprint)
        if isinstance(self.map, Convolution):
            proof.check_image((x.shape[-2], x.shape[-1]), exactly=self.map.circular)

    @torch.no_grad()
    def rounding(self, x: Tensor) -> Tensor:
        """Bound ‖fl(y) − y‖₂ per sample for the layer in the precision of x."""
        tensors = self._tensors(x.dtype)
        pixels = math.prod(x.shape[2:])
        terms = sum(t.numel() for t in tensors if t.ndim > 1) // min(tensors[0].shape[:2]) + 16
        unit = terms * torch.finfo(x.dtype).eps
        size = torch.linalg.vector_norm(x.flatten(1), dim=1)
        tiny = x[0].numel() * torch.finfo(x.dtype).tiny ** 0.5 if len(x) else 0.0
        return 2 * unit * (self._rounding(size, tensors, pixels) + size) + tiny

    def train(self, mode: bool = True) -> ExplicitLayer:
        """Set the mode, and forget what was kept."""
        self._kept = None
        super().train(mode)
        return self

    def extra_repr(self) -> str:
        """Describe the layer in `repr`."""
        return f"{self.map}"


class ResidualLayer(ExplicitLayer):
    """y = x − 2UᵀT⁻¹σ(Ux + b). Araujo et al. (2023), Theorem 1."""

    def __init__(
        self,
        parameterization: ResidualParameterization,
        map: LinearMap,
        activation: ProximalActivation | None = None,
    ) -> None:
        super().__init__(parameterization, map, parameterization.shape[1])
        self.activation = _proximal(activation)

    def evaluate(self, x: Tensor, run: torch.dtype, tensors: tuple[Tensor, ...]) -> Tensor:
        U, b, scale = tensors
        U = U.to(run)
        if torch.is_grad_enabled() or nothing_may_be_kept() or run != x.dtype:
            h = self.activation(self.map.apply(x.to(run), U, b.to(run)))
            return x - self.map.adjoint((h * self.map.spread(scale)).to(run), U).to(x.dtype)
        y = self.map.adjoint(self._hidden(x, U, b, scale), U)  # nobody else holds y
        return torch.sub(x, y, out=y)

    def _hidden(self, x: Tensor, U: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        """Return 2T⁻¹σ(Ux + b), in memory that nobody else holds; on a GPU in one pass."""
        if not fused.activates(x, self.activation):
            return self.activation(self.map.apply(x, U, b)).mul_(self.map.spread(scale))
        u = self.map.apply(x, U)
        rows = u if isinstance(self.map, Convolution) else u.view(-1, u.shape[-1])
        return fused.activated(rows, b, scale, self.activation).view_as(u)

    def _rounding(self, size: Tensor, tensors: tuple[Tensor, ...], pixels: int) -> Tensor:
        U, b, scale = tensors
        hidden = schur(U) * size + (b.norm() + _at_zero(self.activation, b)) * pixels**0.5
        return schur(_rows(scale, U) * U) * hidden


class ContractionLayer(ExplicitLayer):
    """y = V T^(−½) x + b with T ⪰ VᵀV."""

    def __init__(self, parameterization: ContractionParameterization, map: LinearMap) -> None:
        super().__init__(parameterization, map, parameterization.shape[1])

    def evaluate(self, x: Tensor, run: torch.dtype, tensors: tuple[Tensor, ...]) -> Tensor:
        V, b, scale = tensors
        return self.map.apply((x * self.map.spread(scale)).to(run), V.to(run), b.to(run))

    def _rounding(self, size: Tensor, tensors: tuple[Tensor, ...], pixels: int) -> Tensor:
        V, b, scale = tensors
        return schur(_rows(scale, V)[None, :, 0] * V) * size + b.norm() * pixels**0.5


class SandwichLayer(ExplicitLayer):
    """y = √2 AᵀSΨσ(√2 Ψ⁻¹S Bx + b) + b_y. Wang and Manchester (2023)."""

    def __init__(
        self,
        parameterization: SandwichParameterization,
        map: LinearMap,
        activation: ProximalActivation | None = None,
    ) -> None:
        inputs = parameterization.shape[1] - parameterization.outputs
        super().__init__(parameterization, map, inputs)
        self.activation = _proximal(activation)

    def evaluate(self, x: Tensor, run: torch.dtype, tensors: tuple[Tensor, ...]) -> Tensor:
        A, B, b, b_y, inner, outer = tensors
        v = self.map.apply(x.to(run), B.to(run)) * self.map.spread(inner)
        h = self.activation(v + self.map.spread(b)) * self.map.spread(outer)
        return self.map.adjoint(h.to(run), A.to(run), b_y.to(run))

    def _rounding(self, size: Tensor, tensors: tuple[Tensor, ...], pixels: int) -> Tensor:
        A, B, b, b_y, inner, outer = tensors
        hidden = schur(_rows(inner, B) * B) * size
        hidden = hidden + (b.norm() + _at_zero(self.activation, b)) * pixels**0.5
        return schur(_rows(outer, A) * A) * hidden + b_y.norm() * pixels**0.5


def _proximal(activation: ProximalActivation | None) -> ProximalActivation:
    """Return σ, ReLU when omitted; the certificate is for slopes in [0, 1]."""
    if activation is None:
        return ReLU()
    if not isinstance(activation, ProximalActivation):
        raise TypeError(
            "the bound is for slopes in [0, 1]: the activation must be a "
            f"solvers.ProximalActivation, got {type(activation).__name__}"
        )
    return activation


def _at_zero(activation: ProximalActivation, b: Tensor) -> Tensor:
    """Return ‖σ(0)‖₂ over the units: |σ(v)| ≤ |v| + |σ(0)|."""
    return torch.linalg.vector_norm(activation(torch.zeros_like(b)))


def _rows(vector: Tensor, weight: Tensor) -> Tensor:
    """Return one number per row, shaped to scale the rows of a matrix or kernel."""
    return vector.reshape(-1, *[1] * (weight.ndim - 1))


def schur(U: Tensor) -> Tensor:
    """Bound ‖ |U| ‖₂ by √(largest row sum × largest column sum), for a matrix or a kernel."""
    size = U.abs().flatten(2).sum(2) if U.ndim > 2 else U.abs()
    return (size.sum(0).amax() * size.sum(1).amax()).sqrt()

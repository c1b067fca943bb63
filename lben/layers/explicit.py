"""How is an explicit 1-Lipschitz layer evaluated at the cost of its products alone?"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from lben import precision
from lben.certificates import Certificate, certify, certify_convolution
from lben.layers.maps import Convolution, LinearMap
from lben.parameterizations import (
    ContractionParameterization,
    ExplicitParameterization,
    ResidualParameterization,
    SandwichParameterization,
)
from lben.weights import ConvolutionalWeights, ExplicitWeights
from solvers import ProximalActivation, ReLU


class ExplicitLayer(nn.Module, ABC):
    """A layer whose multiplier T is computed once per change of its parameters.

    In eval mode a call is the layer's products and one pointwise pass. In training T is computed
    for the first forward pass after a step of the optimizer and kept with its graph, so that
    gradient accumulation pays for it once; its gradient has no second derivative in the
    parameters (those in the input are exact to any order). Under `torch.compile` nothing is kept
    and T is part of the compiled graph.

    float32 runs in float32, whatever torch allows its products to be rounded to (TF32 convolutions
    are torch's default on CUDA); a compiled graph obeys the settings of torch.backends, which have
    to be "ieee" for the certificate to be about it. Under autocast weights are rounded to its type
    first, and T is that of the rounded weights: the bound holds for what runs. The skip connection
    keeps the precision of the input.

    Args:
        parameterization: of the weights.
        map: how they act.
        inputs: features or channels of x.
    """

    def __init__(
        self, parameterization: ExplicitParameterization, map: LinearMap, inputs: int
    ) -> None:
        super().__init__()
        self.parameterization, self.map, self.inputs = parameterization, map, inputs
        self._kept: _Kept | None = None

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
        with torch.autocast(x.device.type, enabled=False):
            if torch.compiler.is_compiling():
                return self.evaluate(x, run, self._tensors(run))
            with precision.full():
                return self.evaluate(x, run, self._tensors(run))

    def _precision(self, x: Tensor) -> torch.dtype:
        reference = next(self.parameters())
        if reference.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"parameters must be float32 or float64, got {reference.dtype}: T cannot be "
                "bounded in it; use torch.autocast with bfloat16 for speed"
            )
        if x.device != reference.device:
            raise ValueError(f"x is on {x.device}, the layer on {reference.device}")
        if torch.is_autocast_enabled(x.device.type):
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
        if torch.compiler.is_compiling():
            return self.parameterization(run)
        track = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        if self._kept is None or not self._kept.fits(self.parameterization, run, track):
            self._kept = _Kept(self.parameterization, run, track)
        return self._kept.attach(self.parameterization) if track else self._kept.values

    def weights(self, run: torch.dtype | None = None) -> ExplicitWeights | ConvolutionalWeights:
        """Return the float64 weights of the layer as it runs in a precision (its own if None)."""
        run = next(self.parameters()).dtype if run is None else run
        with torch.no_grad():
            if isinstance(self.map, Convolution):
                kernels = self.parameterization.convolutional(run, circular=self.map.circular)
                return kernels.apply(Tensor.detach)
            return self.parameterization.dense(run).apply(Tensor.detach)

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
        weights = self.weights(run)
        if isinstance(weights, ExplicitWeights):
            return certify(weights)
        if image is None:
            raise ValueError("a convolution is proved for a size: certificate((height, width))")
        return certify_convolution(weights, image)

    @torch.no_grad()
    def rounding(self, x: Tensor) -> Tensor:
        """Bound ‖fl(y) − y‖₂ per sample for the layer in the precision of x."""
        tensors = self._tensors(x.dtype)
        pixels = x[0, 0].numel() if isinstance(self.map, Convolution) else 1
        terms = sum(t.numel() for t in tensors if t.ndim > 1) // min(tensors[0].shape[:2]) + 16
        unit = terms * torch.finfo(x.dtype).eps
        size = torch.linalg.vector_norm(x.flatten(1), dim=1)
        return 2 * unit * (self._rounding(size, tensors, pixels) + size)

    def train(self, mode: bool = True) -> ExplicitLayer:
        """Set the mode, and forget what was kept."""
        self._kept = None
        super().train(mode)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}

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
        self.activation = ReLU() if activation is None else activation

    def evaluate(self, x: Tensor, run: torch.dtype, tensors: tuple[Tensor, ...]) -> Tensor:
        U, b, scale = tensors
        U = U.to(run)
        h = self.activation(self.map.apply(x.to(run), U, b.to(run)))
        scale = self.map.spread(scale)
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or run != x.dtype:
            return x - self.map.adjoint((h * scale).to(run), U).to(x.dtype)
        y = self.map.adjoint(h.mul_(scale), U)  # nobody else holds h and y
        return torch.sub(x, y, out=y)

    def _rounding(self, size: Tensor, tensors: tuple[Tensor, ...], pixels: int) -> Tensor:
        U, b, scale = tensors
        hidden = schur(U) * size + b.norm() * pixels**0.5
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
        self.activation = ReLU() if activation is None else activation

    def evaluate(self, x: Tensor, run: torch.dtype, tensors: tuple[Tensor, ...]) -> Tensor:
        A, B, b, b_y, inner, outer = tensors
        v = self.map.apply(x.to(run), B.to(run)) * self.map.spread(inner)
        h = self.activation(v + self.map.spread(b)) * self.map.spread(outer)
        return self.map.adjoint(h.to(run), A.to(run), b_y.to(run))

    def _rounding(self, size: Tensor, tensors: tuple[Tensor, ...], pixels: int) -> Tensor:
        A, B, b, b_y, inner, outer = tensors
        hidden = schur(_rows(inner, B) * B) * size + b.norm() * pixels**0.5
        return schur(_rows(outer, A) * A) * hidden + b_y.norm() * pixels**0.5


def _rows(vector: Tensor, weight: Tensor) -> Tensor:
    """Return one number per row, shaped to scale the rows of a matrix or kernel."""
    return vector.reshape(-1, *[1] * (weight.ndim - 1))


def schur(U: Tensor) -> Tensor:
    """Bound ‖ |U| ‖₂ by √(largest row sum × largest column sum), for a matrix or a kernel."""
    size = U.abs().flatten(2).sum(2) if U.ndim > 2 else U.abs()
    return (size.sum(0).amax() * size.sum(1).amax()).sqrt()


_SAMPLE = 200


class _Kept:
    """What runs for one set of parameter values, with the graph back to them if asked.

    Note [When a parameter has changed]
    In-place updates change a version counter, and new tensors have new addresses. Writes through
    `.data` change neither: they are looked for in some two hundred entries spread over each
    parameter, which sees every optimizer and every average; comparing all of them would cost as
    much as the product. `weights` and `certificate` never use what is kept.
    """

    def __init__(
        self, parameterization: ExplicitParameterization, run: torch.dtype, track: bool
    ) -> None:
        self.run, self.track, self.state = run, track, _state(parameterization)
        self.sample = _sample(parameterization)
        named = dict(parameterization.named_parameters())
        # What is kept must outlive an inference mode that it is computed in.
        with torch.inference_mode(False), torch.set_grad_enabled(track):
            self.leaves = {
                k: p.detach().requires_grad_(track and p.requires_grad) for k, p in named.items()
            }
            outputs = functional_call(parameterization, self.leaves, (run,))
        self.outputs = tuple(outputs)
        self.values = tuple(t.detach() for t in self.outputs)

    def fits(
        self, parameterization: ExplicitParameterization, run: torch.dtype, track: bool
    ) -> bool:
        return (
            self.run == run
            and (self.track or not track)
            and self.state == _state(parameterization)
            and all(map(torch.equal, self.sample, _sample(parameterization)))
        )

    def attach(self, parameterization: ExplicitParameterization) -> tuple[Tensor, ...]:
        """Return the values as functions of the parameters."""
        return _Attach.apply(  # type: ignore[no-untyped-call]
            self, *parameterization.parameters()
        )


class _Attach(torch.autograd.Function):
    """Values computed before, with the gradient of the graph that computed them."""

    @staticmethod
    def forward(ctx: Any, kept: _Kept, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.kept = kept
        return tuple(v.view_as(v) for v in kept.values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        kept = ctx.kept
        outputs, received = zip(
            *((o, g) for o, g in zip(kept.outputs, gradients, strict=True) if o.requires_grad),
            strict=True,
        )
        wanted = [leaf for leaf in kept.leaves.values() if leaf.requires_grad]
        found = iter(
            torch.autograd.grad(outputs, wanted, received, retain_graph=True, allow_unused=True)
        )
        return None, *(next(found) if t.requires_grad else None for t in kept.leaves.values())


def _state(parameterization: nn.Module) -> tuple[Any, ...]:
    return tuple(
        (p._version, p.data_ptr(), p.dtype, p.requires_grad) for p in parameterization.parameters()
    )


def _sample(parameterization: nn.Module) -> list[Tensor]:
    flat = (p.detach().reshape(-1) for p in parameterization.parameters())
    return [v[:: max(1, v.numel() // _SAMPLE)].clone() for v in flat]

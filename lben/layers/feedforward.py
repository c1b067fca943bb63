"""How is a feed-forward 1-Lipschitz layer evaluated at the cost of its products alone?

Its multiplier T is computed once per change of the parameters, and cached.

Symbols: docs/glossary.md; A, B, S and V are defined at the classes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import replace

import torch
from torch import Tensor, nn

from lben import precision
from lben.certificates import CertificateError, LayerCertificate, LipschitzCertificate, certify
from lben.layers.bounded import RoundedModule, height_and_width, require_kind
from lben.layers.cache import CachingLayer, Running
from lben.layers.graphs import Owner, check_kind, graph_is_made
from lben.layers.roundoff import Signal, Units, columns, rows
from lben.parameterizations import (
    ContractionParameterization,
    FeedforwardParameterization,
    ResidualParameterization,
    SandwichParameterization,
)
from lben.weights import ConvolutionalWeights, DenseWeights
from lben.weights.growth import (
    Growth,
    absolute_norm,
    add_up,
    largest_up,
    norm_up,
    times_up,
)
from lben.weights.linear_maps import Convolution, LinearMap
from solvers import ProximalActivation, ReLU, backends
from solvers.dependencies import collect_dependencies, must_not_cache
from solvers.precision import in_autocast, leave_autocast, use_full_precision


class FeedforwardLayer(CachingLayer, RoundedModule, Owner, ABC):
    """A layer whose multiplier T is computed once per change of its parameters.

    Cost. In eval mode a call costs the layer's products and one pointwise pass. In training, T is
    computed in the first forward pass after a step of the optimizer. It is cached with its graph,
    so gradient accumulation pays for it once. A gradient that is differentiated again computes T
    anew. In graphs (`torch.compile`, tracing, export) T is computed at every call, by the same
    code.

    Precision. A float32 layer computes its products in float32, whatever shorter precision torch
    allows (TF32 convolutions are torch's default on CUDA). A compiled or traced graph obeys the
    settings of torch.backends, and refuses to run unless they are "ieee".

    Autocast. The weights are rounded to bfloat16 first, and T is computed from the rounded weights.
    So the bound holds for the exact layer with the rounded weights. It does not hold for the layer
    that runs, which rounds activations to bfloat16 as well: no bound holds for its Lipschitz
    quotients over small distances. A skip connection keeps the precision of the input; a layer
    without one returns bfloat16. `weights`, `certificate` and `rounding` are refused under
    autocast.

    Args:
        parameterization: of the weights.
        map: how they act.
        inputs: features or channels of x.

    Example:
        >>> import torch
        >>> from lben import SLLLinear
        >>> layer, x = SLLLinear(4, 6), torch.ones(1, 4)
        >>> found = layer.forward_with_error(x, layer.certificate())
        >>> torch.equal(found.value, layer(x)), bool(found.error < 1e-3)
        (True, True)
    """

    parameterization: FeedforwardParameterization

    def __init__(
        self, parameterization: FeedforwardParameterization, map: LinearMap, inputs: int
    ) -> None:
        super().__init__(parameterization)
        self.map, self.inputs = map, inputs
        self.enter()

    def source(self) -> nn.Module:
        """Return the parameterization."""
        return self.parameterization

    def allocate(self, like: Tensor) -> list[Tensor]:
        """Return tensors shaped as those that run, without numbers."""
        return self.parameterization.allocate(like)

    @abstractmethod
    def evaluate(
        self, x: Tensor, compute_dtype: torch.dtype, tensors: tuple[Tensor, ...]
    ) -> Tensor:
        """Return y from the tensors that run, with products in `compute_dtype`."""

    @abstractmethod
    def _roundoff(self, x: Signal, tensors: tuple[Tensor, ...], shape: tuple[int, ...]) -> Growth:
        """Bound the rounding error of y, from the tensors that run and the shape of a sample."""

    def forward(self, x: Tensor) -> Tensor:
        """Return y.

        Raises:
            ValueError: for a wrong shape, device or dtype, or parameters in half precision.
        """
        check_kind(x)
        self.map.check(tuple(x.shape), self.inputs)
        compute_dtype = self._dtype_for(x)
        if x.ndim > 1 and self.map.dims == 3 and x.ndim != 4:
            batch = x.shape[:-3]
            y = self(x.reshape(math.prod(batch), *x.shape[-3:]))
            return y.reshape(*batch, *y.shape[1:])
        with leave_autocast(x.device.type):
            if graph_is_made():
                return self.evaluate(x, compute_dtype, tuple(self.in_graph(compute_dtype)))
            with use_full_precision(self._reference()):
                return self.evaluate(x, compute_dtype, self._tensors(compute_dtype))

    def _has_one_pass(
        self, x: Tensor, compute_dtype: torch.dtype, activation: ProximalActivation | None
    ) -> bool:
        """Return whether `_in_one_pass` runs on products of x: on a GPU, outside of graphs."""
        return not self._is_composed(x, compute_dtype) and backends.activates(x, activation)

    def _is_composed(self, x: Tensor, compute_dtype: torch.dtype) -> bool:
        """Return whether a graph, a transform or autocast needs PyTorch's own operations."""
        return graph_is_made() or must_not_cache() or compute_dtype != x.dtype

    def _in_one_pass(
        self,
        u: Tensor,
        bias: Tensor | None,
        scale: Tensor,
        activation: ProximalActivation | None,
        inner: Tensor | None = None,
    ) -> Tensor:
        """Return σ(su + b)t with one s, b and t per unit or channel; b and σ may be left out.

        Without a gradient, the result with a σ may overwrite u: u is then a product that no one
        else holds.
        """
        rows = u if isinstance(self.map, Convolution) else u.reshape(-1, u.shape[-1])
        h = backends.activate(
            rows, bias, scale, activation, inner=inner, overwrite=activation is not None
        )
        return h.view_as(u) if h.shape != u.shape else h

    def _dtype_for(self, x: Tensor) -> torch.dtype:
        own, reference = self._own(), self._reference()
        if x.device != reference.device:
            raise ValueError(f"x is on {x.device}, the layer on {reference.device}")
        if in_autocast(x.device.type):
            compute_dtype = torch.get_autocast_dtype(x.device.type)
            if compute_dtype != torch.bfloat16:
                raise ValueError(f"autocast to {compute_dtype} overflows in T⁻¹: use bfloat16")
            if not x.is_floating_point():
                raise ValueError(f"x is {x.dtype}, expected floating-point numbers: convert it")
            return compute_dtype
        if x.dtype != own:
            raise ValueError(
                f"x is {x.dtype}, the layer is {own}: convert one of them, or use torch.autocast"
            )
        return own

    def _compute_dtype(self, compute_dtype: torch.dtype | None) -> torch.dtype:
        """Return the dtype whose weights are proved; the layer's own for None."""
        own = self._own()
        if compute_dtype not in (None, own, torch.bfloat16):
            raise ValueError(
                f"the layer runs in {own}, and under autocast in torch.bfloat16: {compute_dtype} "
                "is neither"
            )
        return own if compute_dtype is None else compute_dtype

    def _own(self) -> torch.dtype:
        """Return the dtype of the parameters, float32 or float64."""
        own = self._reference().dtype
        if own not in (torch.float32, torch.float64):
            raise ValueError(
                f"parameters must be float32 or float64, got {own}: T cannot be bounded in it; "
                "use torch.autocast with bfloat16 for speed"
            )
        return own

    def _tensors(self, compute_dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Return the tensors that a call multiplies with, from the cache or computed."""
        track = self._is_tracked()
        parameters = tuple(self.parameterization.parameters())
        own = {id(p) for p in parameters}
        if must_not_cache() or (track and self._has_strays(own)):
            return self.parameterization(compute_dtype)
        running = self._running(
            compute_dtype, tuple(p.requires_grad for p in parameters) if track else ()
        )
        return running.attach(parameters) if track else running.values

    def _running(self, compute_dtype: torch.dtype, tracked: tuple[bool, ...] = ()) -> Running:
        cache = self._cache()
        return cache.get(
            ("runs", compute_dtype),
            lambda: Running(cache, compute_dtype, tracked),
            lambda running: tracked in ((), running.tracked),
        )

    def _has_strays(self, parameters: set[int]) -> bool:
        """Return whether a tensor that is not a parameter requires a gradient."""
        tensors, _ = collect_dependencies(self.parameterization)
        return any(t.requires_grad and id(t) not in parameters for t in tensors)

    def weights(
        self, compute_dtype: torch.dtype | None = None
    ) -> DenseWeights | ConvolutionalWeights:
        """Return, in float64, the weights that the layer runs with.

        A certificate is about these weights, and error bounds compare the layer that runs with the
        exact layer of these weights. They are the tensors that run in `compute_dtype` (the layer's
        own dtype if None), converted to float64. In float64 a product of two of them is rounded
        once more than in the layer; `rounding` counts that rounding.

        Raises:
            ValueError: if no proof is possible in the dtype; under autocast.
        """
        precision.refuse_autocast()
        return self._weights(self.parameterization, self._compute_dtype(compute_dtype))

    @torch.no_grad()
    def _weights(
        self, parameterization: FeedforwardParameterization, compute_dtype: torch.dtype
    ) -> DenseWeights | ConvolutionalWeights:
        with use_full_precision(self._reference()):
            if isinstance(self.map, Convolution):
                kernels = parameterization.convolutional(compute_dtype, circular=self.map.circular)
                return kernels.apply(Tensor.detach)
            return parameterization.dense(compute_dtype).apply(Tensor.detach)

    @property
    def sample_shape(self) -> tuple[int | None, ...]:
        """The shape of one x; None for the height and width of images."""
        return (self.inputs, *[None] * (self.map.dims - 1))

    def certificate(
        self, image: tuple[int, ...] | None = None, *, compute_dtype: torch.dtype | None = None
    ) -> LayerCertificate:
        """Prove the layer's bound for `weights()`.

        A stride removes rows of the map, which cannot raise its norm.

        With compute_dtype=torch.bfloat16 the bound is proved for the exact layer whose weights are
        rounded to bfloat16. It says nothing about the layer that runs under autocast, which rounds
        the activations too: neither its distance to the exact layer nor its Lipschitz quotients are
        bounded here, and no radius is certified for it. Methods that need a certificate of the
        layer in its own precision refuse such a certificate.

        Args:
            image: height and width of the images, for a convolution; or the shape of one sample.
            compute_dtype: in which products run; that of the parameters when None.

        Returns:
            The proved l2 bound of the layer.

        Raises:
            ValueError: if a convolution is given no image size, or no proof is possible in the
                dtype; under autocast.
            CertificateError: if the proof fails.
        """
        compute_dtype = self._compute_dtype(compute_dtype)
        proof = certify(self.weights(compute_dtype), image=height_and_width(image))
        return replace(proof, dtype=str(compute_dtype).removeprefix("torch."))

    def check(self, certificate: LipschitzCertificate, x: Tensor) -> None:
        """Refuse a certificate of other weights, or of other images than x.

        Raises:
            CertificateError: naming the difference.
        """
        _refuse_rounded(require_kind(certificate, LayerCertificate, "a layer"))
        compute_dtype = self._own()
        cache = self._cache()
        twin = cache.twin
        assert isinstance(twin, FeedforwardParameterization)
        fingerprint = cache.get(
            ("fingerprint", self.map), lambda: self._weights(twin, compute_dtype).fingerprint
        )
        certificate.check_fingerprint(fingerprint)
        if isinstance(self.map, Convolution):
            certificate.check_image((x.shape[-2], x.shape[-1]), exactly=self.map.circular)

    @torch.no_grad()
    def rounding_growth(self, shape: tuple[int, ...], dtype: torch.dtype) -> Growth:
        """Return a bound of ‖fl(y) − y‖₂ that is affine in ‖x‖₂.

        fl(y) is the output that runs, y the exact output of `weights()`. The bound holds for every
        order of summation; see Note [Rounding model]. For convolutions it holds for the direct and
        the im2col algorithm, which torch runs on a CPU.

        Args:
            shape: of one sample: (p,), or (channels, height, width).
            dtype: in which the layer runs.

        Returns:
            The bound as a function of ‖x‖₂.

        Raises:
            ValueError: if the shape or dtype does not fit, or the device may run convolutions by
                other algorithms; under autocast.
        """
        precision.refuse_autocast()
        own = self._own()
        if dtype != own:
            raise ValueError(
                "rounding is bounded in the layer's own precision, float32 or float64: it is "
                f"{own}, asked for {dtype}"
            )
        shape = tuple(shape)
        if len(shape) != self.map.dims:
            raise ValueError(f"one sample has {self.map.dims} dimensions, got the shape {shape}")
        self.map.check(shape, self.inputs)
        tensors = self._tensors(own)
        self.map.refuse_other_sums(tensors[0])
        return self._roundoff(Signal.input(own), tensors, shape)

    def train(self, mode: bool = True) -> FeedforwardLayer:
        """Set the mode, and forget what was cached."""
        self._cached = None
        super().train(mode)
        return self

    def extra_repr(self) -> str:
        """Describe the layer in `repr`."""
        return f"{self.map}"


class ResidualLayer(FeedforwardLayer):
    """y = x − 2UᵀT⁻¹σ(Ux + b). Araujo et al. (2023), Theorem 1.

    Example:
        >>> from lben import CPLLinear
        >>> isinstance(CPLLinear(4, 6), ResidualLayer)
        True
    """

    def __init__(
        self,
        parameterization: ResidualParameterization,
        map: LinearMap,
        activation: ProximalActivation | None = None,
    ) -> None:
        super().__init__(parameterization, map, parameterization.shape[1])
        self.activation = ReLU() if activation is None else activation

    def evaluate(
        self, x: Tensor, compute_dtype: torch.dtype, tensors: tuple[Tensor, ...]
    ) -> Tensor:
        U, b, scale = tensors
        U = U.to(compute_dtype)
        lasting = torch.is_grad_enabled() or self._is_composed(x, compute_dtype)
        if self._has_one_pass(x, compute_dtype, self.activation):
            h = self._in_one_pass(self.map.apply(x, U), b, scale, self.activation)
        elif lasting:
            h = self.activation(self.map.apply(x.to(compute_dtype), U, b.to(compute_dtype)))
            h = (h * self.map.spread(scale)).to(compute_dtype)
        else:
            h = self.activation(self.map.apply(x, U, b)).mul_(self.map.spread(scale))
        y = self.map.adjoint(h, U).to(x.dtype)
        return x - y if lasting else torch.sub(x, y, out=y)  # else nobody else holds y

    def _roundoff(self, x: Signal, tensors: tuple[Tensor, ...], shape: tuple[int, ...]) -> Growth:
        U, b, scale = tensors
        # Units are weighted with T^(−½): a unit whose row of U is large has a small T⁻¹.
        w = scale.double().sqrt()
        units = Units(self.map, shape, U, w)
        h = units.enter(x, U, rows(w, U) * U, b, self.activation)
        back = rows(scale, U) * U.double()
        y = units.leave(h, U, back, rows(w, U) * U, scale / w)
        size = Growth(0.0, absolute_norm(U)).plus(units.norm(b))
        sizes = (size, size.times(largest_up(scale)))
        return x.plus(y, math.prod(shape)).below(*sizes)


class ContractionLayer(FeedforwardLayer):
    """y = V T^(−½) x + b with T ⪰ VᵀV.

    Example:
        >>> from lben import AOLLinear
        >>> isinstance(AOLLinear(4, 3), ContractionLayer)
        True
    """

    def __init__(self, parameterization: ContractionParameterization, map: LinearMap) -> None:
        super().__init__(parameterization, map, parameterization.shape[1])

    def evaluate(
        self, x: Tensor, compute_dtype: torch.dtype, tensors: tuple[Tensor, ...]
    ) -> Tensor:
        V, b, scale = tensors
        if torch.is_grad_enabled() and self._has_one_pass(x, compute_dtype, None):
            return self.map.apply(self._in_one_pass(x, None, scale, None), V, b)
        return self.map.apply(
            (x * self.map.spread(scale)).to(compute_dtype), V.to(compute_dtype), b.to(compute_dtype)
        )

    def _roundoff(self, x: Signal, tensors: tuple[Tensor, ...], shape: tuple[int, ...]) -> Growth:
        V, b, scale = tensors
        outputs = self.map.outputs(shape, len(V))
        norm = absolute_norm(columns(scale, V) * V.double())
        y = x.linear(
            norm, terms=V[0].numel() + 2, inputs=math.prod(shape), ones=math.prod(outputs) ** 0.5,
            bias=times_up(norm_up(b), math.prod(outputs[1:]) ** 0.5),
            unweighted=add_up(norm, absolute_norm(V)), share=largest_up(scale),
        )  # fmt: skip
        return y.below(Growth(0.0, largest_up(scale)))


class SandwichLayer(FeedforwardLayer):
    """y = √2 AᵀSΨσ(√2 Ψ⁻¹S Bx + b) + b_y. Wang and Manchester (2023).

    Example:
        >>> from lben import SandwichLinear
        >>> isinstance(SandwichLinear(4, 3), SandwichLayer)
        True
    """

    def __init__(
        self,
        parameterization: SandwichParameterization,
        map: LinearMap,
        activation: ProximalActivation | None = None,
    ) -> None:
        inputs = parameterization.shape[1] - parameterization.outputs
        super().__init__(parameterization, map, inputs)
        self.activation = ReLU() if activation is None else activation

    def evaluate(
        self, x: Tensor, compute_dtype: torch.dtype, tensors: tuple[Tensor, ...]
    ) -> Tensor:
        A, B, b, b_y, inner, outer = tensors
        if self._has_one_pass(x, compute_dtype, self.activation):
            u = self.map.apply(x, B)
            return self.map.adjoint(self._in_one_pass(u, b, outer, self.activation, inner), A, b_y)
        v = self.map.apply(x.to(compute_dtype), B.to(compute_dtype)) * self.map.spread(inner)
        h = self.activation(v + self.map.spread(b)) * self.map.spread(outer)
        return self.map.adjoint(h.to(compute_dtype), A.to(compute_dtype), b_y.to(compute_dtype))

    def _roundoff(self, x: Signal, tensors: tuple[Tensor, ...], shape: tuple[int, ...]) -> Growth:
        A, B, b, b_y, inner, outer = tensors
        w = (outer.double() / inner).sqrt()  # Λ^½, in which both products have like norms
        units = Units(self.map, shape, B, w, inner)
        forth = rows(w * inner, B) * B.double()
        h = units.enter(x, B, forth, b, self.activation)
        y = units.leave(h, A, rows(outer, A) * A.double(), rows(outer / w, A) * A, outer / w, b_y)
        product = Growth(0.0, absolute_norm(B))
        hidden = product.times(largest_up(inner)).plus(units.norm(b))
        return y.below(product, hidden, hidden.times(largest_up(outer)))


def _refuse_rounded(proof: LipschitzCertificate) -> None:
    if proof.dtype not in ("float32", "float64"):
        raise CertificateError(
            f"this certificate is of weights rounded to {proof.dtype}, the layer runs in float32 "
            "or float64: prove it with certificate(), without run"
        )

"""Which equilibrium layers have a name? Each is a parameterization with options of the solve.

Symbols: docs/glossary.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Self, Unpack

import torch
from torch import Tensor

from lben.layers.equilibrium import EquilibriumLayer, SolveOptions
from lben.parameterizations import (
    CompleteParameterization,
    ConvolutionalParameterization,
    DirectParameterization,
    EquilibriumParameterization,
    FixedWeights,
    PooledParameterization,
)
from lben.weights import ConvolutionalWeights, DenseWeights, PooledWeights, Weights, stack
from lben.weights.sizes import real
from solvers import Gradient, Method, PeacemanRachford, ProximalActivation
from solvers.solution import OnFailure


class EquilibriumLinear(EquilibriumLayer[DenseWeights]):
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

    Example:
        >>> import torch
        >>> from lben import EquilibriumLinear
        >>> layer = EquilibriumLinear(4, 6, 2, gamma=0.5)
        >>> y = layer(torch.ones(3, 4))
        >>> y.sum().backward()  # the implicit gradient
        >>> y.shape, layer.certificate().bound
        (torch.Size([3, 2]), 0.5)
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
        self.in_features, self.hidden_features = in_features, hidden_features
        self.out_features = out_features

    @classmethod
    def from_weights(
        cls,
        weights: DenseWeights | Sequence[DenseWeights],
        *,
        trainable: bool = False,
        **options: Unpack[SolveOptions],
    ) -> Self:
        """Return a layer that holds given weights, of one layer or of several assembled into one.

        A frozen layer has them as buffers, bit by bit, and its certificate proves what they
        support. Weights without a claim (gamma=None) are certified to be well-posed; a bound of
        them is `certify(layer.weights(), tighten_diagonal(layer.weights()))`.

        A trainable layer starts at them, up to rounding. `CompleteParameterization` takes them
        over, so every later value of its free tensors keeps the bound.

        Several layers, feed-forward ones among them, are first assembled into one set of weights in
        float64, whose bound is the product of theirs. The idea is that of Havens, Araujo, Garg,
        Khorrami and Hu (2023), "Exploiting connections between Lipschitz structures for certifiably
        robust deep equilibrium models".

        Args:
            weights: of one layer, or of several, first to last. They are copied; the layer has
                their dtype and device.
            trainable: whether training may change them.
            options: how the layer is solved, as keyword arguments of `EquilibriumLayer`:
                activation, method, gradient, tol, max_steps and on_failure. The activation must be
                that of the layers.

        Returns:
            The layer; γ is what the weights claim.

        Raises:
            ValueError: for weights of images, without units, or with NaN or infinite numbers; for
                layers that do not fit each other; for a trainable layer, if the weights claim no
                bound or M(Λ, γ) is not positive definite for them.

        Example:
            >>> import torch
            >>> from dataclasses import replace
            >>> from lben import DenseWeights, EquilibriumLinear, certify, tighten_diagonal
            >>> one = torch.ones(1, 1, dtype=torch.float64)
            >>> weights = DenseWeights(
            ...     W=-one, U=one, b=one[0], C=one, D=None, b_y=0 * one[0], Lambda=one[0],
            ...     gamma=None,
            ... )  # z = σ(−z + x + 1), y = z
            >>> layer = EquilibriumLinear.from_weights(weights, tol=1e-9)
            >>> [round(y, 6) for y in layer(torch.tensor([[1.0], [-3.0]]).double())[:, 0].tolist()]
            [1.0, 0.0]
            >>> claim = tighten_diagonal(layer.weights())
            >>> certify(layer.weights(), claim).bound < 1.001
            True
            >>> claimed = replace(weights, gamma=2.0)
            >>> EquilibriumLinear.from_weights(claimed, trainable=True).certificate().bound
            2.0

            Two residual layers, as one equilibrium layer that is trained further:

            >>> from lben import SLLLinear
            >>> parts = [SLLLinear(4, 6, dtype=torch.float64) for _ in range(2)]
            >>> layer = EquilibriumLinear.from_weights(
            ...     [part.weights() for part in parts], trainable=True, tol=1e-9
            ... )
            >>> x = torch.randn(3, 4, dtype=torch.float64)
            >>> torch.allclose(layer(x), parts[1](parts[0](x)), atol=1e-5), round(layer.gamma, 4)
            (True, 1.0)
        """
        whole = _assemble(weights)
        parameterization: EquilibriumParameterization[DenseWeights]
        parameterization = _complete(whole) if trainable else FixedWeights(whole)
        layer = cls.__new__(cls)
        EquilibriumLayer.__init__(layer, parameterization, **options)
        layer.in_features, layer.hidden_features = whole.in_features, whole.hidden_features
        layer.out_features = whole.out_features
        return layer

    def extra_repr(self) -> str:
        """Describe the layer in `repr`."""
        sizes = f"{self.in_features}, {self.hidden_features}, {self.out_features}"
        return f"{sizes}, {super().extra_repr()}"


class EquilibriumConv2d(EquilibriumLayer[ConvolutionalWeights]):
    """Images to images: y = C∗z + sx + b_y with z = σ(W∗z + U∗x + b), γ-Lipschitz in l2.

    Args:
        in_channels: p.
        hidden_channels: n.
        out_channels: q; None for y = z, whose bound is γ then.
        kernel_size: k of U, C, V and N, odd; W has 2k − 1.
        image: height and width of x; the layer is built for one size.
        gamma: l2 Lipschitz bound of x ↦ y; None for a layer that is only well-posed.
        activation: σ.
        skip: s in [0, γ], the weight of x in y; at γ the layer is residual.
        stride: output pixels are stride × stride blocks of x, by invertible down-sampling of x.
        circular: whether the image is a torus; otherwise it is surrounded by zeros.
        learn_metric: whether Λ, one number per channel, is trained.
        epsilon: slack of the certificate, m ≥ epsilon.
        method: how forward and backward are solved; `PeacemanRachford()` when omitted, as m ≥ ε.
        gradient, tol, max_steps, on_failure: of `EquilibriumLayer`.
        device, dtype: as in torch.nn.

    Raises:
        ValueError: for sizes, gamma or epsilon that are not positive, even kernels, images that
            are smaller than a kernel or no multiple of the stride, a skip outside [0, γ], between
            unequal numbers of channels or with a stride.

    Reference: Revay, Wang and Manchester (2020), section 5.

    Example:
        >>> import torch
        >>> from lben import EquilibriumConv2d
        >>> layer = EquilibriumConv2d(3, 4, 2, image=(8, 8), gamma=2.0)
        >>> layer(torch.ones(1, 3, 8, 8)).shape, layer.certificate().bound
        (torch.Size([1, 2, 8, 8]), 2.0)
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        out_channels: int | None = None,
        kernel_size: int = 3,
        *,
        image: tuple[int, int],
        gamma: float | None = 1.0,
        activation: ProximalActivation | None = None,
        skip: float = 0.0,
        stride: int = 1,
        circular: bool = False,
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
        if stride < 1:
            raise ValueError(f"stride must be at least 1, got {stride}")
        if skip and stride > 1:
            raise ValueError("a skip needs stride 1: x and y have different sizes")
        super().__init__(
            ConvolutionalParameterization(
                in_channels, hidden_channels, out_channels, kernel_size, image=image, stride=stride,
                gamma=gamma, skip=skip, learn_metric=learn_metric, epsilon=epsilon,
                circular=circular, device=device, dtype=real(dtype),
            ),
            activation=activation, method=PeacemanRachford() if method is None else method,
            gradient=gradient, tol=tol, max_steps=max_steps, on_failure=on_failure,
        )  # fmt: skip
        self.image, self.stride = image, stride
        self.in_channels, self.hidden_channels = in_channels, hidden_channels
        self.out_channels = hidden_channels if out_channels is None else out_channels

    @classmethod
    def from_weights(cls, weights: ConvolutionalWeights, **options: Unpack[SolveOptions]) -> Self:
        """Return a frozen layer that holds given weights of images.

        The tensors are buffers, bit by bit, and the certificate proves what they support.

        Args:
            weights: copied; with a geometry, which says of which image size they are.
            options: as `EquilibriumLinear.from_weights`; the method is `PeacemanRachford()` when
                omitted.

        Returns:
            The layer; γ is what the weights claim.

        Raises:
            ValueError: for weights of another kind, of no image size, without units, or with NaN or
                infinite numbers.

        Example:
            >>> from lben import EquilibriumConv2d
            >>> weights = EquilibriumConv2d(1, 2, 2, image=(4, 4)).weights()
            >>> layer = EquilibriumConv2d.from_weights(weights)
            >>> layer.weights().fingerprint == weights.fingerprint, layer.certificate().bound
            (True, 1.0)
        """
        if not isinstance(weights, ConvolutionalWeights) or len(weights.b) == 0:
            raise ValueError(
                f"EquilibriumConv2d holds ConvolutionalWeights with units, got {_describe(weights)}"
            )
        _refuse_non_finite(weights)
        layer = cls.__new__(cls)
        EquilibriumLayer.__init__(layer, FixedWeights(weights), **_for_images(options))
        layer.image, layer.stride = weights.placed.image, weights.placed.stride
        layer.in_channels, layer.hidden_channels = weights.sample_shape[0], len(weights.b)
        layer.out_channels = len(weights.C)
        return layer

    def extra_repr(self) -> str:
        """Describe the layer in `repr`."""
        sizes = f"{self.in_channels}, {self.hidden_channels}, {self.out_channels}"
        return f"{sizes}, image={self.image}, {super().extra_repr()}"


class PooledEquilibriumConv2d(EquilibriumLayer[PooledWeights]):
    """Images to q numbers: y = ⟨C, z⟩ + b_y, C pooling and then a matrix, γ-Lipschitz in l2.

    The bound holds for y, pooling included (`PooledParameterization`). W is a convolution plus a
    matrix of rank q. Its resolvent is a Fourier transform with a correction of rank q.

    Args:
        in_channels: p.
        hidden_channels: n; several numbers for a state of several scales, finest first, each of
            half the resolution of the one before.
        out_features: q.
        kernel_size: k, odd.
        image: height and width of x; the layer is built for one size.
        pool: size of the pooling windows in pixels of x.
        gamma: l2 Lipschitz bound of x ↦ y; None for a layer that is only well-posed.
        activation: σ.
        circular: whether the image is a torus; otherwise it is surrounded by zeros.
        learn_metric: whether Λ, one number per channel, is trained.
        epsilon: slack of the certificate, m ≥ epsilon.
        method: how forward and backward are solved; `PeacemanRachford()` when omitted, as m ≥ ε.
        gradient, tol, max_steps, on_failure: of `EquilibriumLayer`.
        device, dtype: as in torch.nn.

    Raises:
        ValueError: for sizes, gamma or epsilon that are not positive, even kernels, images that
            are smaller than a kernel or no multiple of the windows and of the coarsest pixels.

    Reference: Revay, Wang and Manchester (2020), section 5; Winston and Kolter (2020), section 5,
    for several scales.

    Example:
        >>> import torch
        >>> from lben import PooledEquilibriumConv2d
        >>> layer = PooledEquilibriumConv2d(3, (4, 8), 10, image=(8, 8))
        >>> layer(torch.ones(1, 3, 8, 8)).shape, layer.certificate().bound
        (torch.Size([1, 10]), 1.0)
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int | tuple[int, ...],
        out_features: int,
        kernel_size: int = 3,
        *,
        image: tuple[int, int],
        pool: int = 4,
        gamma: float | None = 1.0,
        activation: ProximalActivation | None = None,
        circular: bool = False,
        learn_metric: bool = True,
        epsilon: float = 0.1,
        method: Method | None = None,
        gradient: Gradient | None = None,
        tol: float = 1e-4,
        max_steps: int = 5000,
        on_failure: OnFailure = "warn",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        parameterization = PooledParameterization(
            in_channels, hidden_channels, out_features, kernel_size, image=image, pool=pool,
            gamma=gamma, learn_metric=learn_metric, epsilon=epsilon,
            circular=circular, device=device, dtype=real(dtype),
        )  # fmt: skip
        super().__init__(
            parameterization, activation=activation,
            method=PeacemanRachford() if method is None else method, gradient=gradient, tol=tol,
            max_steps=max_steps, on_failure=on_failure,
        )  # fmt: skip
        self.image, self.in_channels = image, in_channels
        self.hidden_channels = parameterization.layout.scales
        self.out_features = out_features

    @classmethod
    def from_weights(cls, weights: PooledWeights, **options: Unpack[SolveOptions]) -> Self:
        """Return a frozen layer that holds given weights of images with a pooled output.

        The tensors are buffers, bit by bit, and the certificate proves what they support.

        Args:
            weights: copied; their state has a geometry, which says of which image size they are.
            options: as `EquilibriumConv2d.from_weights`.

        Returns:
            The layer; γ is what the weights claim.

        Raises:
            ValueError: for weights of another kind, of no image size, without units, or with NaN or
                infinite numbers.

        Example:
            >>> from lben import PooledEquilibriumConv2d
            >>> weights = PooledEquilibriumConv2d(1, 2, 3, image=(4, 4)).weights()
            >>> layer = PooledEquilibriumConv2d.from_weights(weights)
            >>> layer.weights().fingerprint == weights.fingerprint, layer.certificate().bound
            (True, 1.0)
        """
        if not isinstance(weights, PooledWeights) or len(weights.state.b) == 0:
            raise ValueError(
                f"PooledEquilibriumConv2d holds PooledWeights with units, got {_describe(weights)}"
            )
        _refuse_non_finite(weights)
        layer = cls.__new__(cls)
        EquilibriumLayer.__init__(layer, FixedWeights(weights), **_for_images(options))
        layer.image = weights.state.placed.image
        layer.in_channels, layer.hidden_channels = weights.sample_shape[0], (len(weights.state.b),)
        layer.out_features = len(weights.b_y)
        return layer

    def extra_repr(self) -> str:
        """Describe the layer in `repr`."""
        sizes = f"{self.in_channels}, {self.hidden_channels}, {self.out_features}"
        return f"{sizes}, image={self.image}, {super().extra_repr()}"


def _assemble(weights: DenseWeights | Sequence[DenseWeights]) -> DenseWeights:
    """Return the weights of one layer as they are, those of several as one set in float64."""
    layers = [weights] if isinstance(weights, Weights) else list(weights)
    for layer in layers:
        if not isinstance(layer, DenseWeights):
            raise ValueError(
                f"EquilibriumLinear holds DenseWeights, got {_describe(layer)}: of images take "
                "EquilibriumConv2d.from_weights or PooledEquilibriumConv2d.from_weights, or their "
                "matrices for one image size, weights.dense(...)"
            )
        _refuse_non_finite(layer)
    if not layers:
        raise ValueError("EquilibriumLinear holds the DenseWeights of at least one layer, got none")
    whole = (
        layers[0] if len(layers) == 1 else reduce(stack, [w.apply(Tensor.double) for w in layers])
    )
    if whole.hidden_features == 0:
        raise ValueError("the weights have no hidden units: there is nothing to solve for")
    return whole


def _refuse_non_finite(weights: Weights) -> None:
    for name, tensor in weights.tensors().items():
        if wrong := int((~torch.isfinite(tensor)).sum()):
            raise ValueError(
                f"{name} has {wrong} entries that are NaN or infinite, of {tensor.numel()}: the "
                "training that made these weights has diverged, or their file is damaged"
            )


def _describe(weights: object) -> str:
    empty = isinstance(weights, Weights) and weights.multiplier.numel() == 0
    return type(weights).__name__ + (" without units" if empty else "")


def _for_images(options: SolveOptions) -> SolveOptions:
    """Return options whose method is that of layers of images when it is omitted."""
    method = options.get("method")
    return {**options, "method": PeacemanRachford() if method is None else method}


def _complete(weights: DenseWeights) -> CompleteParameterization:
    """Return the complete parameterization of weights, computed in float64, in their own dtype."""
    with torch.no_grad():
        parameterization = CompleteParameterization(weights.apply(Tensor.double))
    return parameterization.to(weights.W.dtype)

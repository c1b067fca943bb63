"""How is an equilibrium of images evaluated: on which torus, and what is read from it?"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from lben.certificates import Certificate, certify_convolution, certify_pooled
from lben.layers.equilibrium import EquilibriumLayer
from lben.layers.growth import absolute_norm, norms_up
from lben.layers.linear_maps import Convolution
from lben.layers.roundoff import underflow
from lben.layers.uniform import Rates
from lben.parameterizations import ConvolutionalParameterization, PooledParameterization
from lben.parameterizations.feedforward import taps
from lben.parameterizations.sizes import real
from lben.rigorous import UNIT, gamma_k
from lben.weights import ConvolutionalWeights, PooledWeights
from solvers import (
    ConvolutionOperator,
    Gradient,
    LinearOperator,
    LowRankUpdate,
    Masked,
    Method,
    PeacemanRachford,
    ProximalActivation,
)
from solvers.dependencies import must_not_cache
from solvers.solution import OnFailure


class ImageEquilibriumLayer(EquilibriumLayer):
    """An equilibrium of images: z = σ(W∗z + U∗x + b) with W a convolution, or more.

    Note [Zero padding on a torus]
    The resolvent of a zero-padded convolution has no Fourier transform. But with a border at least
    as wide as W reaches, k − 1 pixels, the zero-padded convolution is the circular one of a state
    that is zero on the border; and an activation that is 0 there keeps it so. That activation is a
    prox like every other (slope 0), so the same Peaceman–Rachford splitting, the same factors and
    the same certificate serve both paddings, for about (1 + (k − 1)/height)² of the work.

    Args:
        parameterization: of the weights.
        image: height and width of x.
        unshuffle: invertible down-sampling of x before all else; 1 for none.
        method: of `EquilibriumLayer`; `PeacemanRachford()` when omitted, as m ≥ ε by construction.
        options: of `EquilibriumLayer`.

    Raises:
        ValueError: if the image is not a multiple of the down-sampling, or smaller than a kernel.
    """

    _sample_dimensions, _entry = 3, "entry"

    def __init__(
        self,
        parameterization: ConvolutionalParameterization | PooledParameterization,
        image: tuple[int, int],
        unshuffle: int,
        *,
        method: Method | None = None,
        **options: Any,
    ) -> None:
        method = PeacemanRachford() if method is None else method
        super().__init__(parameterization, method=method, **options)
        with torch.no_grad():
            state = self._state(parameterization())
        if min(image) < 1 or image[0] % unshuffle or image[1] % unshuffle:
            raise ValueError(
                f"images of {image[0]} × {image[1]} pixels do not divide into blocks of "
                f"{unshuffle} × {unshuffle}"
            )
        assert state.W is not None
        self.image, self.unshuffle = image, unshuffle
        self.in_channels = state.U.shape[1] // unshuffle**2
        self.grid = (image[0] // unshuffle, image[1] // unshuffle)
        k = state.U.shape[-1]
        self._map = Convolution(kernel_size=k, padding=k // 2, circular=state.circular)
        size = state.W.shape[-1]
        name, needed = ("W", size) if state.circular else ("U", k)
        if min(self.grid) < needed:
            raise ValueError(
                f"images of {self.grid[0]} × {self.grid[1]} pixels (after down-sampling) are "
                f"smaller than the kernel of {name} ({needed} × {needed})"
            )
        self._torus = self.grid
        if not state.circular:
            self._torus = (_fast(self.grid[0] + size // 2), _fast(self.grid[1] + size // 2))
        self._channels = len(state.b)
        self._inside = None if state.circular else self._image_units(state.b.device)

    def images(self, z: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch c h w"]:
        """Return states, as `equilibrium` gives them, as images."""
        whole = z.unflatten(-1, (-1, *self._torus))
        return whole[..., : self.grid[0], : self.grid[1]]

    def _image_units(self, device: torch.device) -> Bool[Tensor, " n"]:
        """Return which units lie inside the image, and not on its border."""
        real = "cpu" if device.type == "meta" else device
        with torch.inference_mode(False):
            inside = torch.zeros(self._channels, *self._torus, dtype=torch.bool, device=real)
            inside[:, : self.grid[0], : self.grid[1]] = True
            return inside.flatten()

    @staticmethod
    def _state(weights: Any) -> ConvolutionalWeights:
        return weights.state if isinstance(weights, PooledWeights) else weights

    @property
    def _sigma(self) -> ProximalActivation:
        inside, device = self._inside, self._reference().device
        if inside is None:
            return self.activation
        # The mask follows from the sizes, so it is neither state nor moved with it.
        if inside.device != device:
            inside = self._image_units(device)
            if not must_not_cache():
                self._inside = inside
        return Masked(self.activation, inside)

    def _bias(self, weights: Any, x: Tensor) -> Tensor:
        state = self._state(weights)
        return self._flat(self._map.apply(self._unshuffled(x), state.U, state.b))

    def _unshuffled(self, x: Tensor) -> Tensor:
        return x if self.unshuffle == 1 else functional.pixel_unshuffle(x, self.unshuffle)

    def _flat(self, image: Tensor) -> Tensor:
        below, right = (t - s for t, s in zip(self._torus, self.grid, strict=True))
        return functional.pad(image, (0, right, 0, below)).flatten(1)

    def _bias_rounding(self, state: ConvolutionalWeights, x: Tensor) -> Tensor:
        size = self._map.apply(self._unshuffled(x).abs(), state.U.abs(), state.b.abs())
        terms = state.U[0].numel()
        lost = underflow(terms, x, state.U, dims=3)
        v = (size * gamma_k(terms + 4) + lost) * taps(state.Lambda.sqrt())
        return norms_up(v.flatten(1), 1)

    def _drive(self, state: ConvolutionalWeights, unit: float) -> tuple[float, float]:
        """Return how much v grows with x, and its rounding."""
        root = state.Lambda.sqrt()
        drive = absolute_norm(root[:, None] * state.U.abs().flatten(2).sum(2))
        return drive, (state.U[0].numel() + 4) * unit * drive

    def _new_operator(self, weights: Any) -> LinearOperator:
        return self._convolution(weights.apply(Tensor.detach))

    def _convolution(self, weights: Any) -> ConvolutionOperator:
        state = self._state(weights)
        assert state.W is not None
        return ConvolutionOperator(state.W, self._torus, state.Lambda)

    def _check_proof(self, weights: Any, proof: Certificate) -> None:
        super()._check_proof(weights, proof)
        U = self._state(weights).U
        if U.is_cpu:  # `solvers.acceptance` knows CUDA
            self._map.refuse_other_sums(U)

    def _operator_tensors(self, weights: Any) -> tuple[Tensor, ...]:
        state = self._state(weights)
        assert state.W is not None
        return (state.W,)

    def _check_shape(self, x: Tensor) -> None:
        expected = (self.in_channels, *self.image)
        if x.ndim != 4 or tuple(x.shape[1:]) != expected:
            hint = "the layer is built for one image size"
            if tuple(x.shape[-3:]) == expected:
                hint = "merge the leading dimensions, x.flatten(0, -4), and unflatten the result"
                hint = "add a batch dimension, x[None]" if x.ndim == 3 else hint
            raise ValueError(
                f"expected images of shape (batch, {', '.join(map(str, expected))}), "
                f"got {tuple(x.shape)}: {hint}"
            )


def _fast(size: int) -> int:
    """Return the next even size whose Fourier transform is fast: prime factors 2, 3 and 5 only."""
    size += size % 2
    rest = size
    for prime in (2, 3, 5):
        while rest % prime == 0:
            rest //= prime
    return size if rest == 1 else _fast(size + 2)


class EquilibriumConv2d(ImageEquilibriumLayer):
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
        method, gradient, tol, max_steps, on_failure: of `EquilibriumLayer`.
        device, dtype: as in torch.nn.

    Raises:
        ValueError: for sizes, gamma or epsilon that are not positive, even kernels, images that
            are smaller than a kernel or no multiple of the stride, a skip outside [0, γ], between
            unequal numbers of channels or with a stride.

    Reference: Revay, Wang and Manchester (2020), section 5.
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
                in_channels * stride**2, hidden_channels, out_channels, kernel_size, gamma=gamma,
                skip=skip, learn_metric=learn_metric, epsilon=epsilon,
                circular=circular, device=device, dtype=real(dtype),
            ),
            image, stride, activation=activation, method=method, gradient=gradient, tol=tol,
            max_steps=max_steps, on_failure=on_failure,
        )  # fmt: skip
        self.hidden_channels = hidden_channels
        self.out_channels = hidden_channels if out_channels is None else out_channels
        self._identity = out_channels is None

    def _readout(self, weights: ConvolutionalWeights, x: Tensor, z: Tensor) -> Tensor:
        y = self.images(z)
        if not self._identity:
            y = self._map.apply(y, weights.C, weights.b_y)
        return y if weights.D is None else y + weights.D * x

    def _prove(self, weights: ConvolutionalWeights) -> Certificate:
        return certify_convolution(weights, self.grid)

    def _check_proof(self, weights: ConvolutionalWeights, proof: Certificate) -> None:
        super()._check_proof(weights, proof)
        proof.check_image(self.grid, exactly=weights.circular)

    def _rates(self, weights: ConvolutionalWeights, unit: float) -> Rates:
        drive, rounding = self._drive(weights, unit)
        root, readout = weights.Lambda.sqrt(), 0.0
        if not self._identity:
            size = absolute_norm(weights.C.abs().flatten(2).sum(2) / root)
            readout = (weights.C[0].numel() + 8) * unit * size
        through = 0.0
        if isinstance(weights.D, float):
            through, readout = 8 * unit * weights.D, readout + 4 * unit / float(root.min())
        return Rates(drive=drive, drive_rounding=rounding, readout=readout, through=through)

    def _rounding(
        self, weights: ConvolutionalWeights, x: Tensor, z: Tensor
    ) -> tuple[Tensor, Tensor]:
        size = self.images(z).abs()
        y = torch.zeros_like(size[:, : self.out_channels])
        if not self._identity:
            terms = weights.C[0].numel()
            y = gamma_k(terms + 4) * self._map.apply(size, weights.C.abs(), weights.b_y.abs())
            y = y + underflow(terms, size, weights.C, dims=3)
        if isinstance(weights.D, float):
            y = y + 4 * UNIT * (self._readout(weights, x, z).abs() + weights.D * x.abs())
            y = y + underflow(1, x, x.new_tensor(weights.D), dims=3)
        return self._bias_rounding(weights, x), norms_up(y.flatten(1), 1)

    def extra_repr(self) -> str:
        """Describe the layer in `repr`."""
        return (
            f"{self.in_channels}, {self.hidden_channels}, {self.out_channels}, "
            f"image={self.image}, gamma={self.gamma}, activation={self.activation}, "
            f"method={self.method}, tol={self.tol}"
        )


class PooledEquilibriumConv2d(ImageEquilibriumLayer):
    """Images to q numbers: y = ⟨C, z⟩ + b_y, C pooling and then a matrix, γ-Lipschitz in l2.

    The bound is that of y as a whole (`PooledParameterization`): W is a convolution plus a matrix
    of rank q, and its resolvent a Fourier transform with a correction of that rank.

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
        method, gradient, tol, max_steps, on_failure: of `EquilibriumLayer`.
        device, dtype: as in torch.nn.

    Raises:
        ValueError: for sizes, gamma or epsilon that are not positive, even kernels, images that
            are smaller than a kernel or no multiple of the windows and of the coarsest pixels.

    Reference: Revay, Wang and Manchester (2020), section 5; Winston and Kolter (2020), section 5,
    for several scales.
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
            parameterization, image, parameterization.layout.factors[0], activation=activation,
            method=method, gradient=gradient, tol=tol, max_steps=max_steps, on_failure=on_failure,
        )  # fmt: skip
        self.out_features = out_features

    def _readout(self, weights: PooledWeights, x: Tensor, z: Tensor) -> Tensor:
        return functional.linear(self.images(z).flatten(1), weights.C.flatten(1), weights.b_y)

    def _new_operator(self, weights: PooledWeights) -> LinearOperator:
        weights = weights.apply(Tensor.detach)
        return LowRankUpdate(self._convolution(weights), *self._factors(weights))

    def _operator_tensors(self, weights: PooledWeights) -> tuple[Tensor, ...]:
        return (*super()._operator_tensors(weights), *self._factors(weights))

    def _factors(self, weights: PooledWeights) -> tuple[Tensor, Tensor]:
        """Return A and C as units × q, on the torus."""
        return self._flat(weights.A).T, self._flat(weights.C).T

    def _prove(self, weights: PooledWeights) -> Certificate:
        return certify_pooled(weights)

    def _check_proof(self, weights: PooledWeights, proof: Certificate) -> None:
        super()._check_proof(weights, proof)
        proof.check_image(self.grid, exactly=weights.state.circular)

    def _rates(self, weights: PooledWeights, unit: float) -> Rates:
        drive, rounding = self._drive(weights.state, unit)
        C = (weights.C / taps(weights.state.Lambda.sqrt())).flatten(1)
        readout = (C.shape[1] + 8) * unit * absolute_norm(C)
        return Rates(drive=drive, drive_rounding=rounding, readout=readout)

    def _rounding(self, weights: PooledWeights, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        C = weights.C.flatten(1)
        state = self.images(z).flatten(1)
        size = state.abs() @ C.abs().T + weights.b_y.abs()
        y = gamma_k(C.shape[1] + 4) * size + underflow(C.shape[1], state, C)
        return self._bias_rounding(weights.state, x), norms_up(y, 1)

    def extra_repr(self) -> str:
        """Describe the layer in `repr`."""
        assert isinstance(self.parameterization, PooledParameterization)
        return (
            f"{self.in_channels}, {self.parameterization.layout.scales}, {self.out_features}, "
            f"image={self.image}, gamma={self.gamma}, activation={self.activation}, "
            f"method={self.method}, tol={self.tol}"
        )

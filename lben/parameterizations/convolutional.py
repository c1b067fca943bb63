"""Which convolution W makes the certificate hold for every value of the free kernels?

At every frequency the formulas are those of the direct parameterization (Revay, Wang and
Manchester 2020, sections 4.2 and 5). A product of convolutions is a convolution, so products are
formed from kernels and never from matrices. Symbols: docs/glossary.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from lben.parameterizations.equilibrium import EquilibriumParameterization
from lben.parameterizations.feedforward import UNIT_BOUND
from lben.parameterizations.multipliers import gram
from lben.parameterizations.polyphase import Polyphase
from lben.weights import (
    ConvolutionalWeights,
    ImageGeometry,
    PooledWeights,
    check_epsilon,
    check_gamma,
)
from lben.weights.linear_maps import mirror, taps


class ConvolutionalParameterization(EquilibriumParameterization[ConvolutionalWeights]):
    """Free k × k kernels U, C, V, N of an equilibrium layer from images to images.

    With one entry of Λ per channel, G = ΛU + sCᵀ/γ and r = γ − s²/γ,

        W = I − Λ⁻¹ ( ½CᵀC/γ + ½GGᵀ/r + VᵀV + εΛ + N − Nᵀ ),   D = sI.

    W has a kernel of size 2k − 1. At s = γ, as in residual layers, r is 0; then G must be 0 too,
    and U = −Λ⁻¹Cᵀ is not free. γ is the unit of y (see `DirectParameterization`): the free kernels
    belong to γ = 1, and C, D, b_y and Λ are γ times what the formulas give there. For y = z
    (C = I), γ is the unit of z instead: U and b are multiplied by γ, and Λ is divided by it.

    Args:
        in_channels: p.
        hidden_channels: n.
        out_channels: q; None for y = z (C = I).
        kernel_size: k, odd.
        image: height and width of x; None for weights of every image size, which can be proved and
            not evaluated.
        stride: x is down-sampled first, each stride × stride block of pixels into channels.
        gamma: l2 Lipschitz bound of x ↦ y, or None.
        skip: s in [0, γ]; 0 for no feed-through.
        learn_metric: whether Λ is trained; otherwise Λ is I at γ = 1.
        epsilon: slack, m ≥ ε.
        circular: whether the image is a torus; otherwise it is surrounded by zeros.
        device, dtype: as in torch.nn.

    Raises:
        ValueError: if a size, gamma or epsilon is not positive, the kernel size even, or a skip
            lies outside [0, γ], has no γ, or joins unequal numbers of channels; if the image is no
            multiple of the stride, or smaller than a kernel.

    Reference:
        Revay, Wang and Manchester (2020), "Lipschitz bounded equilibrium networks", section 5.

    Example:
        >>> import torch
        >>> from lben.parameterizations import ConvolutionalParameterization
        >>> _ = torch.manual_seed(0)
        >>> free = ConvolutionalParameterization(1, 2, 1, gamma=2.0, circular=True)
        >>> weights = free()
        >>> tuple(weights.U.shape), tuple(weights.W.shape), weights.gamma
        ((2, 1, 3, 3), (2, 2, 5, 5), 2.0)
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        out_channels: int | None,
        kernel_size: int = 3,
        *,
        image: tuple[int, int] | None = None,
        stride: int = 1,
        gamma: float | None = 1.0,
        skip: float = 0.0,
        learn_metric: bool = True,
        epsilon: float = 1e-3,
        circular: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        outputs = hidden_channels if out_channels is None else out_channels
        _check_sizes((in_channels, hidden_channels, outputs), kernel_size)
        gamma, epsilon, skip = check_gamma(gamma), check_epsilon(epsilon), float(skip)
        if skip and (gamma is None or not 0 <= skip <= gamma):
            raise ValueError(f"skip must lie in [0, gamma], got {skip} with gamma = {gamma}")
        if skip and (in_channels != out_channels):
            raise ValueError(
                f"a skip needs as many output channels as inputs, got {in_channels} and "
                f"{out_channels}"
            )
        # At s = γ, s is a little smaller, so that floating point can prove the bound.
        self.skip = skip / math.sqrt(UNIT_BOUND) if skip == gamma else skip
        self.gamma, self.epsilon, self.circular = gamma, epsilon, circular
        k, n, inputs = kernel_size, hidden_channels, in_channels * stride**2

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.C = None if out_channels is None else parameter(outputs, n, k, k)
        self.U = None if skip == gamma else parameter(n, inputs, k, k)
        self.V, self.N = parameter(n, n, k, k), parameter(n, n, k, k)
        self.b, self.b_y = parameter(n), None if self.C is None else parameter(outputs)
        self.log_metric = parameter(n) if learn_metric else None
        self.geometry = None
        if image is not None:
            self.geometry = ImageGeometry(
                image, stride=stride, circular=circular, state_channels=n,
                state_kernel=2 * k - 1, input_kernel=k,
            )  # fmt: skip
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw fresh kernels: U and C with norm near 1, V and N at 0.3 of that, V near ½I.

        So m starts near ¼, and the first solves are easy.
        """
        for kernel, size in ((self.U, 1.0), (self.C, 1.0), (self.V, 0.3), (self.N, 0.3)):
            if kernel is not None:
                _draw(kernel, size)
        _add_identity(self.V, 0.5)
        for vector in (self.b, self.b_y, self.log_metric):
            if vector is not None:
                nn.init.zeros_(vector)

    def forward(self) -> ConvolutionalWeights:
        """Return the explicit weights with bound γ, differentiable in the free kernels."""
        Lambda = torch.ones_like(self.b) if self.log_metric is None else self.log_metric.exp()
        C = _identity(self.b) if self.C is None else self.C
        b_y = torch.zeros_like(self.b) if self.b_y is None else self.b_y
        U, terms = self._bound_terms(Lambda, C)
        W = _state_kernel(self.V, self.N, terms, Lambda, self.epsilon)
        b: Tensor = self.b
        unit = 1.0 if self.gamma is None else self.gamma
        if self.C is None:
            U, b, Lambda = unit * U, unit * b, Lambda / unit
        else:
            C, b_y, Lambda = unit * C, unit * b_y, unit * Lambda
        return ConvolutionalWeights(
            W=W, U=U, b=b, C=C, D=self.skip or None, b_y=b_y, Lambda=Lambda,
            gamma=self.gamma, circular=self.circular, geometry=self.geometry,
            reads_state=self.C is None,
        )  # fmt: skip

    def _bound_terms(self, Lambda: Tensor, C: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return U and the kernels ½CᵀC and ½GGᵀ/r, all at γ = 1."""
        row = Lambda[:, None, None, None]
        if self.gamma is None:
            assert self.U is not None
            return self.U, []
        skip = self.skip / self.gamma
        if self.U is None:
            return -mirror(C) / row, [_outer(C) / (2 * skip)]
        G = row * self.U
        if skip:
            G = G + skip * mirror(C)
        return self.U, [_outer(C) / 2, gram(G) / (2 * (1 - skip**2))]


_GAIN = 2.0
"""Of U and of the read-out of `PooledParameterization` at the start."""


class PooledParameterization(EquilibriumParameterization[PooledWeights]):
    """Free kernels of an equilibrium layer from images to numbers, with a pooled readout.

    The states, at one or more resolutions, are averaged over windows; a matrix G follows.

        y = Cz + b_y,   C = G · (sum over windows ÷ side of the windows),
        W = I − Λ⁻¹ ( ½CᵀC/γ + ½ΛUUᵀΛ/γ + VᵀV + εΛ + N − Nᵀ ).

    Here γ is the unit of y (see `DirectParameterization`): C, b_y and Λ are γ times those of γ = 1.

    The pooling preserves norms: ‖C‖₂ = ‖G‖₂. CᵀC has rank q and is no convolution; so W is a
    convolution plus A⟨C, ·⟩ with A = −½CΛ⁻¹/γ. The bound γ is therefore one of y itself, not the
    product of a bound of z and the norm of the readout.

    With several numbers of hidden channels the state has as many scales, each of half the
    resolution of the one before: V and N couple a scale with itself and, by convolutions of stride
    2, with the next; the input enters the finest (the multi-tier layer of Winston and Kolter 2020,
    section 5). Everything is written on the coarsest grid, where a pixel of a finer scale is a
    channel of its own (`Polyphase`), so that one convolution is the whole of W.

    Args:
        in_channels: p.
        hidden_channels: of every scale, finest first; one number for one scale.
        out_features: q.
        kernel_size: k, odd.
        image: height and width of the input, multiples of the windows and of the coarsest pixels.
        pool: size of the windows in pixels of the input.
        gamma: l2 Lipschitz bound of x ↦ y, or None.
        learn_metric: whether Λ is trained; otherwise Λ = γI, or I without γ.
        epsilon: slack, m ≥ ε.
        circular: whether the image is a torus; otherwise it is surrounded by zeros.
        device, dtype: as in torch.nn.

    Raises:
        ValueError: if a size, gamma or epsilon is not positive, the kernel size even, or the image
            not a multiple of the windows or of the coarsest pixels.

    Reference:
        Winston and Kolter (2020), "Monotone operator equilibrium networks", section 5, for the
        scales.

    Example:
        >>> import torch
        >>> from lben.parameterizations import PooledParameterization
        >>> _ = torch.manual_seed(0)
        >>> weights = PooledParameterization(1, 2, 3, image=(8, 8), gamma=0.5)()
        >>> tuple(weights.C.shape), weights.gamma
        ((3, 2, 8, 8), 0.5)
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int | Sequence[int],
        out_features: int,
        kernel_size: int = 3,
        *,
        image: tuple[int, int],
        pool: int = 4,
        gamma: float | None = 1.0,
        learn_metric: bool = True,
        epsilon: float = 0.1,
        circular: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        scales = (hidden_channels,) if isinstance(hidden_channels, int) else tuple(hidden_channels)
        _check_sizes((in_channels, *scales, out_features, pool), kernel_size)
        gamma, epsilon = check_gamma(gamma), check_epsilon(epsilon)
        self.layout = Polyphase(in_channels, scales, kernel_size)
        coarsest = self.layout.factors[0]  # a coarsest pixel in pixels of the input
        for unit, what in ((pool, "windows"), (coarsest, "coarsest pixels")):
            if image[0] % unit or image[1] % unit:
                raise ValueError(
                    f"images of {image[0]} × {image[1]} pixels do not divide into {what} of "
                    f"{unit} × {unit}"
                )
        if pool % coarsest:
            raise ValueError(f"pool = {pool} must be a multiple of the coarsest pixel, {coarsest}")
        self.gamma, self.epsilon, self.circular, self.pool = gamma, epsilon, circular, pool
        self.image = image

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        k, windows = kernel_size, (image[0] // pool, image[1] // pool)
        couplings = [(n, n, k, k) for n in scales]
        couplings += [(to, of, k, k) for of, to in pairwise(scales)]
        self.U = parameter(scales[0], in_channels, k, k)
        self.V = nn.ParameterList(parameter(*shape) for shape in couplings)
        self.N = nn.ParameterList(parameter(*shape) for shape in couplings)
        self.G = parameter(out_features, sum(scales), *windows)
        self.b, self.b_y = parameter(sum(scales)), parameter(out_features)
        self.log_metric = parameter(sum(scales)) if learn_metric else None
        self.geometry = ImageGeometry(
            image, stride=coarsest, circular=circular, state_channels=self.layout.units,
            state_kernel=2 * k - 1, input_kernel=k,
        )  # fmt: skip
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw fresh kernels: U and G near orthogonal and of norm 2, V and N small.

        If U has gain u and G gain c in every direction, and VᵀV + ε = s, then at γ = 1 the layer
        has the gain cu / (½(c² + u²) + s) at most. That is near 1 where u = c is large.
        """
        _draw(self.U, 0.3 * _GAIN)
        centre = self.U.shape[-1] // 2
        turn = nn.init.orthogonal_(torch.empty_like(self.U[:, :, centre, centre]))
        with torch.no_grad():
            self.U[:, :, centre, centre] += _GAIN * turn
        for kernel in (*self.V, *self.N):
            _draw(kernel, 0.3)
        for kernel in self.V[: len(self.layout.scales)]:
            _add_identity(kernel, 0.1)  # more is slack, which keeps the bound from being reached
        nn.init.orthogonal_(self.G.detach().flatten(1), gain=_GAIN)
        nn.init.zeros_(self.b)
        nn.init.zeros_(self.b_y)
        if self.log_metric is not None:
            nn.init.zeros_(self.log_metric)

    def forward(self) -> PooledWeights:
        """Return the explicit weights on the coarsest grid, differentiable in the free kernels."""
        layout = self.layout
        b = layout.spread(self.b)
        Lambda = torch.ones_like(b)
        if self.log_metric is not None:
            Lambda = layout.spread(self.log_metric.exp())
        U, V, N = layout.input(self.U), layout.state(list(self.V)), layout.state(list(self.N))
        C, terms, A = self._readout(), [], None
        if self.gamma is not None:
            terms = [gram(Lambda[:, None, None, None] * U) / 2]
            A = C / taps(-2 * self.gamma * Lambda)
        W = _state_kernel(V, N, terms, Lambda, self.epsilon)
        b_y: Tensor = self.b_y
        if self.gamma is not None:
            C, b_y, Lambda = self.gamma * C, self.gamma * b_y, self.gamma * Lambda
        state = ConvolutionalWeights(
            W=W, U=U, b=b, C=W.new_zeros(0, len(b), 1, 1), D=None, b_y=b.new_zeros(0),
            Lambda=Lambda, gamma=None, circular=self.circular, geometry=self.geometry,
        )  # fmt: skip
        return PooledWeights(
            state=state, A=torch.zeros_like(C) if A is None else A, C=C, b_y=b_y,
            gamma=self.gamma,
        )  # fmt: skip

    def _readout(self) -> Tensor:
        """Return C: each entry of G repeated over the pixels of its window; ‖C‖₂ = ‖G‖₂."""
        finest = self.layout.factors[0]
        window = self.pool // finest
        sides = self.layout.sides(self.G) * window
        C = self.layout.spread_channels(self.G / taps(sides))
        return C.repeat_interleave(window, 2).repeat_interleave(window, 3)


def _check_sizes(sizes: tuple[int, ...], kernel_size: int) -> None:
    if min(*sizes, kernel_size) < 1:
        raise ValueError(
            f"every size must be at least 1, got {sizes} and kernel_size {kernel_size}"
        )
    if kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd, got {kernel_size}")


def _draw(kernel: Tensor, size: float) -> None:
    """Draw a kernel whose convolution has a norm of about `size`."""
    spread = math.sqrt(kernel[0].numel()) + math.sqrt(kernel[:, 0].numel())
    nn.init.normal_(kernel, std=size / spread)


@torch.no_grad()
def _add_identity(kernel: Tensor, share: float) -> None:
    """Add a share of I to a convolution."""
    centre = kernel.shape[-1] // 2
    kernel[:, :, centre, centre].diagonal().add_(share)


def _identity(b: Tensor) -> Tensor:
    return torch.eye(len(b), dtype=b.dtype, device=b.device)[:, :, None, None]


def _outer(C: Tensor) -> Tensor:
    """Return the kernel of CᵀC."""
    return gram(C.transpose(0, 1)).flip(2, 3)


def _state_kernel(
    V: Tensor, N: Tensor, terms: list[Tensor], Lambda: Tensor, epsilon: float
) -> Tensor:
    """Return the kernel of I − Λ⁻¹(VᵀV + N − Nᵀ + εΛ + Σ terms), of size 2k − 1."""
    size, n = 2 * V.shape[-1] - 1, len(Lambda)
    monotone = _outer(V)
    for kernel in (N - mirror(N), *terms):
        monotone = monotone + _grown(kernel, size)
    diagonal = (1 - epsilon) * torch.eye(n, dtype=V.dtype, device=V.device)
    return _grown(diagonal[:, :, None, None], size) - monotone / Lambda[:, None, None, None]


def _grown(kernel: Tensor, size: int) -> Tensor:
    """Return the kernel with zeros around it, of an odd size."""
    return functional.pad(kernel, [(size - kernel.shape[-1]) // 2] * 4)

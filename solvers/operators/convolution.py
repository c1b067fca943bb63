"""How is W handled when it is a convolution of images on a torus?"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Complex, Float
from torch import Tensor
from torch.nn.grad import conv2d_weight

from solvers.activations import Step
from solvers.native import spectral
from solvers.operators import batched
from solvers.operators.base import LinearOperator, check_metric, check_tensors
from solvers.operators.fourier import Torus
from solvers.operators.maps import Map, Resolvent, column, own_step, singular, step_key
from solvers.operators.matrix import Constants
from solvers.precision import cast


@dataclass(frozen=True, eq=False)
class SpectralMap(Map):
    """A convolution by its symbols."""

    is_expensive = True
    torus: Torus
    symbols: Complex[Tensor, "f c c"]

    def add(self, x: Tensor, shift: Tensor, out: Tensor | None) -> Tensor:
        return torch.add(shift, self.torus.multiply(self.symbols, x), out=out)


@dataclass(frozen=True, eq=False)
class ConvolutionMap(Map):
    """A convolution by its kernel."""

    torus: Torus
    kernel: Float[Tensor, "c c k k"]

    def add(self, x: Tensor, shift: Tensor, out: Tensor | None) -> Tensor:
        return torch.add(shift, self.torus.convolve(x, self.kernel), out=out)


@dataclass(frozen=True, eq=False)
class ConvolutionResolvent(Resolvent):
    """R by its symbols (I + diag(α)(I − Ŵ(ω)))⁻¹, one c × c inverse per frequency."""

    torus: Torus
    symbols: Complex[Tensor, "f c c"]
    step: Step

    def solve(self, x: Tensor) -> Tensor:
        return self.torus.multiply(self.symbols, x)

    @property
    def T(self) -> ConvolutionResolvent:
        symbols, alpha = _adjoint(self.symbols), column(self.torus.per_channel(self.step))
        if isinstance(alpha, Tensor) and alpha.ndim:
            symbols = symbols * (alpha / alpha.T)
        return ConvolutionResolvent(self.torus, symbols, self.step)

    def reflection(self) -> SpectralMap:
        symbols = 2 * self.symbols
        symbols.diagonal(dim1=1, dim2=2).sub_(1)
        return SpectralMap(self.torus, symbols)


# Note [Direct or by the Fourier transform]
# A product by a k × k kernel costs 2c²k² operations per pixel directly, and by its symbols 4c² and
# two transforms, which move memory. For c up to 64, k up to 5 and 8 to 32 pixels a side the two
# were found to break even between ck² = 400 and 800 on two cores.
_DIRECT = 600


@dataclass(frozen=True, eq=False)
class ConvolutionOperator(LinearOperator):
    """W z = K ∗ z on images of c channels with circular padding, units flattened.

    Resolvent, determinant and constants come from one c × c matrix per frequency of the half
    spectrum, factored once for forward and backward; never n × n. Zero padding is a circular one
    on a larger image (see `Masked`).

    Args:
        kernel: K, c × c × k × k with odd k; of W also where this is its transpose.
        image: height and width.
        channel_metric: Λ, one positive number per channel; ones when omitted.

    Raises:
        TypeError: if the kernel or the metric is no tensor of real numbers.
        ValueError: if the kernel is not square, even or larger than the image, or the metric does
            not fit.

    Example:
        >>> import torch
        >>> from solvers import ConvolutionOperator
        >>> kernel = torch.zeros(1, 1, 3, 3)
        >>> kernel[0, 0, 1, 0] = 1.0  # the left neighbour
        >>> W = ConvolutionOperator(kernel, (3, 3))
        >>> W.mv(torch.arange(9.0)).tolist()
        [2.0, 0.0, 1.0, 5.0, 3.0, 4.0, 8.0, 6.0, 7.0]
    """

    kernel: Float[Tensor, "c c k k"]
    image: tuple[int, int]
    channel_metric: Float[Tensor, " c"] = None  # type: ignore[assignment]
    transposed: bool = field(default=False, repr=False)
    _memo: dict[Hashable, Any] = field(default_factory=dict, repr=False)
    torus: Torus = field(init=False, repr=False)

    def __post_init__(self) -> None:
        K = self.kernel
        check_tensors(kernel=K)
        if K.ndim != 4 or K.shape[0] != K.shape[1] or K.shape[2] != K.shape[3] or K.numel() == 0:
            raise ValueError(f"kernel must have shape (c, c, k, k), got {tuple(K.shape)}")
        if K.shape[-1] % 2 == 0:
            raise ValueError(f"the size of a kernel must be odd, got {K.shape[-1]}")
        if min(self.image) < K.shape[-1]:
            raise ValueError(
                f"images of {self.image[0]} × {self.image[1]} pixels are smaller than the kernel "
                f"({K.shape[-1]} × {K.shape[-1]})"
            )
        if self.channel_metric is None:
            object.__setattr__(self, "channel_metric", torch.ones_like(K.detach()[:, 0, 0, 0]))
        check_metric(self.channel_metric, K.shape[0], K)
        object.__setattr__(self, "torus", Torus(K.shape[0], *self.image))

    @property
    def n(self) -> int:
        return self.torus.n

    @property
    def metric(self) -> Float[Tensor, " n"]:  # type: ignore[override]
        """Λ, one number per unit."""
        metric, pixels = self.channel_metric.detach(), self.torus.pixels
        key = ("metric", self.transposed)
        return self.memo(key, lambda: metric.repeat_interleave(pixels))

    def _own_metric(self) -> Tensor:
        return self.channel_metric

    @property
    def dtype(self) -> torch.dtype:
        return self.kernel.dtype

    @property
    def device(self) -> torch.device:
        return self.kernel.device

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.kernel,)

    def _parts(self) -> tuple[LinearOperator, ...]:
        return ()  # its fields are tensors alone

    def _given(self) -> tuple[Tensor, ...]:
        return self.tensors

    @property
    def T(self) -> ConvolutionOperator:
        # One memo for both: see Note [Shared factors] of the dense operator.
        dual, memo = self._dual_metric(), self._shared()
        return type(self)(self.kernel, self.image, dual, not self.transposed, memo)

    def rebuild(self, tensors: tuple[Tensor, ...]) -> ConvolutionOperator:
        (kernel,) = tensors
        return type(self)(kernel, self.image, self.channel_metric, self.transposed, self._shared())

    def to(self, dtype: torch.dtype) -> ConvolutionOperator:
        if dtype == self.dtype:
            return self
        return self.memo(
            ("to", dtype, self.transposed),
            lambda: type(self)(
                cast(self.kernel.detach(), dtype), self.image,
                cast(self.channel_metric.detach(), dtype), self.transposed,
            ),
        )  # fmt: skip

    def _own(self) -> Float[Tensor, "c c k k"]:
        """Return the kernel of this operator, which is mirrored in a transpose."""
        return self.kernel.transpose(0, 1).flip(2, 3) if self.transposed else self.kernel

    @property
    def _is_direct(self) -> bool:
        return self.kernel[0].numel() <= _DIRECT

    def mv(self, z: Tensor) -> Tensor:
        if self._is_direct:
            return self.torus.convolve(z, self._own())
        if torch.is_grad_enabled() and self.kernel.requires_grad:
            symbols = self.torus.symbols(self.kernel)
            return self.torus.multiply(_adjoint(symbols) if self.transposed else symbols, z)
        return self.torus.multiply(self._symbols(), z)

    def rmv(self, z: Tensor) -> Tensor:
        return self.T.mv(z)

    def pullback(self, u: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        if self.transposed:  # ⟨u, Wᵀz⟩ = ⟨z, Wu⟩
            u, z = z, u
        if not self._is_direct:
            return (self.torus.correlation(u, z, self.kernel),)
        padded, images = self.torus.padded(z, self.kernel), self.torus.images(u)
        return (conv2d_weight(padded, list(self.kernel.shape), images),)

    def magnitude(self, z: Tensor) -> Tensor:
        if self._is_direct:
            return self.torus.convolve(z, self._own().detach().abs())
        return (self._size() * self._plain().norm(z)).unsqueeze(-1).expand_as(z)

    @property
    def summands(self) -> int:
        if self._is_direct:
            return self.kernel[0].numel()
        # Note [Rounding of a transform]
        # With N = h + w a transform errs by at most 8 N^(3/2) u relative to the norm of its input,
        # even as a plain sum (Higham 2002, section 3.5 and chapter 24 for less); a symbol by
        # (k² + 8) u Σ|K|, and its product by 4c u. Relative to `_size`, and twice for all that is
        # of second order.
        transforms = 16 * sum(self.image) ** 1.5
        return 2 * math.ceil(transforms + 4 * self.torus.channels + self.kernel[0, 0].numel() + 16)

    def losses(self) -> Tensor:
        if self._is_direct:
            return self._losses_of_sums()
        lost = 2 * (self.summands + self.n) * math.sqrt(self.n) * (1 + self._size())
        return torch.full_like(self.metric, lost)

    def unread(self, size: Tensor) -> Tensor:
        return self._unread_of_sums(size)

    @property
    def by_kernels(self) -> bool:
        return self._is_direct

    def rounding(self, z: Tensor) -> Tensor:
        if self._is_direct:
            return super().rounding(z)
        # By norms: a transform spreads its error over all units.
        exact, finfo = self.to(torch.float64), torch.finfo(z.dtype)
        unit = (self.summands + 4) * finfo.eps
        largest = float(exact.root_metric.max()) * (1 + 4 * torch.finfo(torch.float64).eps)
        # A denormal entry of K that is read as zero enters c²k² of all symbols.
        unread = 4 * self.kernel[0].numel() * finfo.tiny
        size = exact._plain().norm_above(cast(z.detach(), torch.float64))
        error = (unit * self._size() + unread) * size
        return largest * (error + math.sqrt(self.n) * finfo.tiny * float(exact.losses()[0]))

    def _plain(self) -> ConvolutionOperator:
        """Return this operator in the plain norm."""
        return self.memo("plain", lambda: type(self)(self.kernel.detach(), self.image))

    def rounding_gain(self, dtype: torch.dtype) -> float:
        if self._is_direct:
            return super().rounding_gain(dtype)
        metric = cast(self.channel_metric.detach(), torch.float64)
        spread = float((metric.max() / metric.min()).sqrt()) * (1 + 2.0**-40)
        finfo = torch.finfo(dtype)
        unread = 4 * self.kernel[0].numel() * finfo.tiny
        return ((self.summands + 4) * finfo.eps * self._size() + unread) * spread

    def _absolute_gain(self) -> float:
        if self._is_direct:
            return super()._absolute_gain()
        metric = cast(self.channel_metric.detach(), torch.float64)
        return self._size() * float((metric.max() / metric.min()).sqrt()) * (1 + 2.0**-40)

    def _size(self) -> float:
        """Return ‖Σₜ|K[·, ·, t]|‖_F, which bounds ‖Ŵ(ω)‖_F at every frequency."""
        return self.memo(
            "size",
            lambda: (
                1.001
                * float(cast(self.kernel.detach(), torch.float64).abs().flatten(2).sum(2).norm())
            ),
        )

    def diagonal(self) -> Tensor:
        centre = self.kernel.shape[-1] // 2
        own = self.kernel.detach()[:, :, centre, centre].diagonal()
        return own.repeat_interleave(self.torus.pixels)

    def submatrix(self, rows: Tensor, columns: Tensor) -> Tensor:
        K, (height, width) = self._own().detach(), self.image
        k = K.shape[-1]

        def parts(index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            channel, pixel = index // (height * width), index % (height * width)
            return channel, pixel // width, pixel % width

        i, a, b = (t[..., :, None] for t in parts(rows))
        j, c, d = (t[..., None, :] for t in parts(columns))
        s, t = (c - a + k // 2) % height, (d - b + k // 2) % width
        inside = (s < k) & (t < k)
        return torch.where(inside, K[i, j, s.clamp_max(k - 1), t.clamp_max(k - 1)], 0.0)

    def _symbols(self) -> Complex[Tensor, "f c c"]:
        """Return Ŵ(ω)."""
        symbols = self.memo("symbols", lambda: self.torus.symbols(self.kernel.detach()))
        if not self.transposed:
            return symbols
        return self.memo("transposed symbols", lambda: _adjoint(symbols))

    def _shifted(self) -> Complex[Tensor, "f c c"]:
        """Return I − Ŵ(ω) for W as first given, in new memory."""
        symbols = -(self.T if self.transposed else self)._symbols()
        symbols.diagonal(dim1=1, dim2=2).add_(1)
        return symbols

    def log_determinant(self) -> float:
        return self.memo("log det", self._log_determinant)

    def _log_determinant(self) -> float:
        return _log_determinant(self._lu()[0], self.torus)

    def mean_log_eigenvalue(self) -> float:
        """Return the mean of log |det(I − Ŵ(ω))| / c over the frequencies of a coarser torus.

        The trapezoid rule for a smooth periodic function, which converges exponentially: 2k points
        in each direction take a fraction of the factorizations.
        """
        return self.memo("mean log eigenvalue", self._mean_log_eigenvalue)

    def _mean_log_eigenvalue(self) -> float:
        points = 2 * self.kernel.shape[-1]
        coarse = Torus(self.torus.channels, *(min(size, points) for size in self.image))
        symbols = -coarse.symbols(self.kernel.detach())
        symbols.diagonal(dim1=1, dim2=2).add_(1)
        return _log_determinant(batched.factors(symbols)[0], coarse) / coarse.n

    def solve(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        """Return (I − W)⁻¹x."""
        torus, (lu, pivots) = self.torus, self._lu()
        X = torus.spectrum(x)
        solved = torch.linalg.lu_solve(lu, pivots, X, adjoint=self.transposed)
        return torus.synthesis(solved, x.shape)

    def _lu(self) -> tuple[Tensor, Tensor]:
        """Return the LU factors of I − Ŵ(ω) for W as first given."""

        def factor() -> tuple[Tensor, Tensor]:
            return batched.factors(self._shifted())

        return self.memo("lu", factor)

    def resolvent(self, step: Step) -> ConvolutionResolvent:
        factor = self.memo(("resolvent", step_key(step)), lambda: self._factor(own_step(step)))
        return factor.T if self.transposed else factor

    def _factor(self, step: Step) -> ConvolutionResolvent:
        A = self._shifted() * column(self.torus.per_channel(step))
        A.diagonal(dim1=1, dim2=2).add_(1)
        inverse = spectral.inverses(A)
        if not _is_finite(inverse):  # without pivots, which only a monotone W can spare
            inverse, info = batched.inverse(A)
            if bool(info.any()) or not _is_finite(inverse):
                raise singular(step)
        return ConvolutionResolvent(self.torus, inverse, step)

    def relax(self, step: Step) -> Map:
        alpha = self.torus.per_channel(step)
        if not self._is_direct:
            symbols = self._symbols() * column(alpha)
            symbols.diagonal(dim1=1, dim2=2).add_(1 - alpha)
            return SpectralMap(self.torus, symbols)
        row = alpha[:, None, None, None] if isinstance(alpha, Tensor) and alpha.ndim else alpha
        kernel, centre = self._own().detach() * row, self.kernel.shape[-1] // 2
        kernel[:, :, centre, centre].diagonal().add_(1 - alpha)
        return ConvolutionMap(self.torus, kernel)

    def is_monotone(self) -> bool:
        """Say whether m > 0: by one Cholesky factorization per frequency, else by m itself."""
        return self.memo("is monotone", lambda: self._is_definite() or self.constants().m > 0)

    def _is_definite(self) -> bool:
        A = self._first_metric()[:, None] * self._shifted()
        _, info = torch.linalg.cholesky_ex(A + A.mH)
        return not bool(info.any())

    def constants(self) -> Constants:
        """Return (m, L) over all frequencies, widened by the rounding of transform and eigensolver.

        H is unitarily similar to its blocks Λ^½(I − Ŵ(ω))Λ^(−½). The slack is 8(c + k² + log₂ n) u
        times the largest Frobenius norm of a block, a standard bound of both (Higham 2002, ch. 24
        for the transform).
        """
        return self.memo("constants", self._constants)

    def _first_metric(self) -> Float[Tensor, " c"]:
        """Return Λ of W as first given."""
        return (self.T if self.transposed else self).channel_metric.detach()

    def _constants(self) -> Constants:
        root = cast(self._first_metric(), torch.float64).sqrt()
        symbols = -self.torus.symbols(cast(self.kernel.detach(), torch.float64))
        symbols.diagonal(dim1=1, dim2=2).add_(1)
        H = root[:, None] * symbols / root
        if not bool(torch.isfinite(torch.view_as_real(H)).all()):
            return Constants(m=-math.inf, L=math.inf)
        terms = self.torus.channels + self.kernel[0, 0].numel() + math.log2(self.n)
        size = float(torch.linalg.matrix_norm(H).amax())
        slack = 8 * terms * torch.finfo(torch.float64).eps * size
        m = float(torch.linalg.eigvalsh(0.5 * (H + H.mH))[:, 0].amin()) - slack
        return Constants(m=m, L=float(torch.linalg.matrix_norm(H, 2).amax()) + slack)


def _is_finite(symbols: Complex[Tensor, "f c c"]) -> bool:
    """Say whether nothing is infinite: a sum would be."""
    return bool(torch.isfinite(torch.view_as_real(symbols).sum()))


def _log_determinant(lu: Complex[Tensor, "f c c"], torus: Torus) -> float:
    """Return log |det| of the convolution whose symbols have these LU factors."""
    each = lu.diagonal(dim1=1, dim2=2).abs().double().log().sum(1)
    return float((each * torus.multiplicity(each)).sum())


def _adjoint(symbols: Complex[Tensor, "f c c"]) -> Complex[Tensor, "f c c"]:
    """Return the symbols of the transpose, written out."""
    return symbols.mT.conj_physical().contiguous()

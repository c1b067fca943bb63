"""What are the weights of a layer of images? Kernels of convolutions.

Symbols: docs/glossary.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from lben.rigorous import UNIT, gamma_k
from lben.weights.base import (
    Rates,
    Rounding,
    Weights,
    as_number,
    check_dimensions,
    check_gamma,
    check_tensors,
)
from lben.weights.dense import DenseWeights
from lben.weights.growth import absolute_norm, largest_up, norms_up, underflow
from lben.weights.image import ImageGeometry
from lben.weights.linear_maps import refuse_other_sums, taps
from solvers import ConvolutionOperator, LinearOperator, ProximalActivation, ZeroOperator

_LARGEST = 2**28
"""Entries of a matrix that `dense` writes out."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ConvolutionalWeights(Weights):
    """Weights of z = σ(W∗z + U∗x + b), y = C∗z + D∗x + b_y with n, p and q channels and stride 1.

    (U∗x)[i, s] = Σ U[i, j, t] x[j, s + t − a], summed over channels j and offsets t; the anchor a
    of a k × k kernel is ⌊k/2⌋ for W, U and D and k − 1 − ⌊k/2⌋ for C, so that C may be the adjoint
    of U. A layer with another padding only shifts z; its bound is the same.

    Args:
        W: n × n × j × j with odd j; None for W = 0, a layer without a solve.
        U: n × p × k × k.
        b: n.
        C: q × n × l × l; l = k unless both are odd.
        D: q × p × h × w; a number d for dI; None for no feed-through.
        b_y: q.
        Lambda: one positive multiplier per channel of z.
        gamma: the l2 Lipschitz bound that is claimed, or None for no claim.
        circular: whether the image is a torus; otherwise it is surrounded by zeros.
        geometry: the image size and the place of states on the torus. None for weights of every
            image size: they can be certified, but not evaluated.
        reads_state: whether y = z. Then C must be I and b_y 0, and neither is evaluated.

    Raises:
        ValueError: if something is not a tensor, the shapes do not fit each other, or gamma is not
            positive and finite.

    Example:
        >>> from lben import SLLConv2d, certify
        >>> weights = SLLConv2d(3, 5).weights()
        >>> weights.U.shape, weights.D
        (torch.Size([5, 3, 3, 3]), 1.0)
        >>> weights.dense((4, 4)).U.shape  # as a matrix on images of 4 × 4 pixels
        torch.Size([80, 48])
    """

    entry: ClassVar[str] = "entry"

    W: Float[Tensor, "n n j j"] | None = None
    U: Float[Tensor, "n p k k"]
    b: Float[Tensor, " n"]
    C: Float[Tensor, "q n l l"]
    D: Float[Tensor, "q p h w"] | float | None
    b_y: Float[Tensor, " q"]
    Lambda: Float[Tensor, " n"]
    gamma: float | None
    circular: bool
    geometry: ImageGeometry | None = None
    reads_state: bool = False

    def __post_init__(self) -> None:
        if self.D is not None and (number := as_number(self.D)) is not None:
            if not math.isfinite(number):
                raise ValueError(f"D = dI needs a finite number d, got {self.D!r}")
            object.__setattr__(self, "D", number)
        names = ("W", "U", "b", "C", "D", "b_y", "Lambda")
        check_tensors({n: v for n in names if not isinstance(v := getattr(self, n), float)})
        for name in ("W", "U", "C", "D"):
            if isinstance(kernel := getattr(self, name), Tensor):
                check_dimensions(name, kernel, 4)
        n, p, k, _ = self.U.shape
        q, _, readout, _ = self.C.shape
        expected = {
            "U": (n, p, k, k), "b": (n,), "C": (q, n, readout, readout), "b_y": (q,),
            "Lambda": (n,),
        }  # fmt: skip
        if self.W is not None:
            expected["W"] = (n, n, self.W.shape[-1], self.W.shape[-1])
        if isinstance(self.D, Tensor):
            expected["D"] = (q, p, *self.D.shape[2:])
        elif isinstance(self.D, float) and p != q:
            raise ValueError(f"D = dI needs as many outputs as inputs, got {q} and {p}")
        for name, shape in expected.items():
            value = getattr(self, name)
            if tuple(value.shape) != shape:
                raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")
        if self.W is not None and self.W.shape[-1] % 2 == 0:
            raise ValueError(f"the kernel W must have an odd size, got {self.W.shape[-1]}")
        if k != readout and (k % 2 == 0 or readout % 2 == 0):
            raise ValueError(f"kernels U and C of sizes {k} and {readout} must both be odd")
        object.__setattr__(self, "gamma", check_gamma(self.gamma))
        object.__setattr__(self, "circular", bool(self.circular))

    def grid(self, image: tuple[int, int]) -> tuple[int, int]:
        """Return the torus on which images of this height and width are proved.

        Raises:
            ValueError: if a circular image is smaller than a kernel.
        """
        kernels = [t.shape[2:] for t in (self.W, self.U, self.C, self.D) if isinstance(t, Tensor)]
        height, width = (max(k[i] for k in kernels) for i in (0, 1))
        if not self.circular:
            return (image[0] + height - 1, image[1] + width - 1)
        if image[0] < height or image[1] < width:
            raise ValueError(
                f"a circular image of {image[0]} × {image[1]} is smaller than the kernel "
                f"({height} × {width})"
            )
        return image

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name, without a W or D that is None or a number."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {k: v for k, v in values.items() if isinstance(v, Tensor)}

    def dense(self, image: tuple[int, int]) -> DenseWeights:
        """Return the same layer as matrices on flattened images, channels first.

        Args:
            image: height and width.

        Raises:
            ValueError: if the image is smaller than a circular kernel, or the matrices would have
                more than 2²⁸ entries.
        """
        self.grid(image)
        k, a = self.U.shape[-1], self.U.shape[-1] // 2
        hidden = image if self.circular else (image[0] + 2 * a - k + 1, image[1] + 2 * a - k + 1)
        U = self._matrix(self.U, image, a)
        C = self._matrix(self.C, hidden, self.C.shape[-1] - 1 - self.C.shape[-1] // 2)
        D = self.D
        if isinstance(D, Tensor):
            D = self._matrix(D, image, D.shape[-1] // 2)
        elif D is not None:
            D = D * torch.eye(U.shape[1], dtype=U.dtype, device=U.device)
        W = U.new_zeros(len(U), len(U))
        if self.W is not None:
            W = self._matrix(self.W, hidden, self.W.shape[-1] // 2)
        units, rows = hidden[0] * hidden[1], len(C if D is None else D)
        return DenseWeights(
            W=W, U=U, b=self.b.repeat_interleave(units), C=C.reshape(rows, len(U)), D=D,
            b_y=self.b_y.repeat_interleave(rows // max(len(self.b_y), 1)),
            Lambda=self.Lambda.repeat_interleave(units), gamma=self.gamma,
        )  # fmt: skip

    def _matrix(self, kernel: Tensor, size: tuple[int, int], anchor: int) -> Tensor:
        """Return the matrix of a convolution of images of this size."""
        inputs = kernel.shape[1] * size[0] * size[1]
        if kernel.numel() == 0:  # a layer without units
            return kernel.new_zeros(kernel.shape[0], inputs)
        if inputs * kernel.shape[0] * size[0] * size[1] > _LARGEST:
            raise ValueError(f"images of {size[0]} × {size[1]} pixels make too large matrices")
        basis = torch.eye(inputs, dtype=kernel.dtype, device=kernel.device)
        basis = basis.reshape(inputs, kernel.shape[1], *size)
        if self.circular:
            return self._convolve(basis, kernel, anchor).flatten(1).T
        return functional.conv2d(basis, kernel, padding=anchor).flatten(1).T

    def _convolve(
        self, x: Tensor, kernel: Tensor, anchor: int, bias: Tensor | None = None
    ) -> Tensor:
        """Return the convolution of images, of their own size."""
        below, after = (size - 1 - anchor for size in kernel.shape[-2:])
        if not self.circular and anchor == after == below:
            return functional.conv2d(x, kernel, bias, padding=anchor)
        mode = "circular" if self.circular else "constant"
        x = functional.pad(x, (anchor, after, anchor, below), mode=mode)
        return functional.conv2d(x, kernel, bias)

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Channels, height and width of one x."""
        geometry = self.placed
        return (self.U.shape[1] // geometry.stride**2, *geometry.image)

    @property
    def multiplier(self) -> Float[Tensor, " n"]:
        """Λ, one number per channel."""
        return self.Lambda

    @property
    def placed(self) -> ImageGeometry:
        """Where images and states lie.

        Raises:
            ValueError: if the weights are of no image size.
        """
        if self.geometry is None:
            raise ValueError(
                "these weights are of no image size: a layer that is evaluated through them needs "
                "a geometry, dataclasses.replace(weights, geometry=ImageGeometry(...))"
            )
        return self.geometry

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> ConvolutionalWeights:
        """Return the weights with these tensors in place of those of the same names."""
        changes: dict[str, Any] = dict(tensors)
        return replace(self, **changes)

    def operator(self) -> LinearOperator:
        """Return W as an operator on states, cut from the graph."""
        if self.W is None:
            units = math.prod(self.placed.torus)
            return ZeroOperator(self.Lambda.detach().repeat_interleave(units))
        return self.convolution()

    def convolution(self) -> ConvolutionOperator:
        """Return W as a convolution operator; only for weights with a kernel W."""
        assert self.W is not None
        return ConvolutionOperator(self.W.detach(), self.placed.torus, self.Lambda.detach())

    def operator_tensors(self) -> tuple[Tensor, ...]:
        """Return the kernel W, if there is one."""
        return () if self.W is None else (self.W,)

    def drive(self, x: Float[Tensor, "batch c h w"]) -> Float[Tensor, "batch units"]:
        """Return v = U∗x + b, as states."""
        return self.placed.embed(self._drive_images(x, self.U, self.b))

    def _drive_images(self, x: Tensor, U: Tensor, b: Tensor) -> Tensor:
        return self._convolve(self.placed.downsample(x), U, U.shape[-1] // 2, b)

    def readout(
        self, x: Float[Tensor, "batch c h w"], z: Float[Tensor, "batch units"]
    ) -> Float[Tensor, "batch q i j"]:
        """Return y = C∗z + D∗x + b_y."""
        y = self.placed.crop(z)
        if not self.reads_state:
            y = self._read(y, self.C, self.b_y)
        if self.D is None:
            return y
        x = self.placed.downsample(x)
        return y + (self.D * x if isinstance(self.D, float) else self._pass(x, self.D))

    def _read(self, z: Tensor, C: Tensor, b_y: Tensor) -> Tensor:
        return self._convolve(z, C, C.shape[-1] - 1 - C.shape[-1] // 2, b_y)

    def _pass(self, x: Tensor, D: Tensor) -> Tensor:
        return self._convolve(x, D, D.shape[-1] // 2)

    def rounding(
        self, x: Float[Tensor, "batch c h w"], z: Float[Tensor, "batch units"]
    ) -> Rounding:
        """Bound the rounding of `drive` and `readout` in float64."""
        size = self.placed.crop(z).abs()
        y = torch.zeros_like(size[:, : len(self.b_y)])
        if not self.reads_state:
            terms = self.C[0].numel()
            y = gamma_k(terms + 4) * self._read(size, self.C.abs(), self.b_y.abs())
            y = y + underflow(terms, size, self.C, dims=3)
        if self.D is not None:
            inputs = self.placed.downsample(x)
            y = y + 4 * UNIT * self.readout(x, z).abs() + self._through_rounding(inputs, self.D)
        return Rounding(self.drive_rounding(x), norms_up(y.flatten(1), 1))

    def _through_rounding(self, x: Tensor, D: Tensor | float) -> Tensor:
        """Bound the rounding of D∗x."""
        if isinstance(D, float):
            lost = underflow(1, x, x.new_tensor(D), dims=3)
            return 4 * UNIT * abs(D) * x.abs() + lost
        terms = D[0].numel()
        size = self._pass(x.abs(), D.abs())
        return gamma_k(terms + 4) * size + underflow(terms, x, D, dims=3)

    def drive_rounding(self, x: Float[Tensor, "batch c h w"]) -> Float[Tensor, " batch"]:
        """Bound the rounding of `drive` in float64, in the Λ norm."""
        size = self._drive_images(x.abs(), self.U.abs(), self.b.abs())
        terms = self.U[0].numel()
        lost = underflow(terms, x, self.U, dims=3)
        v = (size * gamma_k(terms + 4) + lost) * taps(self.Lambda.sqrt())
        return norms_up(v.flatten(1), 1)

    def drive_rates(self, unit: float) -> Rates:
        """Return how v and its rounding grow with x; the rates of the output are 0."""
        root = self.Lambda.sqrt()
        drive = absolute_norm(root[:, None] * self.U.abs().flatten(2).sum(2))
        rounding = (self.U[0].numel() + 4) * unit * drive
        return Rates(drive=drive, drive_rounding=rounding, readout=0.0)

    def rates(self, unit: float) -> Rates:
        """Return how norms and rounding errors grow if products run with a unit roundoff."""
        root, readout, through = self.Lambda.sqrt(), 0.0, 0.0
        if not self.reads_state:
            size = absolute_norm(self.C.abs().flatten(2).sum(2) / root)
            readout = (self.C[0].numel() + 8) * unit * size
        if isinstance(self.D, float):
            through, readout = 8 * unit * abs(self.D), readout + 4 * unit / float(root.min())
        elif self.D is not None:
            through = (self.D[0].numel() + 8) * unit * absolute_norm(self.D)
            readout = readout + 4 * unit / float(root.min())
        return replace(self.drive_rates(unit), readout=readout, through=through)

    def largest(self) -> float:
        """Return an upper bound of the sum of the largest entries of U, C and D."""
        size = largest_up(self.U) + largest_up(self.C)
        if isinstance(self.D, float):
            return size + abs(self.D)
        return size if self.D is None else size + largest_up(self.D)

    def proved_size(self) -> tuple[tuple[int, int], bool] | None:
        """Return the grid, and whether a proof must match it exactly, as on a torus."""
        return None if self.geometry is None else (self.geometry.grid, self.circular)

    def restrict(self, activation: ProximalActivation) -> ProximalActivation:
        """Return σ that is 0 on the border of the torus."""
        return self.placed.restrict(activation, self.b.device)

    def check_values(self) -> None:
        """Refuse C ≠ I or b_y ≠ 0 where y = z.

        Raises:
            ValueError: saying so.
        """
        if self.reads_state:
            identity = torch.eye(len(self.b)).to(self.C)[:, :, None, None]
            if not torch.equal(self.C, identity) or bool(self.b_y.any()):
                raise ValueError("reads_state says that y = z, but C is not I or b_y is not 0")

    def check_sums(self) -> None:
        """Refuse CPUs whose convolutions may be summed in ways whose rounding is not bounded."""
        if self.U.is_cpu:  # for CUDA `solvers.acceptance` checks this
            refuse_other_sums(self.U)

    def check_input(self, x: Tensor) -> None:
        """Refuse what is no batch of images of the layer's size.

        Raises:
            ValueError: naming both shapes.
        """
        expected = self.sample_shape
        if x.ndim != 4 or tuple(x.shape[1:]) != expected:
            hint = "the layer is built for one image size"
            if tuple(x.shape[-3:]) == expected:
                hint = "merge the leading dimensions, x.flatten(0, -4), and unflatten the result"
                hint = "add a batch dimension, x[None]" if x.ndim == 3 else hint
            raise ValueError(
                f"expected images of shape (batch, {', '.join(map(str, expected))}), "
                f"got {tuple(x.shape)}: {hint}"
            )

    def header(self) -> str:
        """Return γ, a number D and the padding as text."""
        D = self.D if isinstance(self.D, float) else None
        state = "y=z;" if self.reads_state else ""
        return f"gamma={self.gamma!r};D={D!r};circular={self.circular};{state}"

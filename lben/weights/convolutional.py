"""What is a layer of images, once all parameterization is gone?

As `DenseWeights` (lben.weights.dense), with convolutions in place of matrices.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from lben.weights.base import (
    as_number,
    check_dimensions,
    check_gamma,
    check_tensors,
    convert,
    digest,
)
from lben.weights.dense import DenseWeights
from solvers.dependencies import Sendable

_LARGEST = 2**28
"""Entries of a matrix that `dense` writes out."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ConvolutionalWeights(Sendable):
    """Weights of z = σ(W∗z + U∗x + b), y = C∗z + D∗x + b_y with n, p and q channels and stride 1.

    (U∗x)[i, s] = Σ U[i, j, t] x[j, s + t − a], summed over channels j and offsets t; the anchor a
    of a k × k kernel is ⌊k/2⌋ for W, U and D and k − 1 − ⌊k/2⌋ for C, so that C may be the adjoint
    of U. Another padding of the layer only shifts z and changes nothing here.

    Args:
        W: n × n × j × j with odd j; None for an explicit layer (W = 0).
        U: n × p × k × k.
        b: n.
        C: q × n × k × k; of another size where both are odd.
        D: q × p × i × j; a number d for dI; None for no feed-through.
        b_y: q.
        Lambda: one positive multiplier per channel of z.
        gamma: the l2 Lipschitz bound that is claimed, or None for no claim.
        circular: whether the image is a torus; otherwise it is surrounded by zeros.

    Raises:
        ValueError: if something is not a tensor, the shapes do not fit each other, or gamma is not
            positive and finite.
    """

    W: Float[Tensor, "n n j j"] | None = None
    U: Float[Tensor, "n p k k"]
    b: Float[Tensor, " n"]
    C: Float[Tensor, "q n k k"]
    D: Float[Tensor, "q p i j"] | float | None
    b_y: Float[Tensor, " q"]
    Lambda: Float[Tensor, " n"]
    gamma: float | None
    circular: bool

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
        """Return the tensors by name, leaving out W and D that are none."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {k: v for k, v in values.items() if isinstance(v, Tensor)}

    def to(self, dtype: torch.dtype) -> ConvolutionalWeights:
        """Return the weights in another precision, cut from the graph, on the CPU."""
        return self.apply(lambda t: convert(t, dtype))

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
            after = kernel.shape[-1] - 1 - anchor
            basis = functional.pad(basis, (anchor, after, anchor, after), mode="circular")
            return functional.conv2d(basis, kernel).flatten(1).T
        return functional.conv2d(basis, kernel, padding=anchor).flatten(1).T

    def apply(self, transform: Callable[[Tensor], Tensor]) -> ConvolutionalWeights:
        """Return the weights with every tensor transformed."""
        changes: dict[str, Any] = {k: transform(v) for k, v in self.tensors().items()}
        return replace(self, **changes)

    def with_tensors(self, tensors: dict[str, Tensor]) -> ConvolutionalWeights:
        """Return the weights with these tensors in place of those of the same names."""
        changes: dict[str, Any] = dict(tensors)
        return replace(self, **changes)

    @property
    def fingerprint(self) -> str:
        """SHA-256, as that of `DenseWeights`."""
        D = self.D if isinstance(self.D, float) else None
        return digest(f"gamma={self.gamma!r};D={D!r};circular={self.circular};", self.tensors())

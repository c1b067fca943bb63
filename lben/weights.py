"""What is a layer, once all parameterization is gone? The noun that everything agrees on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, kw_only=True, eq=False)
class ExplicitWeights:
    """Weights of z = σ(Wz + Ux + b), y = Cz + Dx + b_y with n units, p inputs and q outputs.

    Args:
        W: n × n.
        U: n × p.
        b: n.
        C: q × n.
        D: q × p, or None for no feed-through.
        b_y: q.
        Lambda: diagonal multiplier Λ as a vector of n positive numbers.
        gamma: the Lipschitz bound that is claimed for x ↦ y in l2, or None for no claim. A claim
            is worth nothing until `certify` has proved it.

    Raises:
        ValueError: if the shapes do not fit each other, or gamma is not positive and finite.
    """

    W: Float[Tensor, "n n"]
    U: Float[Tensor, "n p"]
    b: Float[Tensor, " n"]
    C: Float[Tensor, "q n"]
    D: Float[Tensor, "q p"] | None
    b_y: Float[Tensor, " q"]
    Lambda: Float[Tensor, " n"]
    gamma: float | None

    def __post_init__(self) -> None:
        n, p = self.U.shape
        q = self.C.shape[0]
        expected = {
            "W": (n, n), "b": (n,), "C": (q, n), "b_y": (q,), "Lambda": (n,), "D": (q, p),
        }  # fmt: skip
        for name, shape in expected.items():
            value = getattr(self, name)
            if value is not None and tuple(value.shape) != shape:
                raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")
        check_gamma(self.gamma)

    @property
    def in_features(self) -> int:
        """p."""
        return self.U.shape[1]

    @property
    def hidden_features(self) -> int:
        """n."""
        return self.U.shape[0]

    @property
    def out_features(self) -> int:
        """q."""
        return self.C.shape[0]

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name, leaving out an absent D."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {k: v for k, v in values.items() if isinstance(v, Tensor)}

    def to(self, dtype: torch.dtype) -> ExplicitWeights:
        """Return the weights in another precision, cut from the graph, on the CPU."""
        return self.apply(lambda t: t.detach().to("cpu", dtype))

    def apply(self, transform: Callable[[Tensor], Tensor]) -> ExplicitWeights:
        """Return the weights with every tensor transformed."""
        changes: dict[str, Any] = {k: transform(v) for k, v in self.tensors().items()}
        return replace(self, **changes)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of names, shapes, dtypes, bytes and gamma: ties a certificate to its weights."""
        return _digest(f"gamma={self.gamma!r};", self.tensors())

    @classmethod
    def affine(cls, D: Tensor, b_y: Tensor, gamma: float) -> ExplicitWeights:
        """Return the weights of y = Dx + b_y, a layer without units."""
        q, p = D.shape
        return cls(
            W=D.new_zeros(0, 0), U=D.new_zeros(0, p), b=D.new_zeros(0), C=D.new_zeros(q, 0),
            D=D, b_y=b_y, Lambda=D.new_zeros(0), gamma=gamma,
        )  # fmt: skip


def stack(first: ExplicitWeights, second: ExplicitWeights) -> ExplicitWeights:
    """Return one layer that computes second(first(x)).

    W = [[W₁, 0], [U₂C₁, W₂]], U = [U₁; U₂D₁], C = [D₂C₁, C₂], D = D₂D₁. With
    Λ = [γ₂Λ₁; Λ₂/γ₁] the two inequalities, weighted so that the signal between them cancels, add
    up to M(Λ, γ₁γ₂) ⪰ 0: the product bound needs no new proof, and every other Λ can only help.

    Raises:
        ValueError: if the sizes do not fit, or only one of the two claims a bound.
    """
    a, b = first, second
    if a.out_features != b.in_features:
        raise ValueError(f"{a.out_features} outputs do not fit {b.in_features} inputs")
    if a.gamma is None or b.gamma is None:
        raise ValueError("both layers must claim a bound: the multipliers are weighted by them")
    feed = b.U @ a.C
    D = None if a.D is None or b.D is None else b.D @ a.D
    return ExplicitWeights(
        W=torch.cat([
            torch.cat([a.W, a.W.new_zeros(len(a.W), len(b.W))], dim=1),
            torch.cat([feed, b.W], dim=1),
        ]),
        U=torch.cat([a.U, b.U.new_zeros(len(b.U), a.in_features) if a.D is None else b.U @ a.D]),
        b=torch.cat([a.b, b.b + b.U @ a.b_y]),
        C=torch.cat([a.C.new_zeros(b.out_features, len(a.W)) if b.D is None else b.D @ a.C, b.C],
                    dim=1),
        D=D,
        b_y=b.b_y if b.D is None else b.b_y + b.D @ a.b_y,
        Lambda=torch.cat([b.gamma * a.Lambda, b.Lambda / a.gamma]),
        gamma=a.gamma * b.gamma,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)
class ConvolutionalWeights:
    """Weights of z = σ(U∗x + b), y = C∗z + D∗x + b_y with n, p and q channels and stride 1.

    (U∗x)[i, s] = Σ U[i, j, t] x[j, s + t − a], summed over channels j and offsets t; the anchor a
    is ⌊k/2⌋ for U and D and k − 1 − ⌊k/2⌋ for C, so that C may be the adjoint of U. Another
    padding of the layer only shifts z and changes nothing here.

    Args:
        U: n × p × k × k.
        b: n.
        C: q × n × k × k.
        D: q × p × i × j; a number d for dI; None for no feed-through.
        b_y: q.
        Lambda: one positive multiplier per channel of z.
        gamma: the l2 Lipschitz bound that is claimed.
        circular: whether the image is a torus; otherwise it is surrounded by zeros.

    Raises:
        ValueError: if the shapes do not fit each other, or gamma is not positive and finite.
    """

    U: Float[Tensor, "n p k k"]
    b: Float[Tensor, " n"]
    C: Float[Tensor, "q n k k"]
    D: Float[Tensor, "q p i j"] | float | None
    b_y: Float[Tensor, " q"]
    Lambda: Float[Tensor, " n"]
    gamma: float
    circular: bool

    def __post_init__(self) -> None:
        n, p, k, _ = self.U.shape
        q = self.C.shape[0]
        expected = {"U": (n, p, k, k), "b": (n,), "C": (q, n, k, k), "b_y": (q,), "Lambda": (n,)}
        if isinstance(self.D, Tensor):
            expected["D"] = (q, p, *self.D.shape[2:])
        elif isinstance(self.D, float) and p != q:
            raise ValueError(f"D = dI needs as many outputs as inputs, got {q} and {p}")
        for name, shape in expected.items():
            value = getattr(self, name)
            if tuple(value.shape) != shape:
                raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")
        check_gamma(self.gamma)

    def grid(self, image: tuple[int, int]) -> tuple[int, int]:
        """Return the torus on which images of this height and width are proved.

        Raises:
            ValueError: if a circular image is smaller than the kernel.
        """
        kernels = [t.shape[2:] for t in (self.U, self.D) if isinstance(t, Tensor)]
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
        """Return the tensors by name, leaving out a D that is none."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {k: v for k, v in values.items() if isinstance(v, Tensor)}

    def to(self, dtype: torch.dtype) -> ConvolutionalWeights:
        """Return the weights in another precision, cut from the graph, on the CPU."""
        return self.apply(lambda t: t.detach().to("cpu", dtype))

    def dense(self, image: tuple[int, int]) -> ExplicitWeights:
        """Return the same layer as matrices on flattened images, channels first.

        Args:
            image: height and width.

        Raises:
            ValueError: if the image is smaller than a circular kernel, or the matrices would have
                more than 2²⁸ entries.
        """
        self.grid(image)
        k, a = self.U.shape[-1], self.U.shape[-1] // 2
        hidden = image if self.circular else tuple(s + 2 * a - k + 1 for s in image)

        def matrix(kernel: Tensor, size: tuple[int, ...], anchor: int) -> Tensor:
            inputs = kernel.shape[1] * size[0] * size[1]
            if kernel.numel() == 0:  # a layer without units
                return kernel.new_zeros(kernel.shape[0], inputs)
            if inputs * kernel.shape[0] * size[0] * size[1] > 2**28:
                raise ValueError(
                    f"images of {image[0]} × {image[1]} pixels make too large matrices"
                )
            basis = torch.eye(inputs, dtype=kernel.dtype, device=kernel.device)
            basis = basis.reshape(inputs, kernel.shape[1], *size)
            if self.circular:
                after = kernel.shape[-1] - 1 - anchor
                basis = functional.pad(basis, (anchor, after, anchor, after), mode="circular")
                return functional.conv2d(basis, kernel).flatten(1).T
            return functional.conv2d(basis, kernel, padding=anchor).flatten(1).T

        U, C = matrix(self.U, image, a), matrix(self.C, hidden, k - 1 - a)
        D = self.D
        if isinstance(D, Tensor):
            D = matrix(D, image, D.shape[-1] // 2)
        elif D is not None:
            D = D * torch.eye(U.shape[1], dtype=U.dtype, device=U.device)
        units, rows = hidden[0] * hidden[1], len(C if D is None else D)
        return ExplicitWeights(
            W=U.new_zeros(len(U), len(U)), U=U, b=self.b.repeat_interleave(units),
            C=C.reshape(rows, len(U)), D=D,
            b_y=self.b_y.repeat_interleave(rows // len(self.b_y)),
            Lambda=self.Lambda.repeat_interleave(units), gamma=self.gamma,
        )  # fmt: skip

    def apply(self, transform: Callable[[Tensor], Tensor]) -> ConvolutionalWeights:
        """Return the weights with every tensor transformed."""
        changes: dict[str, Any] = {k: transform(v) for k, v in self.tensors().items()}
        return replace(self, **changes)

    @property
    def fingerprint(self) -> str:
        """SHA-256, as that of `ExplicitWeights`."""
        D = self.D if isinstance(self.D, float) else None
        return _digest(f"gamma={self.gamma!r};D={D!r};circular={self.circular};", self.tensors())


def _digest(header: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(header.encode())
    for name, value in sorted(tensors.items()):
        array = value.detach().cpu().contiguous()
        digest.update(f"{name}:{array.dtype}:{tuple(array.shape)};".encode())
        digest.update(array.numpy().tobytes())
    return digest.hexdigest()


def check_gamma(gamma: float | None) -> None:
    """Raise ValueError unless gamma is None or a positive finite number."""
    if gamma is not None and not 0 < gamma < float("inf"):
        raise ValueError(
            f"gamma must be a positive, finite Lipschitz bound (or None for no bound), got {gamma}"
        )

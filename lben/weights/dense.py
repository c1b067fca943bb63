"""What is a layer, once all parameterization is gone? The noun that everything agrees on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lben.weights.base import check_dimensions, check_gamma, check_tensors, convert, digest
from solvers.dependencies import Sendable


@dataclass(frozen=True, kw_only=True, eq=False)
class DenseWeights(Sendable):
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
            is worth nothing until `certify` has proved it. Any real number, kept as a float.

    Raises:
        ValueError: if something is not a tensor, the shapes do not fit each other, or gamma is not
            positive and finite.
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
        check_tensors({f.name: getattr(self, f.name) for f in fields(self) if f.name != "gamma"})
        for name in ("U", "C"):
            check_dimensions(name, getattr(self, name), 2)
        n, p = self.U.shape
        q = self.C.shape[0]
        expected = {
            "W": (n, n), "b": (n,), "C": (q, n), "b_y": (q,), "Lambda": (n,), "D": (q, p),
        }  # fmt: skip
        for name, shape in expected.items():
            value = getattr(self, name)
            if value is not None and tuple(value.shape) != shape:
                raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")
        object.__setattr__(self, "gamma", check_gamma(self.gamma))

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

    def to(self, dtype: torch.dtype) -> DenseWeights:
        """Return the weights in another precision, cut from the graph, on the CPU."""
        return self.apply(lambda t: convert(t, dtype))

    def apply(self, transform: Callable[[Tensor], Tensor]) -> DenseWeights:
        """Return the weights with every tensor transformed."""
        changes: dict[str, Any] = {k: transform(v) for k, v in self.tensors().items()}
        return replace(self, **changes)

    def with_tensors(self, tensors: dict[str, Tensor]) -> DenseWeights:
        """Return the weights with these tensors in place of those of the same names."""
        changes: dict[str, Any] = dict(tensors)
        return replace(self, **changes)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of names, shapes, dtypes, bits and gamma: ties a certificate to its weights.

        0.0 and −0.0 are two numbers here. Device, memory layout, and whether a gradient is asked
        for are not part of it.
        """
        return digest(f"gamma={self.gamma!r};", self.tensors())

    @property
    def function_fingerprint(self) -> str:
        """As `fingerprint`, of what x ↦ y depends on: without Λ and gamma, which only claim."""
        tensors = self.tensors()
        del tensors["Lambda"]
        return digest("", tensors)

    def divide(self, unit: float) -> DenseWeights:
        """Return the weights of y ÷ unit: undoes `scale`, to rounding."""
        return replace(
            self, C=self.C / unit, D=None if self.D is None else self.D / unit,
            b_y=self.b_y / unit, Lambda=self.Lambda / unit,
            gamma=None if self.gamma is None else self.gamma / unit,
        )  # fmt: skip

    def scale(self, factor: float) -> DenseWeights:
        """Return the weights of factor · y, with the claim and the multiplier to it.

        M(Λ, γ) of both is the same up to this factor.
        """
        if factor == 1:
            return self
        return replace(
            self, C=factor * self.C, D=None if self.D is None else factor * self.D,
            b_y=factor * self.b_y, Lambda=factor * self.Lambda,
            gamma=None if self.gamma is None else factor * self.gamma,
        )  # fmt: skip

    @classmethod
    def affine(cls, D: Tensor, b_y: Tensor, gamma: float) -> DenseWeights:
        """Return the weights of y = Dx + b_y, a layer without units."""
        check_tensors({"D": D, "b_y": b_y})
        check_dimensions("D", D, 2)
        q, p = D.shape
        return cls(
            W=D.new_zeros(0, 0), U=D.new_zeros(0, p), b=D.new_zeros(0), C=D.new_zeros(q, 0),
            D=D, b_y=b_y, Lambda=D.new_zeros(0), gamma=gamma,
        )  # fmt: skip


def stack(first: DenseWeights, second: DenseWeights) -> DenseWeights:
    """Return one layer that computes second(first(x)).

    W = [[W₁, 0], [U₂C₁, W₂]], U = [U₁; U₂D₁], C = [D₂C₁, C₂], D = D₂D₁. With
    Λ = [γ₂Λ₁; Λ₂/γ₁] the two inequalities, weighted so that the signal between them cancels, add
    up to M(Λ, γ₁γ₂) ⪰ 0: the product bound needs no new proof, and every other Λ can only help.

    Raises:
        ValueError: if the sizes, dtypes or devices do not fit, or only one of the two claims a
            bound.
    """
    a, b = first, second
    if a.out_features != b.in_features:
        raise ValueError(f"{a.out_features} outputs do not fit {b.in_features} inputs")
    if a.W.dtype != b.W.dtype or a.W.device != b.W.device:
        raise ValueError(
            f"the layers differ in dtype or device: the dtype must be one, got {a.W.dtype} on "
            f"{a.W.device} and {b.W.dtype} on {b.W.device}; convert one by .to({b.W.dtype}) "
            "(to float64 to keep a bound: rounding to float32 makes other weights)"
        )
    if a.gamma is None or b.gamma is None:
        raise ValueError("both layers must claim a bound: the multipliers are weighted by them")
    feed = b.U @ a.C
    D = None if a.D is None or b.D is None else b.D @ a.D
    return DenseWeights(
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

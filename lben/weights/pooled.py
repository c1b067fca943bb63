"""What is a layer of images whose output is pooled and then multiplied by a matrix?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lben.weights.base import check_dimensions, check_gamma, check_tensors, convert, digest
from lben.weights.convolutional import ConvolutionalWeights
from lben.weights.dense import DenseWeights
from solvers.dependencies import Sendable


@dataclass(frozen=True, kw_only=True, eq=False)
class PooledWeights(Sendable):
    """Weights of z = σ(W∗z + A⟨C, z⟩ + U∗x + b), y = ⟨C, z⟩ + b_y: images in, q numbers out.

    ⟨C, z⟩ are the q inner products of C with z, over all channels and pixels. What the bound of y
    asks of W has rank q, so W as a whole is a convolution plus A⟨C, ·⟩.

    Args:
        state: W, U, b, Λ and the padding; without outputs or a claim of its own.
        A: q × n × height × width, where z is height × width.
        C: q × n × height × width.
        b_y: q.
        gamma: the l2 Lipschitz bound of x ↦ y that is claimed, or None for no claim.

    Raises:
        ValueError: if the shapes do not fit each other, the state has outputs or a claim, or gamma
            is not positive and finite.
    """

    state: ConvolutionalWeights
    A: Float[Tensor, "q n h w"]
    C: Float[Tensor, "q n h w"]
    b_y: Float[Tensor, " q"]
    gamma: float | None

    def __post_init__(self) -> None:
        check_tensors({"A": self.A, "C": self.C, "b_y": self.b_y})
        check_dimensions("C", self.C, 4)
        q, n, *_ = self.C.shape
        if self.C.ndim != 4 or n != len(self.state.b) or self.A.shape != self.C.shape:
            raise ValueError(
                f"A and C must have shape (q, {len(self.state.b)}, height, width), got "
                f"{tuple(self.A.shape)} and {tuple(self.C.shape)}"
            )
        if self.b_y.shape != (q,):
            raise ValueError(f"b_y must have shape {(q,)}, got {tuple(self.b_y.shape)}")
        if len(self.state.C) or self.state.D is not None or self.state.gamma is not None:
            raise ValueError("the state of pooled weights has no outputs and claims no bound")
        if self.state.U.shape[-1] % 2 == 0:
            raise ValueError(f"the kernel U must be odd, got {self.state.U.shape[-1]}")
        object.__setattr__(self, "gamma", check_gamma(self.gamma))

    @property
    def image(self) -> tuple[int, int]:
        """Height and width of the only images that fit."""
        return (self.C.shape[2], self.C.shape[3])

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name."""
        return {**_nonempty(self.state.tensors()), "A": self.A, "C": self.C, "b_y": self.b_y}

    def to(self, dtype: torch.dtype) -> PooledWeights:
        """Return the weights in another precision, cut from the graph, on the CPU."""
        return self.apply(lambda t: convert(t, dtype))

    def apply(self, transform: Callable[[Tensor], Tensor]) -> PooledWeights:
        """Return the weights with every tensor transformed."""
        return replace(
            self, state=self.state.apply(transform), A=transform(self.A), C=transform(self.C),
            b_y=transform(self.b_y),
        )  # fmt: skip

    def with_tensors(self, tensors: dict[str, Tensor]) -> PooledWeights:
        """Return the weights with these tensors in place of those of the same names."""
        own: dict[str, Any] = {n: tensors[n] for n in ("A", "C", "b_y") if n in tensors}
        rest = {name: t for name, t in tensors.items() if name not in own}
        return replace(self, state=self.state.with_tensors(rest), **own)

    def dense(self) -> DenseWeights:
        """Return the same layer as matrices, as `ConvolutionalWeights.dense`."""
        whole, C = self.state.dense(self.image), self.C.flatten(1)
        return replace(
            whole, W=whole.W + self.A.flatten(1).T @ C, C=C, b_y=self.b_y, gamma=self.gamma
        )

    @property
    def fingerprint(self) -> str:
        """SHA-256, as that of `DenseWeights`."""
        return digest(f"gamma={self.gamma!r};circular={self.state.circular};", self.tensors())


def _nonempty(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t for name, t in tensors.items() if t.numel()}

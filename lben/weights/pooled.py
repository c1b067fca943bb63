"""What are the weights of a layer of images whose output is pooled and multiplied by a matrix?

Symbols: docs/glossary.md; ⟨C, z⟩ is defined at the class.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from lben.rigorous import gamma_k
from lben.weights.base import (
    Rates,
    Rounding,
    Weights,
    check_dimensions,
    check_gamma,
    check_tensors,
)
from lben.weights.convolutional import ConvolutionalWeights
from lben.weights.dense import DenseWeights
from lben.weights.growth import absolute_norm, largest_up, norms_up, underflow
from lben.weights.linear_maps import taps
from solvers import LinearOperator, LowRankUpdate, ProximalActivation


@dataclass(frozen=True, kw_only=True, eq=False)
class PooledWeights(Weights):
    """Weights of z = σ(W∗z + A⟨C, z⟩ + U∗x + b), y = ⟨C, z⟩ + b_y: images in, q numbers out.

    ⟨C, z⟩ are the q inner products of C with z, over all channels and pixels. The bound
    of y requires of W only a term of rank q. So W as a whole is a convolution plus A⟨C, ·⟩.

    Args:
        state: W, U, b, Λ and the padding, as weights without outputs and without a claim.
        A: q × n × height × width, where z is height × width.
        C: q × n × height × width.
        b_y: q.
        gamma: the l2 Lipschitz bound of x ↦ y that is claimed, or None for no claim.

    Raises:
        ValueError: if the shapes do not fit each other, the state has outputs or a claim, or gamma
            is not positive and finite.

    Example:
        >>> from lben import PooledEquilibriumConv2d
        >>> weights = PooledEquilibriumConv2d(3, 4, 10, image=(8, 8)).weights()
        >>> weights.C.shape, weights.dense().W.shape
        (torch.Size([10, 4, 8, 8]), torch.Size([256, 256]))
    """

    entry: ClassVar[str] = "entry"

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
        """Height and width of the images that these weights are for."""
        return (self.C.shape[2], self.C.shape[3])

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Channels, height and width of one x."""
        return self.state.sample_shape

    @property
    def multiplier(self) -> Float[Tensor, " n"]:
        """Λ, one number per channel."""
        return self.state.Lambda

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name."""
        return {**_drop_empty(self.state.tensors()), "A": self.A, "C": self.C, "b_y": self.b_y}

    def apply(self, transform: Callable[[Tensor], Tensor]) -> PooledWeights:
        """Return the weights with every tensor transformed, also the empty ones of the state."""
        return replace(
            self, state=self.state.apply(transform), A=transform(self.A), C=transform(self.C),
            b_y=transform(self.b_y),
        )  # fmt: skip

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> PooledWeights:
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

    def operator(self) -> LinearOperator:
        """Return W∗ + A⟨C, ·⟩ as an operator on states, cut from the graph."""
        A, C = (t.detach() for t in self._factors())
        return LowRankUpdate(self.state.convolution(), A, C)

    def operator_tensors(self) -> tuple[Tensor, ...]:
        """Return the kernel W, A and C."""
        return (*self.state.operator_tensors(), *self._factors())

    def _factors(self) -> tuple[Tensor, Tensor]:
        """Return A and C as units × q, on the torus."""
        embed = self.state.placed.embed
        return embed(self.A).T, embed(self.C).T

    def drive(self, x: Float[Tensor, "batch c h w"]) -> Float[Tensor, "batch units"]:
        """Return v = U∗x + b, as states."""
        return self.state.drive(x)

    def readout(
        self, x: Float[Tensor, "batch c h w"], z: Float[Tensor, "batch units"]
    ) -> Float[Tensor, "batch q"]:
        """Return y = ⟨C, z⟩ + b_y."""
        state = self.state.placed.crop(z).flatten(1)
        return functional.linear(state, self.C.flatten(1), self.b_y)

    def rounding(
        self, x: Float[Tensor, "batch c h w"], z: Float[Tensor, "batch units"]
    ) -> Rounding:
        """Bound the rounding of `drive` and `readout` in float64."""
        C, state = self.C.flatten(1), self.state.placed.crop(z).flatten(1)
        size = state.abs() @ C.abs().T + self.b_y.abs()
        y = gamma_k(C.shape[1] + 4) * size + underflow(C.shape[1], state, C)
        return Rounding(self.state.drive_rounding(x), norms_up(y, 1))

    def rates(self, unit: float) -> Rates:
        """Return how norms and rounding errors grow if products run with a unit roundoff."""
        C = (self.C / taps(self.state.Lambda.sqrt())).flatten(1)
        readout = (C.shape[1] + 8) * unit * absolute_norm(C)
        return replace(self.state.drive_rates(unit), readout=readout)

    def largest(self) -> float:
        """Return an upper bound of the sum of the largest entries of U and C."""
        return largest_up(self.state.U) + largest_up(self.C)

    def proved_size(self) -> tuple[tuple[int, int], bool] | None:
        """Return the image size of a proof, as `ConvolutionalWeights.proved_size`."""
        return self.state.proved_size()

    def restrict(self, activation: ProximalActivation) -> ProximalActivation:
        """Return σ that is 0 on the border of the torus."""
        return self.state.restrict(activation)

    def check_sums(self) -> None:
        """Refuse CPUs whose rounding is not bounded, as `ConvolutionalWeights.check_sums`."""
        self.state.check_sums()

    def check_input(self, x: Tensor) -> None:
        """Refuse images of another size, as `ConvolutionalWeights.check_input`."""
        self.state.check_input(x)

    def header(self) -> str:
        """Return γ and the padding as text."""
        return f"gamma={self.gamma!r};circular={self.state.circular};"


def _drop_empty(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t for name, t in tensors.items() if t.numel()}

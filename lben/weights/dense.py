"""What are the weights of a layer of vectors? Matrices.

Symbols: docs/glossary.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
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
    digest,
)
from lben.weights.growth import absolute_norm, largest_up, norms_up, not_nan, underflow
from solvers import DenseOperator


@dataclass(frozen=True, kw_only=True, eq=False)
class DenseWeights(Weights):
    """Weights of z = σ(Wz + Ux + b), y = Cz + Dx + b_y with n units, p inputs and q outputs.

    Args:
        W: n × n.
        U: n × p.
        b: n.
        C: q × n.
        D: q × p, or None for no feed-through.
        b_y: q.
        Lambda: diagonal multiplier Λ as a vector of n positive numbers.
        gamma: the Lipschitz bound that is claimed for x ↦ y in l2, or None for no claim. Any real
            number is kept as a float. The claim is not believed until `certify` has proved it.

    Raises:
        ValueError: if something is not a tensor, the shapes do not fit each other, or gamma is not
            positive and finite.

    Example:
        >>> import torch
        >>> from lben import DenseWeights, certify
        >>> one = torch.ones(1, 1)
        >>> weights = DenseWeights(
        ...     W=-one, U=one, b=one[0], C=one, D=None, b_y=0 * one[0], Lambda=one[0], gamma=1.0
        ... )  # z = σ(−z + x + 1), y = z
        >>> certify(weights).bound
        1.0
    """

    entry: ClassVar[str] = "feature"

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

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """(p,)."""
        return (self.in_features,)

    @property
    def multiplier(self) -> Float[Tensor, " n"]:
        """Λ."""
        return self.Lambda

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name, leaving out an absent D."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {k: v for k, v in values.items() if isinstance(v, Tensor)}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> DenseWeights:
        """Return the weights with these tensors in place of those of the same names."""
        changes: dict[str, Any] = dict(tensors)
        return replace(self, **changes)

    def operator(self) -> DenseOperator:
        """Return W as an operator on states, cut from the graph."""
        return DenseOperator(self.W.detach(), self.Lambda.detach())

    def operator_tensors(self) -> tuple[Tensor, ...]:
        """Return W."""
        return (self.W,)

    def drive(self, x: Float[Tensor, "*batch p"]) -> Float[Tensor, "*batch n"]:
        """Return v = Ux + b."""
        return functional.linear(x, self.U, self.b)

    def readout(
        self, x: Float[Tensor, "*batch p"], z: Float[Tensor, "*batch n"]
    ) -> Float[Tensor, "*batch q"]:
        """Return y = Cz + Dx + b_y."""
        y = functional.linear(z, self.C, self.b_y)
        return y if self.D is None else y + x @ self.D.T

    def rounding(self, x: Float[Tensor, "*batch p"], z: Float[Tensor, "*batch n"]) -> Rounding:
        """Bound the rounding of `drive` and `readout` in float64."""
        size = x.abs()
        u_n, u_p = gamma_k(self.hidden_features + 4), gamma_k(self.in_features + 4)
        # If an accumulator starts with the bias, the sum has one more term.
        v = u_p * self._drive_magnitude(size) + underflow(self.in_features, x, self.U)
        y = u_n * (z.abs() @ self.C.abs().T + self.b_y.abs())
        y = y + underflow(self.hidden_features, z, self.C)
        if self.D is not None:
            y = y + u_p * (size @ self.D.abs().T) + underflow(self.in_features, x, self.D)
        return Rounding(norms_up(v * self.Lambda.sqrt(), 1), norms_up(y, 1))

    def _drive_magnitude(self, size: Tensor) -> Tensor:
        """Return |U||x| + |b|."""
        return size @ self.U.abs().T + self.b.abs()

    def rates(self, unit: float) -> Rates:
        """Return how norms and rounding errors grow if products run with a unit roundoff."""
        root = self.Lambda.sqrt()
        drive, inputs = absolute_norm(root[:, None] * self.U), (self.in_features + 4) * unit
        return Rates(
            drive=drive,
            drive_rounding=inputs * drive,
            readout=(self.hidden_features + 8) * unit * absolute_norm(self.C / root),
            through=0.0 if self.D is None else (inputs + 4 * unit) * absolute_norm(self.D),
        )

    def largest(self) -> float:
        """Return an upper bound of the sum of the largest entries of U, C and D."""
        return sum(largest_up(t) for t in (self.U, self.C, self.D) if t is not None)

    def preactivation_error(
        self,
        x: Float[Tensor, "*batch p"],
        z: Float[Tensor, "*batch n"],
        state_error: Float[Tensor, "*batch"],
    ) -> Float[Tensor, "*batch n"]:
        """Bound the distance of Wz + Ux + b, evaluated in float64, to its value at the equilibrium.

        Args:
            x: float64.
            z: a state, float64.
            state_error: bound of its distance to the equilibrium, in the Λ norm.

        Returns:
            One bound per unit; infinite where nothing is known.
        """
        moved = torch.linalg.vector_norm(self.W / self.Lambda.sqrt(), dim=1)
        unit = gamma_k(self.hidden_features + self.in_features + 8)
        size = z.abs() @ self.W.abs().T + self._drive_magnitude(x.abs())
        lost = underflow(self.hidden_features, z, self.W)
        lost = lost + underflow(self.in_features, x, self.U)
        return not_nan((state_error[..., None] * moved + 2 * unit * size + lost) * (1 + 1e-9))

    def check_input(self, x: Tensor) -> None:
        """Refuse inputs whose last dimension has another size than p.

        Raises:
            ValueError: naming both sizes.
        """
        if x.ndim < 1 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"expected {self.in_features} features in the last dimension of x, "
                f"got shape {tuple(x.shape)}"
            )

    def header(self) -> str:
        """Return γ as text."""
        return f"gamma={self.gamma!r};"

    @property
    def function_fingerprint(self) -> str:
        """SHA-256 of the tensors that x ↦ y depends on: all but Λ; gamma is left out too."""
        tensors = self.tensors()
        del tensors["Lambda"]
        return digest("", tensors)

    def divide(self, unit: float) -> DenseWeights:
        """Return the weights of y ÷ unit: the inverse of `scale`, up to rounding."""
        return replace(
            self, C=self.C / unit, D=None if self.D is None else self.D / unit,
            b_y=self.b_y / unit, Lambda=self.Lambda / unit,
            gamma=None if self.gamma is None else self.gamma / unit,
        )  # fmt: skip

    def scale(self, factor: float) -> DenseWeights:
        """Return the weights of factor · y, with γ and Λ multiplied by the factor as well.

        This multiplies M(Λ, γ) by the factor.
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

    W = [[W₁, 0], [U₂C₁, W₂]], U = [U₁; U₂D₁], C = [D₂C₁, C₂], D = D₂D₁, with 1 for the first layer
    and 2 for the second. Let Λ = [γ₂Λ₁; Λ₂/γ₁]. With these weights the terms of the signal between
    the layers cancel in the sum of the two inequalities, so that the sum is M(Λ, γ₁γ₂) ⪰ 0.
    Therefore the product bound needs no new proof, and a search over Λ can only lower it.

    Args:
        first: the layer that is applied to x.
        second: the layer that is applied to the output of the first.

    Returns:
        The weights of the composition, with γ = γ₁γ₂ and this Λ.

    Raises:
        ValueError: if the sizes, dtypes or devices do not fit, or only one of the two claims a
            bound.

    Example:
        >>> from lben import SLLLinear, certify, stack
        >>> both = stack(SLLLinear(4, 6).weights(), SLLLinear(4, 5).weights())
        >>> both.hidden_features, round(certify(both).bound, 4)
        (11, 1.0)
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

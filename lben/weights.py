"""What is a layer, once all parameterization is gone? The noun that everything agrees on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


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
        digest = hashlib.sha256(f"gamma={self.gamma!r};".encode())
        for name, value in sorted(self.tensors().items()):
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

"""How are raw pixels normalised, and what does that cost in Lipschitz constant?"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lben.certified import Affine, Certified
from lben.rigorous import up


class Normalize(nn.Module):
    """x ↦ (x − mean) / std per channel, as part of the model and of its bound.

    Args:
        mean: one number per channel.
        std: one positive number per channel.

    Raises:
        ValueError: if lengths differ or a std is not positive.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or not all(0 < s < math.inf for s in std):
            raise ValueError(f"need one mean and one positive std per channel, got {mean}, {std}")
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)

    @property
    def gain(self) -> float:
        """Lipschitz constant in l2: 1 / smallest std, rounded upwards."""
        return up(1 / float(self.std.min()))

    def forward(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        """Return the normalised images."""
        return (x - self.mean) / self.std

    def rounding(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, " batch"]:
        """Bound ‖fl(forward(x)) − forward(x)‖₂ per image: two roundings of at most u each."""
        unit = torch.finfo(x.dtype).eps / 2
        return 4 * unit * torch.linalg.vector_norm(self(x).flatten(1), dim=1)

    def certified(self, x: Tensor, y: Tensor) -> Certified:
        """Return what is known of y, the normalised images of x.

        |fl(y) − y| ≤ 4u|y| entry by entry, and ‖y(x')‖ ≤ ‖y(x)‖ + ‖x' − x‖ / min std.
        """
        unit = 4 * torch.finfo(x.dtype).eps
        size = torch.linalg.vector_norm(y.double().flatten(1), dim=1) * (1 + 2.0**-40)
        tiny = 4 * x[0].numel() * torch.finfo(x.dtype).tiny * (1 + self.gain) if len(x) else 0.0
        around = Affine(unit * size + tiny, unit * self.gain)
        return Certified(value=y, error=around.constant, uniform=around)

    def room(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch 2 channels height width"]:
        """Bound how far each input can fall and rise, once normalised, by images in [0, 1]."""
        exact = x.double()
        room = torch.stack([exact, 1 - exact], dim=1).clamp_min(0) / self.std.double()
        return room * (1 + 2.0**-50)

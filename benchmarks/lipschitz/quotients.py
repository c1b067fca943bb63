"""How large a Lipschitz quotient of a network can be found?"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lben.evaluation.attacks import ascend_quotient
from lben.interop import ConvertedNetwork
from lben.rigorous import Array
from lben.weights.network import Network

_STARTS, _STEPS = 128, 300
_SIZES = (-1.0, 1.0)
"""log₁₀ of the smallest and largest root mean square of the inputs where ascent starts."""


class _Rows(nn.Module):
    """x ↦ Fy."""

    def __init__(self, model: nn.Module, rows: Array) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("rows", torch.from_numpy(rows))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.model(x)
        return y @ self.get_buffer("rows").T


def find_quotient(network: Network, rows: Array | None) -> float:
    """Return the largest ‖F(y(a) − y(b))‖₂ ÷ ‖a − b‖₂ found, in float64, from seeded starts."""
    model: nn.Module = ConvertedNetwork(network)
    model = model if rows is None else _Rows(model, rows)
    generator = torch.Generator().manual_seed(0)
    shape = (_STARTS, *network.input_shape)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    x *= torch.logspace(*_SIZES, _STARTS, dtype=torch.float64).view(-1, *[1] * (x.ndim - 1))
    side = math.sqrt(math.prod(network.input_shape))
    found = ascend_quotient(
        model, x, steps=_STEPS, lr=0.03, distance=1e-3 * side, generator=generator
    )
    return float(found.quotient.max())

"""Models that several tests attack."""

import torch
from torch import nn

from lben import EquilibriumClassifierConfig

CONFIG = EquilibriumClassifierConfig(
    shape=(1, 4, 4), classes=3, mean=(0.5,), std=(0.5,), hidden=12, gamma=1.0, tol=1e-6
)


class Linear(nn.Module):
    """Two classes whose boundary is known in closed form."""

    def __init__(self):
        super().__init__()
        self.direction = nn.Parameter(torch.randn(16, dtype=torch.float64))
        self.offset = 0.5 * float(self.direction.detach().sum())

    def forward(self, x):
        score = x.flatten(1) @ self.direction - self.offset
        return torch.stack([score, -score], 1)

    def distance(self, x):
        with torch.no_grad():
            return (self(x)[:, 0] / self.direction.norm()).abs()

"""Which ordinary networks are trained here? Plain torch.nn, with Adam, in a minute."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from lben.data import Dataset, pixels

SHAPE = (1, 28, 28)
_BATCH, _RATE = 128, 1e-3


def build_wide() -> nn.Sequential:
    """Return 784–256–10."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10))


def build_dense() -> nn.Sequential:
    """Return 784–128–128–10."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(),
        nn.Linear(128, 10),
    )  # fmt: skip


def build_convolutional() -> nn.Sequential:
    """Return two convolutions of stride 2 with 8 and 16 channels, and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 4, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(8, 16, 4, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(16 * 7 * 7, 10),
    )  # fmt: skip


def train(model: nn.Sequential, data: Dataset, *, epochs: int, seed: int) -> nn.Sequential:
    """Return the model after some epochs of Adam on raw pixels, in evaluation mode.

    The weights are those of construction, so seed torch before.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=_RATE)
    for _ in range(epochs):
        order = torch.randperm(len(data.train_labels), generator=generator)
        for batch in order.split(_BATCH):
            optimizer.zero_grad()
            logits = model(pixels(data.train_images[batch], torch.float32))
            functional.cross_entropy(logits, data.train_labels[batch]).backward()
            optimizer.step()
    return model.eval()


def accuracy(model: nn.Module, x: Tensor, labels: Tensor) -> float:
    """Return the share of images that are classified as their label."""
    with torch.no_grad():
        return float((model(x).argmax(1) == labels).double().mean())

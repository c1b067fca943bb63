"""What do all attacks share?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

Images = Float[Tensor, "batch channels height width"]


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Switch off parameter gradients, so that layers reuse their factors while inputs move."""
    required = [p.requires_grad for p in model.parameters()]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in zip(model.parameters(), required, strict=True):
            parameter.requires_grad_(flag)


def norms(x: Tensor) -> Tensor:
    """Return l2 norms of images, shaped to divide them; a zero image is left as it is."""
    norms = torch.linalg.vector_norm(x.flatten(1), dim=1)[:, None, None, None]
    return torch.where(norms > 0, norms, torch.ones_like(norms))

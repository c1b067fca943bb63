"""Is x a tensor, and where does a number that is not finite come from: x or the layer?"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from solvers.operators.base import check_tensors


def tensor(x: object) -> Tensor:
    """Return x, or raise a TypeError that says how to make a tensor of it."""
    if not isinstance(x, Tensor):
        check_tensors(x=x)
    assert isinstance(x, Tensor)
    return x


def non_finite(layer: nn.Module, x: Tensor, dimensions: int, entry: str) -> ValueError:
    """Return the error for a drive Ux + b that is not finite; it names the tensor to blame.

    Args:
        layer: with the parameters that U and b come from.
        x: the input.
        dimensions: how many of its last dimensions are one sample.
        entry: what a number of a sample is called.
    """
    bad = (~torch.isfinite(x.detach())).flatten(-dimensions)
    bad = bad.reshape(-1, bad.shape[-1])
    if bool(bad.any()):
        sample, index = (int(i) for i in bad.nonzero()[0])
        return ValueError(
            f"x contains NaN or Inf in {int(bad.any(1).sum())} of {len(bad)} samples "
            f"(first at sample {sample}, {entry} {index})"
        )
    for name, parameter in layer.named_parameters():
        if not bool(torch.isfinite(parameter.detach()).all()):
            return ValueError(f"parameter {name} contains NaN or Inf: training diverged?")
    return ValueError(f"Ux + b overflows {x.dtype}: scale the input or use float64")

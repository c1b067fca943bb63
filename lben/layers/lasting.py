"""Which tensors of a layer outlive the inference mode that it was built, moved or loaded in?

All parameters and buffers do. A tensor made in inference mode can never take part in a gradient. So
a model that was built for validation in that mode could not be attacked afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn


class Lasting(nn.Module):
    """A module whose parameters and buffers are ordinary tensors, wherever they come from."""

    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_post_hook(_make_loaded_lasting)  # type: ignore[no-untyped-call]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        with torch.inference_mode(False):
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


def _make_loaded_lasting(module: nn.Module, _: object) -> None:
    make_lasting(module)


def make_lasting(module: nn.Module) -> None:
    """Put ordinary tensors in the place of those that were made in inference mode."""
    with torch.inference_mode(False):
        for part in module.modules():
            for name, p in part._parameters.items():
                if p is not None and p.is_inference():
                    part._parameters[name] = nn.Parameter(p.detach().clone(), p.requires_grad)
            for name, b in part._buffers.items():
                if b is not None and b.is_inference():
                    part._buffers[name] = b.clone()

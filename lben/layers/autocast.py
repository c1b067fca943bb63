"""How does a layer leave autocast in both directions?

A backward pass that begins under autocast computes its products in the dtype of autocast. It does
so even for operations whose forward pass ran outside of autocast. Therefore the layer keeps a graph
of its own, and differentiates that graph in full precision.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from lben.layers.cache import twin
from solvers.precision import in_autocast, leave_autocast


def leave_half(x: Tensor, own: torch.dtype) -> Tensor:
    """Return x in the dtype of the layer if autocast has shortened x, else x as it is.

    Args:
        x: the input.
        own: dtype of the layer.
    """
    half = x.dtype in (torch.float16, torch.bfloat16)
    return x.to(own) if half and in_autocast(x.device.type) else x


def outside_autocast(layer: nn.Module, x: Tensor) -> Tensor:
    """Return the layer's output, computed and differentiated in the precision of its parameters.

    Args:
        layer: any module.
        x: its input.
    """
    return _Outside.apply(layer, x, *layer.parameters())  # type: ignore[no-untyped-call]


class _Context(FunctionCtx):
    layer: nn.Module
    leaves: list[Tensor]
    y: Tensor
    saved_tensors: tuple[Tensor, ...]


class _Outside(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, layer: nn.Module, *tensors: Tensor) -> Tensor:
        ctx.layer, ctx.leaves = layer, [t.detach().requires_grad_(t.requires_grad) for t in tensors]
        ctx.save_for_backward(*tensors)
        with torch.enable_grad():
            ctx.y = _output(layer, ctx.leaves)
        return ctx.y.detach()

    @staticmethod
    def backward(ctx: _Context, g: Tensor) -> tuple[Tensor | None, ...]:
        again = torch.is_grad_enabled()  # create_graph: from the tensors themselves
        tensors = ctx.saved_tensors if again else ctx.leaves
        wanted = [t for t in tensors if t.requires_grad]
        with leave_autocast(g.device.type):
            y = _output(ctx.layer, tensors) if again else ctx.y
            found = iter(
                torch.autograd.grad(
                    y, wanted, g, retain_graph=True, create_graph=again, allow_unused=True
                )
            )
        return None, *(next(found) if t.requires_grad else None for t in tensors)


def _output(layer: nn.Module, tensors: Sequence[Tensor]) -> Tensor:
    x, *parameters = tensors
    names = (name for name, _ in layer.named_parameters())
    with leave_autocast(x.device.type):
        return twin(layer, dict(zip(names, parameters, strict=True)))(x)

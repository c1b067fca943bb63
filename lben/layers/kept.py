"""When may what a layer computed from its parameters be used again?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.optim.optimizer import register_optimizer_step_post_hook

from lben.parameterizations import ExplicitParameterization

_SAMPLE = 200
_steps = 0


def _count(*_: Any) -> None:
    global _steps
    _steps += 1


register_optimizer_step_post_hook(_count)


def nothing_may_be_kept() -> bool:
    """Say whether values belong to a trace or a transform, which would escape with them."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        or torch._C._are_functorch_transforms_active()
    )


class Kept:
    """What runs for one set of parameter values, with the graph back to copies of them if asked.

    Note [When a parameter has changed]
    Parameters and buffers are watched by version counter and address, and every step of an
    optimizer counts, since fused ones raise no version. Writes through `.data` are seen on a CPU:
    all of them while gradients are tracked, in eval mode those that reach one of two hundred
    random entries of a parameter (comparing all of them would cost as much as the product). What
    was missed cannot break a bound: the layer runs on its own copy of the weights, with their T.
    `weights` and `certificate` never use what is kept.
    """

    def __init__(
        self, parameterization: ExplicitParameterization, run: torch.dtype, track: bool
    ) -> None:
        self.run, self.track, self.state = run, track, _state(parameterization)
        self.fingerprint: str | None = None
        # What is kept must outlive an inference mode that it is computed in, and is not part of
        # what a checkpointed block saves. Saved results are detached: a node that held its own
        # result would never be freed.
        with (
            torch.inference_mode(False),
            torch.set_grad_enabled(track),
            torch.autograd.graph.saved_tensors_hooks(Tensor.detach, _same),
        ):
            self.leaves = {
                name: p.detach().clone().requires_grad_(track and p.requires_grad)
                for name, p in parameterization.named_parameters()
            }
            self.outputs = tuple(functional_call(parameterization, self.leaves, (run,)))
        self.values = tuple(t.detach() for t in self.outputs)
        own = torch.Generator().manual_seed(0)  # draws must not move the user's
        self.index = {
            name: torch.randint(leaf.numel(), (min(leaf.numel(), _SAMPLE),), generator=own)
            for name, leaf in self.leaves.items()
            if leaf.is_cpu and not track
        }

    def fits(
        self, parameterization: ExplicitParameterization, run: torch.dtype, track: bool
    ) -> bool:
        """Say whether these values are those of the parameters as they are now."""
        if self.run != run or (track and not self.track):
            return False
        if self.state != _state(parameterization):
            return False
        for name, p in parameterization.named_parameters():
            leaf = self.leaves[name].detach()
            if name in self.index:
                index = self.index[name]
                same = torch.equal(p.detach().reshape(-1)[index], leaf.reshape(-1)[index])
            else:
                same = not leaf.is_cpu or torch.equal(p.detach(), leaf)
            if not same:
                return False
        return True

    def attach(self, parameterization: ExplicitParameterization) -> tuple[Tensor, ...]:
        """Return the values as functions of the parameters."""
        return _Attach.apply(  # type: ignore[no-untyped-call]
            self, *parameterization.parameters()
        )


class _Attach(torch.autograd.Function):
    """Values computed before, with the gradient of the graph that computed them."""

    @staticmethod
    def forward(ctx: Any, kept: Kept, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.kept = kept
        return tuple(v.view_as(v) for v in kept.values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        kept = ctx.kept
        outputs, received = zip(
            *((o, g) for o, g in zip(kept.outputs, gradients, strict=True) if o.requires_grad),
            strict=True,
        )
        wanted = [leaf for leaf in kept.leaves.values() if leaf.requires_grad]
        found = iter(torch.autograd.grad(outputs, wanted, received, retain_graph=True))
        return None, *(next(found) if t.requires_grad else None for t in kept.leaves.values())


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _state(parameterization: torch.nn.Module) -> tuple[Any, ...]:
    tensors = (*parameterization.parameters(), *parameterization.buffers())
    return (_steps, *(
        (0 if t.is_inference() else t._version, t.data_ptr(), t.dtype, t.requires_grad)
        for t in tensors
    ))  # fmt: skip

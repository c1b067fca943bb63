"""What do all attacks share? A private view of the model, gradients of images alone, shapes."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

Samples = Float[Tensor, "batch *sample"]
"""Images, or vectors, or whatever the model takes."""
Images = Samples

P = ParamSpec("P")
R = TypeVar("R")


def differentiating(attack: Callable[P, R]) -> Callable[P, R]:
    """Run an attack with gradients, whatever mode it is called in.

    Note [What an attack needs of autograd]
    An attack needs gradients of images. But the caller may be in no_grad or in inference mode, and
    images and parameters may be inference tensors, which no graph can hold. So the decorator leaves
    both modes during the attack, in the caller's thread only, and `own` and `view` make ordinary
    tensors. Other threads may use the parameters at the same time, so they are not changed.
    """

    @wraps(attack)
    def run(*arguments: P.args, **options: P.kwargs) -> R:
        with torch.inference_mode(False), torch.enable_grad():
            return attack(*arguments, **options)

    return run


def own(x: Tensor) -> Tensor:
    """Return images for an attack to start from: an ordinary tensor without a graph.

    Raises:
        ValueError: if they are no images of floating point, or not finite.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(
            f"images must be a Tensor of floating point, got {kind}: scale bytes to [0, 1] with "
            "lben.data.pixels, make a Tensor of an array with torch.from_numpy"
        )
    if x.ndim < 2:
        raise ValueError(f"images must be (batch, …), got {tuple(x.shape)}")
    if not bool(torch.isfinite(x).all()):
        raise ValueError("images contain NaN or Inf")
    return as_ordinary(x)


def as_ordinary(t: Tensor) -> Tensor:
    """Return the values of a tensor without a graph, in one that can be part of a graph."""
    return t.detach().clone() if t.is_inference() else t.detach()


def view(model: nn.Module) -> nn.Module:
    """Return the model as an attack sees it: evaluation mode, no gradients of parameters.

    Its parameters are those of the model, seen through other tensors that require no gradient, so
    that layers may keep their factors while images move. The model itself is not touched: neither
    its modes nor its parameters' `requires_grad`, which other threads may rely on.
    """
    if not isinstance(model, nn.Module):
        return model  # any function of images
    tensors = [*model.parameters(), *model.buffers()]
    if not any(
        (
            any(t.requires_grad or t.is_inference() for t in tensors),
            any(module.training for module in model.modules()),
        )
    ):
        return model
    seen: dict[int, object] = {}
    for p in model.parameters():
        seen[id(p)] = nn.Parameter(as_ordinary(p), requires_grad=False)
    for b in model.buffers():
        seen[id(b)] = b.detach().clone()
    for module in model.modules():  # results with a graph, which modules keep beside parameters
        for value in list(vars(module).values()):
            if isinstance(value, Tensor) and not value.is_leaf:
                seen[id(value)] = value.detach()
    try:
        return copy.deepcopy(model, seen).eval()
    except (RuntimeError, TypeError) as error:  # it holds a lock, a file, a foreign object
        if any(m.training for m in model.modules()):
            raise ValueError(
                f"this model is in training mode and cannot be copied ({error}): call model.eval()"
            ) from error
        return model  # its parameters' graph is built and thrown away: slower, otherwise the same


_lock = threading.Lock()
_held: dict[int, tuple[nn.Parameter, int, bool]] = {}


@contextmanager
def freeze(model: nn.Module) -> Iterator[None]:
    """Switch off parameter gradients, so that layers reuse their factors while inputs move.

    Blocks may overlap, also in several threads: a parameter is as it was once the last has ended.

    Args:
        model: whose parameters get no gradient within the block.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> with freeze(model):
        ...     print(model.weight.requires_grad)
        False
        >>> model.weight.requires_grad
        True
    """
    parameters = list(model.parameters())
    with _lock:
        for p in parameters:
            _, count, required = _held.get(id(p), (p, 0, p.requires_grad))
            _held[id(p)] = (p, count + 1, required)
            p.requires_grad_(False)
    try:
        yield
    finally:
        with _lock:
            for p in parameters:
                _, count, required = _held[id(p)]
                if count > 1:
                    _held[id(p)] = (p, count - 1, required)
                else:
                    del _held[id(p)]
                    p.requires_grad_(required)


def gaussian(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return normal noise of the shape of x, drawn where the generator is."""
    device = "cpu" if generator is None else generator.device
    return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=device).to(x.device)


def norms(x: Tensor) -> Tensor:
    """Return l2 norms of samples, shaped to divide them; a zero sample is left as it is."""
    norms = wide(torch.linalg.vector_norm(x.flatten(1), dim=1), x)
    return torch.where(norms > 0, norms, torch.ones_like(norms))


def wide(t: Tensor, x: Tensor) -> Tensor:
    """Return one number per sample, shaped to be combined with samples like x."""
    return t.reshape(-1, *[1] * (x.ndim - 1))

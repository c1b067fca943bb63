"""How large a Lipschitz quotient ‖f(a) − f(b)‖₂ / ‖a − b‖₂ can be found?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lben.evaluation.attacks.common import (
    Images,
    as_ordinary,
    differentiating,
    gaussian,
    norms,
    own,
    view,
    wide,
)
from lben.values import plain


@dataclass(frozen=True, kw_only=True, eq=False)
class Pairs:
    """Pairs of inputs and the quotient ‖f(a) − f(b)‖₂ / ‖a − b‖₂ of each.

    Attributes:
        a, b: the inputs.
        quotient: a lower bound of the l2 Lipschitz constant, for every pair.

    Example:
        >>> pairs = ascend_quotient(nn.Linear(3, 2), torch.rand(5, 3), steps=2)
        >>> pairs.a.shape, pairs.quotient.shape
        (torch.Size([5, 3]), torch.Size([5]))
    """

    a: Images
    b: Images
    quotient: Float[Tensor, " batch"]


@differentiating
def ascend_quotient(
    model: nn.Module,
    x: Images,
    *,
    steps: int = 150,
    lr: float = 0.03,
    distance: float = 0.1,
    generator: torch.Generator | None = None,
) -> Pairs:
    """Maximise log ‖f(a) − f(b)‖ − log ‖a − b‖ over pairs by Adam, from pairs near the images.

    Inputs may leave [0, 1]: a Lipschitz bound is for all inputs. The largest quotient found is a
    lower bound of the Lipschitz constant, to be compared with a proved upper bound.

    The model is taken in evaluation mode and left as it is, also where other threads use it.

    Args:
        model: images, or inputs of any other shape, to outputs; float64 gives quotients that
            rounding does not spoil.
        x: starting images; they need not lie in [0, 1].
        steps: of Adam.
        lr: its rate, in the units of x; it falls to 0.
        distance: l2 distance of the starting pairs.
        generator: of their directions; torch's own when None.

    Returns:
        The pairs with the largest quotients found, one for each image.

    Raises:
        ValueError: for images that are not finite or not of floating point, steps below 0, or a
            rate or distance that is not positive.

    Example:
        >>> model = nn.Linear(2, 2, bias=False)
        >>> with torch.no_grad():
        ...     _ = model.weight.copy_(torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
        >>> found = ascend_quotient(model, torch.rand(4, 2), steps=20)
        >>> round(float(found.quotient.max()), 3)
        3.0
    """
    x, steps = own(x), plain(steps)
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise ValueError(f"steps must be an integer of at least 0, got {steps!r}")
    for name, size in (("lr", lr), ("distance", distance)):
        if not 0 < size < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {size}")
    if not len(x):
        return Pairs(a=x.clone(), b=x.clone(), quotient=x.new_zeros(0))
    model = view(model)
    noise = gaussian(x, generator)
    delta = distance * noise / norms(noise)
    for _ in range(10):  # power iteration turns δ towards the top singular vector
        delta.requires_grad_()
        value = (model(x + delta) - model(x)).square().sum()
        (gradient,) = torch.autograd.grad(value, delta)
        delta = distance * gradient / norms(gradient)
    a, b = x.clone().requires_grad_(), (x + delta).detach().requires_grad_()
    optimizer = torch.optim.Adam([a, b], lr=lr)
    best = Pairs(a=a.detach().clone(), b=b.detach().clone(), quotient=quotients(model, a, b))
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps)
        value = _log_quotient(model, a, b)
        gradients = torch.autograd.grad(-value.sum(), [a, b])
        a.grad, b.grad = gradients
        with torch.device(x.device):  # where Adam makes its state
            optimizer.step()
        best = _keep_better(best, a, b, quotients(model, a, b))
    return best


@differentiating
@torch.no_grad()
def quotients(model: nn.Module, a: Images, b: Images) -> Float[Tensor, " batch"]:
    """Return ‖f(a) − f(b)‖₂ / ‖a − b‖₂ per pair; 0 for equal points.

    The model is taken in evaluation mode and left as it is.

    Args:
        model: f, inputs of any shape to outputs.
        a, b: inputs, as many of one as of the other.

    Returns:
        Quotients in the l2 norm.

    Example:
        >>> quotients(torch.nn.Identity(), torch.zeros(2, 3), torch.tensor([[0.0] * 3, [1.0] * 3]))
        tensor([0., 1.])
    """
    a, b, model = as_ordinary(a), as_ordinary(b), view(model)
    change = torch.linalg.vector_norm((model(a) - model(b)).flatten(1), dim=1)
    distance = torch.linalg.vector_norm((a - b).flatten(1), dim=1)
    return torch.where(distance > 0, change / distance, torch.zeros_like(change))


def random_pairs(
    x: Images, count: int, generator: torch.Generator
) -> Iterator[tuple[Images, Images]]:
    """Yield about `count` pairs in batches: image pairs, images and near points, uniform noise.

    Args:
        x: images, or inputs of any other shape.
        count: number of pairs; the last batch is filled up.
        generator: on the CPU.

    Raises:
        ValueError: if there are no images, or count is below 1.

    Example:
        >>> batches = list(random_pairs(torch.rand(10, 3), 7000, torch.Generator()))
        >>> [len(a) for a, b in batches]
        [5000, 5000]
    """
    x = own(x)
    if not len(x) or isinstance(count, bool) or count < 1:
        raise ValueError(f"random pairs need images and a count above 0, got {len(x)} and {count}")

    def draw_near(scale: float) -> Callable[[Tensor], Tensor]:
        return lambda a: a + scale * gaussian(a, generator)

    kinds: list[Callable[[Tensor], Tensor]] = [
        lambda a: x[_draw(len(x), len(a), generator)],
        lambda a: torch.rand(a.shape, generator=generator, dtype=a.dtype, device="cpu").to(a),
        *map(draw_near, (1e-3, 1e-1, 10.0)),
    ]
    batch = min(count, 5000)
    for index in range(-(-count // batch)):
        a = x[_draw(len(x), batch, generator)]
        yield a, kinds[index % len(kinds)](a)


def corner_pairs(x: Images, generator: torch.Generator) -> Iterator[tuple[Images, Images]]:
    """Yield pairs where rounding, ties and kinks are likely to hurt.

    Saturated and constant images, a difference in one pixel, in the last place, or denormal; the
    kinks of a homogeneous function at 0; images far outside [0, 1]. Nothing for no images.

    Args:
        x: images, or inputs of any other shape.
        generator: on the CPU.

    Example:
        >>> pairs = list(corner_pairs(torch.rand(4, 3), torch.Generator()))
        >>> all(a.shape == b.shape == (4, 3) for a, b in pairs)
        True
    """
    x = own(x)
    if not len(x):
        return

    def sign() -> Tensor:
        return (2 * (torch.rand(x.shape, generator=generator, device="cpu") > 0.5) - 1).to(x)

    zero, tiny = torch.zeros_like(x), torch.finfo(x.dtype).tiny
    one_pixel = torch.zeros_like(x)
    flat = one_pixel.flatten(1)
    flat[torch.arange(len(x), device="cpu"), _draw(flat.shape[1], len(x), generator)] = 1.0
    one_pixel = flat.reshape(x.shape)
    yield x, (x > 0.5).to(x.dtype)
    yield zero, torch.ones_like(x)
    yield x, torch.nextafter(x, torch.full_like(x, torch.inf))
    yield x, x + one_pixel
    yield zero, tiny * sign()
    yield tiny * sign(), -tiny * x
    yield x, -x
    yield 1e3 * sign(), 1e3 * sign()
    yield 1e6 * x, 1e6 * x + one_pixel
    yield x, x.flip(-1)


def _draw(size: int, count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(size, (count,), generator=generator, device="cpu")


def _log_quotient(model: nn.Module, a: Tensor, b: Tensor) -> Tensor:
    tiny = torch.finfo(a.dtype).tiny
    change = (model(a) - model(b)).flatten(1).square().sum(1)
    distance = (a - b).flatten(1).square().sum(1)
    return 0.5 * ((change + tiny).log() - (distance + tiny).log())


def _keep_better(best: Pairs, a: Tensor, b: Tensor, quotient: Tensor) -> Pairs:
    improved = quotient > best.quotient
    keep = wide(improved, best.a)
    return Pairs(
        a=torch.where(keep, a.detach(), best.a),
        b=torch.where(keep, b.detach(), best.b),
        quotient=torch.where(improved, quotient, best.quotient),
    )

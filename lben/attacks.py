"""How close can an adversary come to a claimed bound? PGD, and ascent on the Lipschitz quotient."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lben.radii import check_labels

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


def pgd_l2(
    model: nn.Module,
    x: Images,
    labels: Int[Tensor, " batch"],
    radius: float,
    *,
    steps: int = 20,
    restarts: int = 2,
    generator: torch.Generator | None = None,
) -> tuple[Images, Tensor]:
    """Search the l2 ball for a misclassified image by projected gradient ascent on the margin.

    Madry et al. (2018) with normalised gradients, step 2.5·radius/steps, the first start at x and
    the others at random points of the sphere. Points stay in [0, 1].

    Args:
        model: images to logits.
        x: images in [0, 1].
        labels: true classes.
        radius: of the ball, in the l2 norm of pixels.

    Returns:
        The worst point found for each image, and whether it is misclassified.
    """
    if not radius >= 0:
        raise ValueError(f"radius must be at least 0, got {radius}")
    best, worst_margin = x.clone(), torch.full((len(x),), torch.inf, dtype=x.dtype)
    worst_margin = worst_margin.to(x.device)
    with frozen(model):
        for restart in range(restarts):
            point = x.clone()
            if restart:
                noise = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
                point = _into_ball(x + radius * noise / _norms(noise), x, radius)
            for step in range(steps + 1):
                point.requires_grad_()
                logits = model(point)
                check_labels(logits, labels)
                margins = _margins(logits, labels)
                (gradient,) = torch.autograd.grad(margins.sum(), point)
                with torch.no_grad():
                    better = margins < worst_margin
                    worst_margin = torch.where(better, margins, worst_margin)
                    best = torch.where(better[:, None, None, None], point, best)
                    if step == steps:
                        break
                    direction = gradient / _norms(gradient)
                    point = _into_ball(point - 2.5 * radius / steps * direction, x, radius)
    return best.detach(), worst_margin <= 0


@dataclass(frozen=True, kw_only=True, eq=False)
class Pairs:
    """Pairs of inputs and the quotient ‖f(a) − f(b)‖₂ / ‖a − b‖₂ of each."""

    a: Images
    b: Images
    quotient: Float[Tensor, " batch"]


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

    Args:
        model: images to logits; float64 gives quotients that rounding does not spoil.
        x: starting images.
        distance: l2 distance of the starting pairs.
    """
    noise = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
    delta = distance * noise / _norms(noise)
    with frozen(model):
        for _ in range(10):  # power iteration turns δ towards the top singular vector
            delta.requires_grad_()
            value = (model(x + delta) - model(x)).square().sum()
            (gradient,) = torch.autograd.grad(value, delta)
            delta = distance * gradient / _norms(gradient)
        a, b = x.clone().requires_grad_(), (x + delta).detach().requires_grad_()
        optimizer = torch.optim.Adam([a, b], lr=lr)
        best = Pairs(a=a.detach().clone(), b=b.detach().clone(), quotient=quotients(model, a, b))
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = lr * (1 - step / steps)
            value = _log_quotient(model, a, b)
            gradients = torch.autograd.grad(-value.sum(), [a, b])
            a.grad, b.grad = gradients
            optimizer.step()
            best = _better(best, a, b, quotients(model, a, b))
    return best


@torch.no_grad()
def quotients(model: nn.Module, a: Images, b: Images) -> Float[Tensor, " batch"]:
    """Return ‖f(a) − f(b)‖₂ / ‖a − b‖₂ per pair; 0 for equal points."""
    change = torch.linalg.vector_norm(model(a) - model(b), dim=1)
    distance = torch.linalg.vector_norm((a - b).flatten(1), dim=1)
    return torch.where(distance > 0, change / distance, torch.zeros_like(change))


def random_pairs(
    x: Images, count: int, generator: torch.Generator
) -> Iterator[tuple[Images, Images]]:
    """Yield about `count` pairs in batches: image pairs, images and near points, uniform noise."""

    def near(scale: float) -> Callable[[Tensor], Tensor]:
        return lambda a: a + scale * torch.randn(a.shape, generator=generator, dtype=a.dtype)

    kinds: list[Callable[[Tensor], Tensor]] = [
        lambda a: x[_draw(len(x), len(a), generator)],
        lambda a: torch.rand(a.shape, generator=generator, dtype=a.dtype),
        *map(near, (1e-3, 1e-1, 10.0)),
    ]
    batch = min(count, 5000)
    for index in range(-(-count // batch)):
        a = x[_draw(len(x), batch, generator)]
        yield a, kinds[index % len(kinds)](a)


def _draw(size: int, count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(size, (count,), generator=generator)


def _margins(logits: Tensor, labels: Tensor) -> Tensor:
    own = logits.gather(1, labels[:, None]).squeeze(1)
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return own - others.amax(1)


def _norms(x: Tensor) -> Tensor:
    """Return l2 norms of images, shaped to divide them; a zero image is left as it is."""
    norms = torch.linalg.vector_norm(x.flatten(1), dim=1)[:, None, None, None]
    return torch.where(norms > 0, norms, torch.ones_like(norms))


def _into_ball(point: Tensor, centre: Tensor, radius: float) -> Tensor:
    """Clip to [0, 1], then scale towards the centre: both sets contain the segment between."""
    offset = point.clamp(0, 1) - centre
    shrink = (radius * (1 - 1e-9) / _norms(offset)).clamp_max(1)
    return centre + offset * shrink


def _log_quotient(model: nn.Module, a: Tensor, b: Tensor) -> Tensor:
    tiny = torch.finfo(a.dtype).tiny
    change = (model(a) - model(b)).square().sum(1)
    distance = (a - b).flatten(1).square().sum(1)
    return 0.5 * ((change + tiny).log() - (distance + tiny).log())


def _better(best: Pairs, a: Tensor, b: Tensor, quotient: Tensor) -> Pairs:
    improved = quotient > best.quotient
    keep = improved[:, None, None, None]
    return Pairs(
        a=torch.where(keep, a.detach(), best.a),
        b=torch.where(keep, b.detach(), best.b),
        quotient=torch.where(improved, quotient, best.quotient),
    )

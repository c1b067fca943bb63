"""Is there an image within a radius that is classified otherwise?"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lben.attacks.common import Images, frozen, norms
from lben.radii import check_labels


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
    _check_radius(radius)
    worst = _Worst(x)
    with frozen(model):
        for point in _starts(x, radius, restarts, generator):
            for step in range(steps + 1):
                margins, gradient = _margin_gradient(model, point, labels)
                worst.update(point, margins)
                if step < steps:
                    direction = gradient / norms(gradient)
                    point = _into_ball(point - 2.5 * radius / steps * direction, x, radius)
    return worst.point, worst.margin <= 0


def apgd_l2(
    model: nn.Module,
    x: Images,
    labels: Int[Tensor, " batch"],
    radius: float,
    *,
    steps: int = 50,
    restarts: int = 1,
    generator: torch.Generator | None = None,
) -> tuple[Images, Bool[Tensor, " batch"]]:
    """Search the l2 ball by projected gradient ascent that adapts its step, on the margin.

    APGD of Croce and Hein (2020), section 3: momentum 0.75, first step twice the radius, halved
    for each image at checkpoints where it has not paid, with a restart from the best point.
    Points stay in [0, 1].

    Args:
        model: images to logits.
        x: images in [0, 1].
        labels: true classes.
        radius: of the ball, in the l2 norm of pixels.
        steps: of each run.
        restarts: runs, the first from the image itself, the others from random points.

    Returns:
        The worst point found for each image, and whether it is misclassified.
    """
    _check_radius(radius)
    worst = _Worst(x)
    with frozen(model):
        for point in _starts(x, radius, restarts, generator):
            _adaptive(model, x, labels, radius, point, steps, worst)
    return worst.point, worst.margin <= 0


@torch.no_grad()
def across_the_boundary(
    model: nn.Module, a: Images, b: Images, *, distance: float = 1e-3, steps: int = 60
) -> tuple[Images, Images]:
    """Return pairs of images a small distance apart that the model classifies differently.

    Bisection between images of different class finds the boundary, and the gradient of the margin
    the shortest way back. No radius certified at the first image of a pair may reach the second.

    Args:
        model: images to logits, float64 and solved well: it decides what the classes are.
        a, b: images.
        distance: of the first image of a pair from the boundary, in the l2 norm.
        steps: of bisection.

    Returns:
        The pairs, for those of a and b that differ in class.
    """
    with frozen(model):
        differ = model(a).argmax(1) != model(b).argmax(1)
        a, b = a[differ], b[differ]
        label = model(a).argmax(1)
        for _ in range(steps):
            middle = 0.5 * (a + b)
            same = _wide(model(middle).argmax(1) == label)
            a, b = torch.where(same, middle, a), torch.where(same, b, middle)
        with torch.enable_grad():
            _, gradient = _margin_gradient(model, a, label)
        first = a + distance * gradient / norms(gradient)
        kept = model(first).argmax(1) != model(b).argmax(1)
        return first[kept], b[kept]


def _adaptive(
    model: nn.Module,
    x: Images,
    labels: Tensor,
    radius: float,
    point: Images,
    steps: int,
    worst: _Worst,
) -> None:
    own = _Worst(x)  # of this run: it restarts from there
    size = torch.full((len(x),), 2.0 * radius, dtype=x.dtype, device=x.device)
    before = point
    paid = torch.zeros(len(x), device=x.device)
    halved = torch.ones(len(x), dtype=torch.bool, device=x.device)
    window = max(int(0.22 * steps), 1)
    checkpoint, best_then = window, own.margin
    last = torch.full_like(own.margin, torch.inf)
    for step in range(steps + 1):
        margins, gradient = _margin_gradient(model, point, labels)
        paid += margins < last
        last = margins
        own.update(point, margins)
        worst.update(point, margins)
        if step == steps:
            return
        if step == checkpoint:
            stuck = (paid < 0.75 * window) | (~halved & (own.margin >= best_then))
            size = torch.where(stuck, 0.5 * size, size)
            point = torch.where(_wide(stuck), own.point, point)
            if bool(stuck.any()):
                margins, gradient = _margin_gradient(model, point, labels)
            halved, best_then = stuck, own.margin
            paid = torch.zeros_like(paid)
            window = max(window - max(int(0.03 * steps), 1), max(int(0.06 * steps), 1))
            checkpoint += window
        direction = gradient / norms(gradient)
        ahead = _into_ball(point - _wide(size) * direction, x, radius)
        share = 1.0 if step == 0 else 0.75
        moved = point + share * (ahead - point) + (1 - share) * (point - before)
        before, point = point, _into_ball(moved, x, radius)


def auto_attack(
    model: nn.Module, x: Images, labels: Int[Tensor, " batch"], radius: float, *, batch: int = 250
) -> tuple[Images, Bool[Tensor, " batch"]]:
    """Run the standard AutoAttack (Croce and Hein 2020) in l2, where its package is installed.

    Returns:
        Its images, and which of them are misclassified.

    Raises:
        ImportError: if the package `autoattack` is missing.
    """
    _check_radius(radius)
    if importlib.util.find_spec("autoattack") is None:
        raise ImportError(
            "AutoAttack is not installed: pip install "
            "git+https://github.com/fra31/auto-attack, or take apgd_l2"
        )
    from autoattack import AutoAttack  # type: ignore[import-not-found]

    with frozen(model):
        attack = AutoAttack(model, norm="L2", eps=radius, device=str(x.device), verbose=False)
        found = attack.run_standard_evaluation(x, labels, bs=batch)
        return found, model(found).argmax(1) != labels


@dataclass(eq=False)
class _Worst:
    """The points of least margin so far."""

    point: Images
    margin: Float[Tensor, " batch"]

    def __init__(self, x: Images) -> None:
        self.point = x.clone()
        self.margin = torch.full((len(x),), torch.inf, dtype=x.dtype, device=x.device)

    def update(self, point: Images, margins: Tensor) -> None:
        better = margins < self.margin
        self.margin = torch.where(better, margins, self.margin)
        self.point = torch.where(_wide(better), point, self.point)


def _check_radius(radius: float) -> None:
    if not radius >= 0:
        raise ValueError(f"radius must be at least 0, got {radius}")


def _starts(
    x: Images, radius: float, restarts: int, generator: torch.Generator | None
) -> Iterator[Images]:
    """Yield the images themselves, then random points of the sphere around them."""
    yield x.clone()
    for _ in range(restarts - 1):
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
        yield _into_ball(x + radius * noise / norms(noise), x, radius)


def _margin_gradient(model: nn.Module, point: Images, labels: Tensor) -> tuple[Tensor, Tensor]:
    point = point.detach().requires_grad_()
    logits = model(point)
    check_labels(logits, labels)
    margins = _margins(logits, labels)
    (gradient,) = torch.autograd.grad(margins.sum(), point)
    return margins.detach(), gradient


def _wide(t: Tensor) -> Tensor:
    return t[:, None, None, None]


def _margins(logits: Tensor, labels: Tensor) -> Tensor:
    own = logits.gather(1, labels[:, None]).squeeze(1)
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return own - others.amax(1)


def _into_ball(point: Tensor, centre: Tensor, radius: float) -> Tensor:
    """Clip to [0, 1], then scale towards the centre: both sets contain the segment between."""
    offset = point.clamp(0, 1) - centre
    shrink = (radius * (1 - 1e-9) / norms(offset)).clamp_max(1)
    return centre + offset * shrink

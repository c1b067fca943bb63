"""Is there an image within a radius that is classified otherwise?

Note [Where the points of an attack lie]
Every point lies within the range of the images. Its distance, measured in float64, is at most the
radius. A point outside would be no evidence against a radius. If rounding allows no step, as in
bfloat16 within a small radius, the attack stays at the image.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Real

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor, nn

from lben.evaluation.attacks.common import Images, differentiating, gaussian, norms, own, view, wide
from lben.radii.margin import check_labels
from lben.values import plain

Labels = Integer[Tensor, " batch"] | Bool[Tensor, " batch"]
Selected = Float[Tensor, "pairs *sample"]
"""Images of the pairs for which something holds."""
Radius = float | Real | Float[Tensor, ""]
Bounds = tuple[float | Tensor, float | Tensor]
"""Least and largest value of an input, or of each channel (then tensors like a sample)."""


@differentiating
def pgd_l2(
    model: nn.Module,
    x: Images,
    labels: Labels,
    radius: Radius,
    *,
    steps: int = 20,
    restarts: int = 2,
    generator: torch.Generator | None = None,
    bounds: Bounds | None = (0.0, 1.0),
) -> tuple[Images, Bool[Tensor, " batch"]]:
    """Search the l2 ball for a misclassified image by projected gradient ascent on the margin.

    Madry et al. (2018) with normalised gradients, step 2.5·radius/steps, the first start at x and
    the others at random points of the sphere. Points stay within `bounds`. The model is attacked in
    evaluation mode and left as it is, also where other threads use it.

    Args:
        model: images, or inputs of any other shape, to logits.
        x: images within `bounds`.
        labels: true classes, integers of any type.
        radius: of the ball, in the l2 norm of x.
        steps: of each run.
        restarts: runs, the first from the image itself, the others from random points.
        generator: of those points; torch's own when None.
        bounds: least and largest value of an input: (0, 1) for pixels, those of your scale for
            inputs on another (tensors where channels differ), None where there are none.

    Returns:
        The worst point found for each image, and whether it is misclassified: its margin is not
        positive. Nothing has a gradient.

    Raises:
        ValueError: for images outside `bounds`, not finite or not of floating point, labels that
            are no classes, a radius below 0 or not finite, steps or restarts below 1.

    Reference:
        Madry, Makelov, Schmidt, Tsipras and Vladu (2018), section 2.

    Example:
        >>> model = nn.Linear(2, 2, bias=False)
        >>> _ = nn.init.eye_(model.weight)  # the larger input wins: (0.6, 0.4) is 0.141 away
        >>> x, labels = torch.tensor([[0.6, 0.4]]), torch.tensor([0])
        >>> [pgd_l2(model, x, labels, radius)[1].item() for radius in (0.13, 0.15)]
        [False, True]
    """
    ball, worst, model, labels = _prepare(model, x, labels, radius, bounds, steps, restarts)
    _run_projected(ball, worst, model, labels, steps, restarts, generator)
    return worst.point, worst.margin <= 0


@differentiating
def pgd_linf(
    model: nn.Module,
    x: Images,
    labels: Labels,
    radius: Radius,
    *,
    steps: int = 20,
    restarts: int = 2,
    generator: torch.Generator | None = None,
    bounds: Bounds | None = (0.0, 1.0),
) -> tuple[Images, Bool[Tensor, " batch"]]:
    """Search the l∞ ball for a misclassified image by projected gradient ascent on the margin.

    Madry et al. (2018): steps of 2.5·radius/steps along the signs of the gradient, the first start
    at x and the others at random points of the ball. Otherwise as `pgd_l2`.

    Args:
        model, x, labels, steps, restarts, generator, bounds: as for `pgd_l2`.
        radius: of the ball, in the l∞ norm of x.

    Returns:
        The worst point found for each image, and whether it is misclassified. Nothing has a
        gradient.

    Raises:
        ValueError: as `pgd_l2`.

    Reference:
        Madry, Makelov, Schmidt, Tsipras and Vladu (2018), section 2.

    Example:
        >>> model = nn.Linear(2, 2, bias=False)
        >>> _ = nn.init.eye_(model.weight)  # the larger input wins: (0.6, 0.4) is 0.1 away
        >>> x, labels = torch.tensor([[0.6, 0.4]]), torch.tensor([0])
        >>> [pgd_linf(model, x, labels, radius)[1].item() for radius in (0.09, 0.11)]
        [False, True]
    """
    ball, worst, model, labels = _prepare(
        model, x, labels, radius, bounds, steps, restarts, shape=_Cube
    )
    _run_projected(ball, worst, model, labels, steps, restarts, generator)
    return worst.point, worst.margin <= 0


@differentiating
def apgd_l2(
    model: nn.Module,
    x: Images,
    labels: Labels,
    radius: Radius,
    *,
    steps: int = 50,
    restarts: int = 1,
    generator: torch.Generator | None = None,
    bounds: Bounds | None = (0.0, 1.0),
) -> tuple[Images, Bool[Tensor, " batch"]]:
    """Search the l2 ball by projected gradient ascent that adapts its step, on the margin.

    APGD of Croce and Hein (2020), section 3: momentum 0.75, first step twice the radius, halved
    for each image at checkpoints where it has not paid, with a restart from the best point.

    Args:
        model, x, labels, radius, restarts, generator, bounds: as in `pgd_l2`.
        steps: of each run.

    Returns:
        As `pgd_l2`.

    Raises:
        ValueError: as `pgd_l2`.

    Reference:
        Croce and Hein (2020), Algorithm 1.

    Example:
        >>> model = nn.Linear(2, 2, bias=False)
        >>> _ = nn.init.eye_(model.weight)
        >>> x, labels = torch.tensor([[0.6, 0.4]]), torch.tensor([0])
        >>> point, broken = apgd_l2(model, x, labels, 0.15)
        >>> broken.item(), bool((point - x).norm() <= 0.15)
        (True, True)
    """
    ball, worst, model, labels = _prepare(model, x, labels, radius, bounds, steps, restarts)
    for point in ball.starts(restarts, generator):
        _run_adaptive(model, ball, labels, point, steps, worst)
    return worst.point, worst.margin <= 0


@differentiating
@torch.no_grad()
def across_the_boundary(
    model: nn.Module, a: Images, b: Images, *, distance: float = 1e-3, steps: int = 60
) -> tuple[Selected, Selected]:
    """Return pairs of images a small distance apart that the model classifies differently.

    Bisection between images of different class finds the boundary, and the gradient of the margin
    the shortest way back. No radius certified at the first image of a pair may reach the second.

    Args:
        model: images, or inputs of any other shape, to logits; float64 and solved well: it decides
            what the classes are.
        a, b: images, as many of one as of the other; they need not lie in [0, 1].
        distance: of the first image of a pair from the boundary, in the l2 norm.
        steps: of bisection.

    Returns:
        The pairs, for those of a and b that differ in class.

    Raises:
        ValueError: for images of different shapes, not finite or not of floating point, or a
            distance or number of steps that is not positive.

    Example:
        >>> model = nn.Linear(2, 2, bias=False).double()
        >>> _ = nn.init.eye_(model.weight)
        >>> a, b = torch.tensor([[1.0, 0.0]]).double(), torch.tensor([[0.0, 1.0]]).double()
        >>> near, across = across_the_boundary(model, a, b)
        >>> model(near).argmax(1).item(), model(across).argmax(1).item()
        (0, 1)
        >>> round(float((near - across).norm()), 4)
        0.001
    """
    a, b = own(a), own(b)
    if a.shape != b.shape:
        raise ValueError(f"a and b must have one shape, got {tuple(a.shape)} and {tuple(b.shape)}")
    if not 0 < distance < math.inf:
        raise ValueError(f"distance must be positive and finite, got {distance}")
    check_count("steps", steps)
    model = view(model)
    differ = model(a).argmax(1) != model(b).argmax(1)
    a, b = a[differ], b[differ]
    if not len(a):
        return a, b
    label = model(a).argmax(1)
    for _ in range(steps):
        middle = 0.5 * (a + b)
        same = wide(model(middle).argmax(1) == label, a)
        a, b = torch.where(same, middle, a), torch.where(same, b, middle)
    with torch.enable_grad():
        _, gradient = _margin_gradient(model, a, label)
    first = a + distance * gradient / norms(gradient)
    stored = model(first).argmax(1) != model(b).argmax(1)
    return first[stored], b[stored]


def _run_projected(
    ball: _Ball,
    worst: _Worst,
    model: nn.Module,
    labels: Tensor,
    steps: int,
    restarts: int,
    generator: torch.Generator | None,
) -> None:
    """Update the worst points by projected steps of one length, from every start."""
    for point in ball.starts(restarts, generator):
        for step in range(steps + 1):
            margins, gradient = _margin_gradient(model, point, labels)
            worst.update(point, margins)
            if step < steps:
                direction = ball.steepest(gradient)
                point = ball.project(point - 2.5 * ball.radius / steps * direction)


def _run_adaptive(
    model: nn.Module, ball: _Ball, labels: Tensor, point: Images, steps: int, worst: _Worst
) -> None:
    x = ball.centre
    own = _Worst(x)  # of this run: it restarts from there
    size = torch.full((len(x),), 2.0 * ball.radius, dtype=x.dtype, device=x.device)
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
            point = torch.where(wide(stuck, x), own.point, point)
            if bool(stuck.any()):
                margins, gradient = _margin_gradient(model, point, labels)
            halved, best_then = stuck, own.margin
            paid = torch.zeros_like(paid)
            window = max(window - max(int(0.03 * steps), 1), max(int(0.06 * steps), 1))
            checkpoint += window
        direction = gradient / norms(gradient)
        ahead = ball.project(point - wide(size, x) * direction)
        share = 1.0 if step == 0 else 0.75
        moved = point + share * (ahead - point) + (1 - share) * (point - before)
        before, point = point, ball.project(moved)


@differentiating
def auto_attack(
    model: nn.Module, x: Images, labels: Labels, radius: Radius, *, batch: int = 250
) -> tuple[Images, Bool[Tensor, " batch"]]:
    """Run the standard AutoAttack (Croce and Hein 2020) in l2, where its package is installed.

    It takes images in [0, 1] and nothing else.

    Args:
        model, x, labels, radius: as in `pgd_l2`.
        batch: images that are attacked at once.

    Returns:
        Its images, and which of them are misclassified.

    Raises:
        ImportError: if the package `autoattack` is missing.
        ValueError: as `pgd_l2`.

    Example:
        >>> model, x = nn.Linear(2, 2), torch.rand(1, 2)
        >>> auto_attack(model, x, torch.tensor([7]), 0.1)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        ValueError: labels must lie in [0, 2), got values from 7 to 7...
    """
    ball, _, model, labels = _prepare(model, x, labels, radius, (0.0, 1.0), batch, 1)
    if importlib.util.find_spec("autoattack") is None:
        raise ImportError(
            "AutoAttack is not installed: pip install "
            "git+https://github.com/fra31/auto-attack, or take apgd_l2"
        )
    from autoattack import AutoAttack  # type: ignore[import-not-found]

    attack = AutoAttack(model, norm="L2", eps=ball.radius, device=str(x.device), verbose=False)
    found = attack.run_standard_evaluation(ball.centre, labels, bs=batch).detach()
    with torch.no_grad():
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
        self.point = torch.where(wide(better, point), point, self.point)


@dataclass(frozen=True, eq=False)
class _Ball:
    """The images of a range within a radius of others, see [Where the points of an attack lie]."""

    centre: Images
    radius: float
    bounds: Bounds | None

    @staticmethod
    def steepest(gradient: Tensor) -> Tensor:
        """Return the direction of norm 1 in which a function with this gradient grows fastest."""
        return gradient / norms(gradient)

    def project(self, point: Tensor) -> Images:
        """Return an image near the point: clipped to the range, then scaled towards the centre.

        Range and ball are convex and contain the centre, so they contain the segment between.
        """
        offset = (self._clip(point) - self.centre).double()
        found, settled = self.centre, torch.zeros(len(point), dtype=torch.bool, device=point.device)
        for slack in (1e-9, 8 * torch.finfo(point.dtype).eps):
            shrink = (self.radius * (1 - slack) / norms(offset)).clamp_max(1)
            near = self._clip(self.centre + (offset * shrink).to(point.dtype))
            moved = (near.double() - self.centre.double()).flatten(1)
            inside = ~settled & (torch.linalg.vector_norm(moved, dim=1) <= self.radius)
            found, settled = torch.where(wide(inside, near), near, found), settled | inside
        return found

    def _clip(self, point: Tensor) -> Tensor:
        if self.bounds is None:
            return point
        low, high = (
            torch.as_tensor(b, dtype=point.dtype, device=point.device) for b in self.bounds
        )
        return torch.minimum(torch.maximum(point, low), high)

    def starts(self, restarts: int, generator: torch.Generator | None) -> Iterator[Images]:
        """Yield the images themselves, then random points of the sphere around them."""
        yield self.centre.clone()
        for _ in range(restarts - 1):
            noise = gaussian(self.centre, generator)
            yield self.project(self.centre + self.radius * noise / norms(noise))


@dataclass(frozen=True, eq=False)
class _Cube(_Ball):
    """The same in the l∞ norm."""

    @staticmethod
    def steepest(gradient: Tensor) -> Tensor:
        """Return the direction of norm 1 in which a function with this gradient grows fastest."""
        return gradient.sign()

    def project(self, point: Tensor) -> Images:
        """Return the nearest image, or one a little nearer to the centre."""
        found, settled = self.centre, torch.zeros_like(self.centre, dtype=torch.bool)
        for slack in (0.0, 1e-9, 8 * torch.finfo(point.dtype).eps):
            size = self.radius * (1 - slack)
            offset = (self._clip(point) - self.centre).double().clamp(-size, size)
            near = self._clip(self.centre + offset.to(point.dtype))
            inside = ~settled & ((near.double() - self.centre.double()).abs() <= self.radius)
            found, settled = torch.where(inside, near, found), settled | inside
        return found

    def starts(self, restarts: int, generator: torch.Generator | None) -> Iterator[Images]:
        """Yield the images themselves, then random points of the ball around them."""
        yield self.centre.clone()
        for _ in range(restarts - 1):
            noise = torch.rand(self.centre.shape, generator=generator, device="cpu")
            yield self.project(self.centre + self.radius * (2 * noise.to(self.centre) - 1))


def _prepare(
    model: nn.Module,
    x: Images,
    labels: Tensor,
    radius: Radius,
    bounds: Bounds | None,
    steps: int,
    restarts: int,
    shape: type[_Ball] = _Ball,
) -> tuple[_Ball, _Worst, nn.Module, Tensor]:
    """Check the arguments of an attack; return ball, worst points, model and labels for it."""
    centre, radius = own(x), plain(radius)
    if isinstance(radius, bool) or not isinstance(radius, int | float):
        raise ValueError(f"radius must be a number, got {radius!r}")
    if not radius >= 0:
        raise ValueError(f"radius must be at least 0, got {radius}")
    if math.isinf(radius):
        raise ValueError("radius must be finite, got inf")
    check_count("steps", steps)
    check_count("restarts", restarts)
    ends = [torch.as_tensor(b, device=x.device) for b in ((0.0, 1.0) if bounds is None else bounds)]
    if len(ends) != 2 or not bool((ends[0] < ends[1]).all()):
        raise ValueError(f"bounds must be (low, high) with low below high, or None, got {bounds}")
    ball, model = shape(centre, float(radius), bounds), view(model)
    if not torch.equal(ball._clip(centre), centre):
        low, high = (float(t) for t in centre.aminmax())
        limits = "bounds" if any(isinstance(b, Tensor) for b in bounds or ()) else f"{bounds}"
        raise ValueError(
            f"images must lie within {limits}, got values from {low:.4g} to {high:.4g}: for inputs "
            "on another scale give its range as bounds=(low, high), or bounds=None for none"
        )
    with torch.no_grad():  # one image tells the number of classes
        logits = model(centre[:1] if len(centre) else centre.new_zeros(1, *centre.shape[1:]))
    logits = logits.expand(len(centre), -1) if logits.ndim == 2 else logits
    labels = check_labels(logits, labels).clone()  # inference tensors cannot be part of a graph
    return ball, _Worst(centre), model, labels


def check_count(name: str, count: int) -> None:
    """Raise ValueError unless a number of steps, runs or pairs is an integer above 0."""
    if isinstance(count, bool) or not isinstance(plain(count), int) or count < 1:
        raise ValueError(f"{name} must be an integer above 0, got {count!r}")


def _margin_gradient(model: nn.Module, point: Images, labels: Tensor) -> tuple[Tensor, Tensor]:
    if not len(point):
        return point.new_zeros(0), torch.zeros_like(point)
    point = point.detach().requires_grad_()
    margins = _margins(model(point), labels)
    (gradient,) = torch.autograd.grad(margins.sum(), point)
    return margins.detach(), gradient.detach()


def _margins(logits: Tensor, labels: Tensor) -> Tensor:
    own = logits.gather(1, labels[:, None]).squeeze(1)
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return own - others.amax(1)

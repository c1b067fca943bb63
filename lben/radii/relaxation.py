"""Within which ball around an image can no label change? Relaxations prove it, for any network.

The rungs of the ladder, from cheap to expensive: back-substitution for all images at once; an
attack, which finds where nothing can be proved; ranges and bounds improved by ascent; branch and
bound, image after image. Each image leaves the ladder at its first proof.

All statements are about the exact network, in real arithmetic, with the weights that are stored.
Balls and boxes are in the unit of raw inputs, before normalisation.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from lben.certificates.certificate import Certificate
from lben.certificates.relaxation import InputNorm, InputRegion
from lben.radii.branching import Verdict, prove_positive
from lben.radii.margin import check_labels
from lben.radii.ranges import prove_bounds, prove_ranges
from lben.tightening.descent import find_smallest
from lben.weights import digest
from lben.weights.affine_system import AffineSystem

_BATCH = 16
"""Images that climb the cheap rungs together."""
_RANGE_STEPS = 10
"""Of ascent for the range of a unit."""
_RANGE_SHARE = 0.25
"""Of the time; a step of ascent takes about twice as long as back-substitution."""
_FIRST, _SMALLEST, _LARGEST = 2.0**-5, 2.0**-30, 2.0**30
"""The radius that is tried first, and those between which one is sought."""


@dataclass(frozen=True, kw_only=True)
class BallCertificate(Certificate):
    """The statement that a label cannot change within a ball around one input.

    Attributes:
        margin: the least proved difference between the label's logit and another one.
        fingerprint: of the equations, see `AffineSystem.fingerprint`.
        radius: in the unit of raw inputs.
        norm: that the radius is measured in.
        label: the index of the label among the logits.
        point: SHA-256 of the input.
        box: smallest and largest value of an input, if the statement is about such inputs only.
        parts: of the ball, that were proved one by one, for all other logits together.

    Example:
        >>> import numpy as np
        >>> import torch
        >>> from lben.radii.relaxation import certify_balls
        >>> from lben.weights.activation import RELU
        >>> from lben.weights.affine_system import AffineSystem
        >>> from lben.weights.network import AffineMap, Block, Network
        >>> one = np.ones((1, 1))
        >>> network = Network(
        ...     input_shape=(1,),
        ...     blocks=(Block(affine=AffineMap.of({0: one}, np.zeros(1)), activation=RELU),),
        ...     output=AffineMap.of({1: np.array([[1.0], [0.0]])}, np.zeros(2)),
        ... )  # y = (σ(x), 0)
        >>> system, x = AffineSystem.of_network(network), torch.tensor([[1.0], [1.0]])
        >>> proofs = certify_balls(
        ...     system, x, torch.tensor([0, 1]), 0.5, norm="l2", box=None, seconds=0.1
        ... )
        >>> proofs[1] is None, proofs[0].radius, proofs[0].margin > 0.49, proofs[0].parts
        (True, 0.5, True, 1)
    """

    radius: float
    norm: InputNorm
    label: int
    point: str
    box: tuple[float, float] | None
    parts: int


def certify_balls(
    system: AffineSystem,
    x: Float[Tensor, "batch ..."],
    labels: Integer[Tensor, " batch"],
    radius: float | Float[Tensor, " batch"],
    *,
    norm: InputNorm,
    box: tuple[float, float] | None,
    seconds: float,
) -> list[BallCertificate | None]:
    """Return a certificate for each input whose label is proved within a ball.

    Args:
        system: the equations of the network, in float64.
        x: raw inputs, float32 or float64.
        labels: the index of each input's label among the logits.
        radius: one for all or one each, in the unit of raw inputs.
        norm: of the ball.
        box: smallest and largest value of an input; None if inputs may be any numbers.
        seconds: for each input that back-substitution does not prove; 0 for no more than that.

    Returns:
        One per input; None where no proof was found, or the label is not that of the largest logit.

    Raises:
        ValueError: if shapes or labels do not fit, the norm is another, a radius is negative or not
            finite, or an input is not finite or outside of the box.
        CertificateError: if nothing is known of an equilibrium, see `StateBound`.

    Example:
        See `BallCertificate`.
    """
    if x.ndim < 2 or x[:1].numel() != system.inputs * len(x[:1]):
        raise ValueError(
            f"x must be a batch of inputs of {system.inputs} numbers, got shape {tuple(x.shape)}"
        )
    if not seconds >= 0:
        raise ValueError(f"seconds must be at least 0, got {seconds}")
    flat = x.detach().cpu().reshape(len(x), system.inputs)
    region = InputRegion.around(flat, radius, norm, box)
    logits = torch.zeros(len(x), system.units(system.output))
    labels = check_labels(logits, labels.cpu())
    radii = torch.as_tensor(radius, dtype=torch.float64, device="cpu").expand(len(x)).tolist()
    results: list[BallCertificate | None] = []
    for part in torch.arange(len(x)).split(_BATCH):
        proofs = _climb(system, labels[part], region.select(part), seconds)
        results += [
            None
            if proof is None
            else BallCertificate(
                margin=proof.margin,
                fingerprint=system.fingerprint,
                dtype="float64",
                method="Lagrangian dual of the units' relaxation, evaluated with its rounding",
                radius=radii[i],
                norm=norm,
                label=int(labels[i]),
                point=digest("input", {"x": flat[i].double()}),
                box=None if box is None else (float(box[0]), float(box[1])),
                parts=proof.parts,
            )
            for i, proof in zip(part.tolist(), proofs, strict=True)
        ]
    return results


def _climb(
    system: AffineSystem, labels: Tensor, region: InputRegion, seconds: float
) -> list[Verdict | None]:
    """Return what is proved of each set of a batch."""
    proofs: list[Verdict | None] = [None] * len(labels)
    y = system.evaluate(region.center)[-1]
    right = (y.argmax(1) == labels).nonzero()[:, 0]
    if not len(right):
        return proofs
    begin = time.monotonic()
    region, targets = region.select(right), _differences(labels[right], y.shape[1])
    count, many = targets.shape[:2]
    image, rows = torch.arange(count).repeat_interleave(many), targets.flatten(0, 1)
    several, ranges = region.select(image), prove_ranges(system, region)
    each = (time.monotonic() - begin) / count
    bounds = prove_bounds(system, system.output, rows, ranges.select(image), several, steps=0)
    values = bounds.value.view(count, many)
    refuted = torch.zeros(count, dtype=torch.bool)
    if seconds:
        met = find_smallest(system.single, rows.float(), several.to(torch.float32))
        refuted = (met.view(count, many) <= 0).any(1)
    for i, index in enumerate(right.tolist()):
        done = values[i] > 0
        verdict = Verdict(margin=min([math.inf, *values[i][done].tolist()]), parts=int(done.sum()))
        if not bool(done.all()) and seconds and not refuted[i]:
            end, here = time.monotonic() + seconds, region.select(torch.tensor([i]))
            narrow = ranges.select(torch.tensor([i]))
            steps = min(_RANGE_STEPS, int(seconds * _RANGE_SHARE / each))
            if steps:
                narrow = prove_ranges(system, here, steps=steps, known=narrow)
            rest = prove_positive(
                system, targets[i][~done], narrow, here, seconds=end - time.monotonic()
            )
            margin = min(verdict.margin, rest.margin)
            verdict, done = Verdict(margin=margin, parts=verdict.parts + rest.parts), done | True
        if bool(done.all()) and verdict.margin > 0:
            proofs[index] = verdict
    return proofs


def _differences(labels: Tensor, classes: int) -> Float[Tensor, "batch rivals classes"]:
    """Return the vectors t for which tᵀy is the label's logit less another one."""
    eye = torch.eye(classes, dtype=torch.float64)
    rivals = torch.arange(classes).expand(len(labels), -1)
    rivals = rivals[rivals != labels[:, None]].view(len(labels), classes - 1)
    return eye[labels][:, None] - eye[rivals]


def find_ball_radii(
    system: AffineSystem,
    x: Float[Tensor, "batch ..."],
    labels: Integer[Tensor, " batch"],
    *,
    norm: InputNorm,
    box: tuple[float, float] | None,
    seconds: float,
    bisections: int = 6,
) -> Float[Tensor, " batch"]:
    """Return radii within which no label can change, each proved by `certify_balls`.

    The radius is doubled or halved until a proof is found at r and none at 2r; r and 2r are then
    bisected.

    Args:
        system, x, labels, norm, box: as for `certify_balls`.
        seconds: for each input and each radius that is tried.
        bisections: of the interval between a radius that is proved and one that is not.

    Returns:
        One radius per input, in the unit of raw inputs; 0 where nothing is proved.

    Raises:
        ValueError: as `certify_balls`, or if bisections is negative.
        CertificateError: as `certify_balls`.

    Example:
        y = (σ(x), 0) is positive for x > 0.

        >>> import numpy as np
        >>> import torch
        >>> from lben.radii.relaxation import find_ball_radii
        >>> from lben.weights.activation import RELU
        >>> from lben.weights.affine_system import AffineSystem
        >>> from lben.weights.network import AffineMap, Block, Network
        >>> network = Network(
        ...     input_shape=(1,),
        ...     blocks=(Block(affine=AffineMap.of({0: np.eye(1)}, np.zeros(1)), activation=RELU),),
        ...     output=AffineMap.of({1: np.array([[1.0], [0.0]])}, np.zeros(2)),
        ... )
        >>> system, x = AffineSystem.of_network(network), torch.tensor([[0.7], [0.7]])
        >>> radii = find_ball_radii(
        ...     system, x, torch.tensor([0, 1]), norm="l2", box=None, seconds=0.0, bisections=10
        ... )
        >>> radii.round(decimals=2).tolist()
        [0.7, 0.0]
    """
    if bisections < 0:
        raise ValueError(f"bisections must be at least 0, got {bisections}")

    def proves(index: Tensor, radius: Tensor) -> Tensor:
        found = certify_balls(
            system, x[index], labels[index], radius[index], norm=norm, box=box, seconds=seconds
        )
        return torch.tensor([proof is not None for proof in found], dtype=torch.bool)

    count = len(x)
    radius = torch.full((count,), _FIRST, dtype=torch.float64)
    proved = proves(torch.arange(count), radius)
    grows, moving = proved.clone(), torch.ones(count, dtype=torch.bool)
    while bool(moving.any()):
        radius = torch.where(moving, torch.where(grows, 2 * radius, radius / 2), radius)
        moving &= (radius >= _SMALLEST) & (radius <= _LARGEST)
        index = moving.nonzero()[:, 0]
        if len(index):
            moving[index] = proves(index, radius) == grows[index]
    # Where it grew, the last radius is not proved; where it shrank, it is, or too small.
    low = torch.where(grows, radius / 2, radius)
    low, open_ = torch.where(low < _SMALLEST, 0.0, low), (low >= _SMALLEST).nonzero()[:, 0]
    high = 2 * low
    for _ in range(bisections):
        middle = (low + high) / 2
        found = proves(open_, middle)
        low[open_] = torch.where(found, middle[open_], low[open_])
        high[open_] = torch.where(found, high[open_], middle[open_])
    return low

"""Does the network as it runs keep its label at every image inside its certified radius?

Images x' are put inside the radius of an image x, most of them close to its edge and towards the
next class, and run through the very network that was certified: in its precision, at its tolerance,
alone and in large batches, with one thread and two, in channels-last memory. Beside it stand the
radii that take off the error at x alone, which promise nothing about the network at x'.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from benchmarks.common import trained
from benchmarks.networks import trained_on_digits
from lben.certificates import (
    CertificateError,
    ChainCertificate,
    Claim,
    certify,
    compose,
)
from lben.data import Dataset, load, pixels
from lben.evaluation.attacks import across_the_boundary
from lben.layers.sequential import chain_certificate
from lben.models import Classifier, EquilibriumClassifier, EquilibriumClassifierConfig, Promise
from lben.parameterizations import DirectParameterization
from lben.weights import DenseWeights

SHARES = (0.5, 0.9, 0.99, 0.999, 1 - 1e-6)
"""Of the radius, at which images are put."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """A certified network and images to certify around.

    Attributes:
        name: of the network.
        model: as it runs.
        proof: of the model.
        x: images.
        directions: per image, of l2 norm 1, towards another class.
    """

    name: str
    model: Classifier
    proof: ChainCertificate
    x: Tensor
    directions: Tensor


def running(
    mnist: Dataset,
    quick: bool,
    earlier: Sequence[dict[str, Any]],
    save: Callable[[list[dict[str, Any]]], None],
) -> list[dict[str, Any]]:
    """Count images inside radii where the network as it runs gives another label.

    Args:
        mnist: whose test images are certified.
        quick: fewer networks, tolerances and images.
        earlier: rows of a run that was stopped; their precisions and tolerances are not run again.
        save: is given all rows so far, each time that a precision and tolerance is finished.

    Returns:
        One row per network, precision and tolerance.
    """
    rows = list(earlier)
    finished = {(row["dtype"], row["tol"]) for row in rows}
    boundaries = Boundaries(mnist, quick)
    for dtype, tol in _settings(quick):
        if (str(dtype)[6:], tol) in finished:
            continue
        totals: dict[str, dict[str, int]] = {}
        for case in _cases(boundaries, dtype, tol, quick):
            total = totals.setdefault(case.name, {"images": 0, "wrong": 0, "at x alone": 0})
            images, wrong = _wrong(case, "running")
            total["images"] += images
            total["wrong"] += wrong
            total["at x alone"] += _wrong(case, "exact")[1]
        for name, total in totals.items():
            rows.append({"network": name, "dtype": str(dtype)[6:], "tol": tol, **total})
            print(rows[-1], flush=True)
        save(rows)
    return rows


def _settings(quick: bool) -> list[tuple[torch.dtype, float]]:
    tolerances = (1e-2, 1e-4, 1e-8) if quick else (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-8)
    return [
        (dtype, tol)
        for dtype in (torch.float32, torch.float64)
        for tol in tolerances
        if tol >= 1e-5 or dtype == torch.float64  # float32 does not hold a smaller one
    ]


def promise(mnist: Dataset, quick: bool) -> list[dict[str, Any]]:
    """Return certified % of MNIST at l2 radii 0.5, 1 and 1.5 by what is promised."""
    rows = []
    count = 1000 if quick else 10_000
    x, labels = pixels(mnist.test_images[:count], torch.float64), mnist.test_labels[:count]
    for name in ("1",) if quick else ("0.2", "0.5", "1", "5"):
        for dtype, tol in (
            (torch.float32, 1e-4),
            (torch.float32, 1e-5),
            *((torch.float64, tol) for tol in (1e-4, 1e-6, 1e-8)),
        ):
            model = trained(name).freeze(tol).to(dtype)
            proof = model.certificate(bound="scaled")
            shares: dict[str, list[Tensor]] = {kind: [] for kind in get_args(Promise)}
            for images, their in zip(x.split(2000), labels.split(2000), strict=True):
                found = model.forward_with_error(images.to(dtype), proof)
                for kind in shares:
                    shares[kind].append(found.radius(their, proof, kind))  # type: ignore[arg-type]
            row: dict[str, Any] = {"γ": name, "dtype": str(dtype)[6:], "tol": tol}
            for kind, radii in shares.items():
                held = torch.cat(radii)
                row[kind] = [round(100 * float((held > r).double().mean()), 2) for r in _RADII]
            rows.append(row)
            print(row, flush=True)
    return rows


_RADII = (0.5, 1.0, 1.5)


def _wrong(case: Case, promise: Promise) -> tuple[int, int]:
    """Return how many images were put inside radii, and how many of them break the label."""
    model, x = case.model, case.x
    with torch.no_grad():
        labels = model(x).argmax(1)
        found = model.forward_with_error(x, case.proof)
        radius = found.radius(labels, case.proof, promise)
    stored = (radius > 0).nonzero()[:, 0]
    count = wrong = 0
    for share in SHARES:
        step = (share * radius)[:, None, None, None] * case.directions.double()
        moved = (x.double() + step).to(x.dtype)
        away = (moved.double() - x.double()).flatten(1).norm(dim=1)
        inside = stored[(away < radius * (1 - 1e-14))[stored]]
        if len(inside):
            for predictions in _ways(model, moved[inside], share):
                broken = predictions != labels[inside[: len(predictions)]]
                count, wrong = count + len(predictions), wrong + int(broken.sum())
    return count, wrong


def _ways(model: Classifier, x: Tensor, share: float) -> Iterator[Tensor]:
    """Yield predictions of the same images in every way in which a user may run them."""
    with torch.no_grad():
        threads = torch.get_num_threads()
        for count in (1, 2):
            torch.set_num_threads(count)
            yield model(x).argmax(1)
        torch.set_num_threads(threads)
        yield model(x.to(memory_format=torch.channels_last)).argmax(1)
        if share == SHARES[-1]:
            yield torch.cat([model(one).argmax(1) for one in x[:100].split(1)])


class Boundaries:
    """Trained networks, with test images and images next to the boundary of each.

    They are found once per network: none of it depends on the precision and tolerance of a case.
    """

    def __init__(self, mnist: Dataset, quick: bool) -> None:
        self._mnist, self._quick = mnist, quick
        self._found: dict[str, tuple[Classifier, Tensor, Tensor]] = {}

    def of(self, name: str) -> tuple[Classifier, Tensor, Tensor]:
        """Return a network, images and unit directions towards another class, in float64."""
        if name not in self._found:
            data, _, kind = name.partition(", ")
            if data == "MNIST":
                model: Classifier = trained(kind.removeprefix("γ = "))
                images = self._mnist.test_images
            else:
                model, images = trained_on_digits(kind), load("digits").test_images
            exact = model.to_exact(1e-10)
            count = 100 if self._quick else 400
            x = pixels(images[: 2 * count], torch.float64)
            first, second = x[: len(x) // 2], x[len(x) // 2 :]
            sides = [across_the_boundary(exact, first, second, distance=d)[0] for d in (2e-2, 2e-3)]
            near = torch.cat([first, *sides])
            self._found[name] = model, near, _towards_another_class(exact, near)
        return self._found[name]


def _cases(boundaries: Boundaries, dtype: torch.dtype, tol: float, quick: bool) -> Iterator[Case]:
    """Yield every network in one precision, solved to one tolerance."""
    for name in _QUICK if quick else _NETWORKS:
        model, x, directions = boundaries.of(name)
        own = model.freeze(tol if model.tol is not None else None).to(dtype)
        proof = own.certificate(bound="scaled" if "scaled" in own.bounds else "promised")
        if math.isfinite(proof.bound):
            yield Case(name=name, model=own, proof=proof, x=x.to(dtype), directions=directions)
    for rho in (0.9, 0.99) if quick else _RHOS:
        yield from slow(dtype, tol, rho)


_NETWORKS = (
    "MNIST, γ = 0.2",
    "MNIST, γ = 0.5",
    "MNIST, γ = 1",
    "MNIST, γ = 5",
    "digits, γ = 2, tanh",
    "digits, γ = 1, leaky_relu",
    "digits, γ = 10, relu",
    "digits, feed-through",
    "digits, convolution, γ = 1",
    "digits, sll",
    "digits, sll, equilibrium core",
)
_QUICK = ("MNIST, γ = 1", "digits, γ = 2, tanh")
_RHOS = (
    0.7,
    0.8,
    0.85,
    0.9,
    0.93,
    0.95,
    0.97,
    0.98,
    0.985,
    0.99,
    0.993,
    0.995,
    0.997,
    0.998,
    0.999,
)


def _towards_another_class(model: Classifier, x: Tensor) -> Tensor:
    """Return unit directions in which the margin falls fastest."""
    x = x.clone().requires_grad_()
    top = model(x).topk(2, dim=1).values
    (gradient,) = torch.autograd.grad((top[:, 1] - top[:, 0]).sum(), x)
    norm = gradient.flatten(1).norm(dim=1).clamp_min(1e-300)
    return gradient / norm[:, None, None, None]


def slow(dtype: torch.dtype, tol: float, rho: float, large: float = 0.0) -> Iterator[Case]:
    """Yield networks of one pixel whose state is slow to converge where the output does not look.

    Unit 0 is read out; units 1 and 2 see no input and make m small; units 3 and 4 are large and
    solved at once, so that the residual of unit 0 weighs little.
    """
    W = torch.zeros(5, 5, dtype=torch.float64)
    W[1, 2] = W[2, 1] = rho
    W[3, 4] = W[4, 3] = 1 - math.sqrt((1 - rho) * (1 + rho))
    U = torch.tensor([[1.0], [0.0], [0.0], [large], [large]], dtype=torch.float64)
    C = torch.zeros(2, 5, dtype=torch.float64)
    C[0, 0], C[1, 0] = -0.5, 0.5
    weights = DenseWeights(
        W=W, U=U, b=torch.zeros(5, dtype=torch.float64), C=C, D=None,
        b_y=torch.tensor([0.25, -0.25], dtype=torch.float64),
        Lambda=torch.ones(5, dtype=torch.float64), gamma=None,
    )  # fmt: skip
    model = EquilibriumClassifierConfig(
        shape=(1, 1, 1), classes=2, mean=(0.0,), std=(1.0,), hidden=5, gamma=None,
        learn_metric=False, tol=tol,
    ).build().double()  # fmt: skip
    parameterization = model.layer.parameterization
    assert isinstance(parameterization, DirectParameterization)
    parameterization.right_inverse(weights)
    model = model.to(dtype).eval().requires_grad_(False)
    proof = _by_its_own_multiplier(model)
    if proof is None:
        return
    # Small inputs too: the label is that of the boundary at ½ seen from far and from near.
    x = torch.linspace(0, 0.4999, 40, dtype=dtype).view(-1, 1, 1, 1)
    yield Case(name="slow state", model=model, proof=proof, x=x, directions=torch.ones_like(x))


def _by_its_own_multiplier(model: EquilibriumClassifier) -> ChainCertificate | None:
    """Prove the bound 1 of the difference of logits, by little weight on the units not read out."""
    weights = model.layer.weights()
    Lambda = torch.tensor([1.0, 1e-9, 1e-9, 1e-9, 1e-9], dtype=torch.float64)
    for slack in (1e-7, 1e-6, 1e-5, 1e-4, 1e-3):
        try:
            pairs = certify(weights, {(0, 1): Claim(1.0 + slack, Lambda)})
            whole = certify(weights, Claim(2.0, Lambda))
        except CertificateError:
            continue
        before = chain_certificate(model.stages[:-1], model.shape).layers
        return compose([*before, whole], pairs)
    return None

"""What is proved of the monDEQs of SemiMonDEQ and CRAFT, globally and around images?

Global bounds are in l2, of all ten logits on the normalised input, as SemiMonDEQ states its figure.
Balls and boxes are of pixels. An attack tells how many images could be certified at most.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import mnist_of
from benchmarks.lipschitz.images import BOX
from lben import (
    EquilibriumClassifier,
    EquilibriumLinear,
    certify,
    load_checkpoint,
    tighten_diagonal,
)
from lben.certificates.relaxation import InputNorm
from lben.data import pixels
from lben.evaluation.attacks import ascend_quotient, pgd_l2, pgd_linf
from lben.interop import RadiusCertifier
from lben.radii.relaxation import certify_balls

PUBLISHED = {
    "mondeq_87": {"bound": 4.67},
    "mondeq_40": {"linf_0.05": "about a third of the first 37"},
}
SECONDS = 5.0
RADII: tuple[tuple[InputNorm, float], ...] = (
    ("l2", 0.1), ("linf", 0.01), ("linf", 0.05), ("linf", 0.1),
)  # fmt: skip


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Bound both networks and certify images, and print a line for each radius."""
    if not arguments.networks.is_dir():
        sys.exit(f"benchmarks.lipschitz: there is no folder {arguments.networks}: see --networks")
    _, data = mnist_of(arguments.root, "lipschitz")
    count = 10 if arguments.quick else arguments.count
    x, labels = pixels(data.test_images[:count], torch.float64), data.test_labels[:count]
    figures: dict[str, Any] = {}
    for name in PUBLISHED:
        model = load_checkpoint(arguments.networks / f"{name}.safetensors")
        assert isinstance(model, EquilibriumClassifier)
        figures[name] = found = {"published": PUBLISHED[name], **_bound(model, x)}
        print(
            f"{name}: joint bound {found['bound']:.4f} (gap {found['gap']:.0e}) in "
            f"{found['seconds']:.2f} s, found {found['quotient']:.4f}; published "
            f"{found['published']}",
            flush=True,
        )
        certifier = RadiusCertifier.of(model, (1, 28, 28))
        found["rows"] = rows = []
        for norm, radius in RADII[:2] if arguments.quick else RADII:
            rows.append(_certify(certifier, model, x, labels, norm, radius))
            print(f"  {rows[-1]}", flush=True)
    return figures


def _bound(model: EquilibriumClassifier, x: Tensor) -> dict[str, Any]:
    """Return the joint bound of the layer on normalised inputs, and the best quotient found."""
    layer = model.layer
    assert isinstance(layer, EquilibriumLinear)
    weights, start = layer.weights(), time.perf_counter()
    claim = tighten_diagonal(weights, gap=1e-7)
    bound = certify(weights, claim).bound
    seconds = time.perf_counter() - start
    inputs = ((x - 0.1307) / 0.3081).flatten(1)
    precise = EquilibriumLinear.from_weights(weights.to(torch.float64), tol=1e-10)
    found = ascend_quotient(precise, inputs, generator=torch.Generator().manual_seed(0))
    return {
        "bound": bound, "gap": claim.gap, "seconds": seconds,
        "quotient": float(found.quotient.max()),
    }  # fmt: skip


def _certify(
    certifier: RadiusCertifier,
    model: EquilibriumClassifier,
    x: Tensor,
    labels: Tensor,
    norm: InputNorm,
    radius: float,
) -> dict[str, Any]:
    """Return how many images are certified at a radius, seconds per image, and what is left."""
    assert certifier.system is not None
    row: dict[str, Any] = {"norm": norm, "radius": radius, "count": len(x)}
    for rung, seconds in (("relaxation", 0.0), ("ladder", SECONDS)):
        start = time.perf_counter()
        proofs = certify_balls(
            certifier.system, x, labels, radius, norm=norm, box=BOX, seconds=seconds
        )
        row[rung] = sum(proof is not None for proof in proofs)
        row[f"{rung}_seconds"] = (time.perf_counter() - start) / len(x)
    attack = pgd_l2 if norm == "l2" else pgd_linf
    generator = torch.Generator().manual_seed(0)
    _, broken = attack(model, x.float(), labels, radius, steps=40, restarts=3, generator=generator)
    row["attack"] = int((~broken).sum())
    return row

"""How many images are certified of ordinary networks trained here, and what would be possible?

For each radius, from below: the global bounds of the pairs of outputs; linear relaxation (CROWN)
without and with the box of pixels; the whole ladder, with some seconds for each image. From above:
the images that an attack leaves. The gap that matters is between CROWN with the box and the attack.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import mnist_of
from benchmarks.lipschitz.peers import certify_by_eclipse, measure_margins
from benchmarks.lipschitz.training import SHAPE, accuracy, build_convolutional, build_dense, train
from lben import ConvertedNetwork, certify, from_torch, margin_radius, tighten_network_pairs
from lben.certificates.relaxation import InputNorm
from lben.data import pixels
from lben.evaluation.attacks import pgd_l2, pgd_linf
from lben.radii.relaxation import certify_balls
from lben.weights.affine_system import AffineSystem
from lben.weights.network import Network

SECONDS = 2.0
BOX = (0.0, 1.0)
RADII: dict[InputNorm, tuple[float, ...]] = {
    "l2": (0.1, 0.2, 0.3, 0.4, 0.5),
    "linf": (1 / 255, 2 / 255, 4 / 255, 8 / 255),
}
_QUICK: dict[InputNorm, tuple[float, ...]] = {"l2": (0.1, 0.4), "linf": (4 / 255,)}
MODELS: dict[str, Callable[[], nn.Sequential]] = {
    "784-128-128-10": build_dense,
    "convolutional": build_convolutional,
}
_ECLIPSE = 10
"""Images on which eclipse-nn is measured: it takes about a second for each."""


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train the networks, certify images, and print a line for each radius."""
    _, data = mnist_of(arguments.root, "lipschitz")
    count = 10 if arguments.quick else arguments.count
    x, labels = pixels(data.test_images[:count], torch.float32), data.test_labels[:count]
    figures: dict[str, Any] = {}
    for name, build in MODELS.items():
        if arguments.only and name not in arguments.only:
            continue
        torch.manual_seed(0)
        model = train(build(), data, epochs=1 if arguments.quick else 5, seed=0)
        network = from_torch(model, SHAPE)
        test = accuracy(model, pixels(data.test_images, torch.float32), data.test_labels)
        print(f"{name}: accuracy {test:.4f}", flush=True)
        figures[name] = {"accuracy": test, **_bound_globally(network, x, labels)}
        radii = figures[name].pop("radii")
        figures[name]["rows"] = rows = []
        for norm, sizes in (_QUICK if arguments.quick else RADII).items():
            for radius in sizes:
                row = measure(network, model, x, labels, norm, radius)
                if norm == "l2":
                    row["global"] = int((radii >= radius).sum())
                    if name in ("784-128-128-10",):
                        some = slice(_ECLIPSE)
                        margins = measure_margins(model, x[some], labels[some])
                        row["eclipse_nn"] = certify_by_eclipse(model, x[some], margins, radius)
                rows.append(row)
                print(describe(row), flush=True)
    return figures


def _bound_globally(network: Network, x: Tensor, labels: Tensor) -> dict[str, Any]:
    """Return the global radii of the images, and the time of the bounds of all pairs."""
    start = time.perf_counter()
    pairs = certify(network, tighten_network_pairs(network))
    seconds = time.perf_counter() - start
    layer = ConvertedNetwork(network)
    found = layer.forward_with_error(x.double(), layer.certificate())
    radii = margin_radius(found.value, labels, pairs, logit_error=found.error)
    return {"seconds_of_pairs": seconds, "radii": radii}


def measure(
    network: Network, model: nn.Module, x: Tensor, labels: Tensor, norm: InputNorm, radius: float
) -> dict[str, Any]:
    """Return how many images each rung certifies at one radius, and the seconds per image."""
    system = AffineSystem.of_network(network)
    row: dict[str, Any] = {"norm": norm, "radius": radius, "count": len(x)}
    rungs: dict[str, tuple[tuple[float, float] | None, float]] = {
        "crown": (None, 0.0), "crown_box": (BOX, 0.0), "ladder": (BOX, SECONDS),
    }  # fmt: skip
    for rung, (box, seconds) in rungs.items():
        start = time.perf_counter()
        proofs = certify_balls(system, x, labels, radius, norm=norm, box=box, seconds=seconds)
        row[rung] = sum(proof is not None for proof in proofs)
        row[f"{rung}_seconds"] = (time.perf_counter() - start) / len(x)
    attack = pgd_l2 if norm == "l2" else pgd_linf
    generator = torch.Generator().manual_seed(0)
    _, broken = attack(model, x, labels, radius, steps=50, restarts=5, generator=generator)
    row["attack"] = int((~broken).sum())
    row["gap_closed"] = None
    if row["attack"] > row["crown_box"]:
        row["gap_closed"] = (row["ladder"] - row["crown_box"]) / (row["attack"] - row["crown_box"])
    return row


def describe(row: dict[str, Any]) -> str:
    """Return a line of a table."""
    size = f"{row['radius']:.2f}" if row["norm"] == "l2" else f"{row['radius'] * 255:.0f}/255"
    closed = "–" if row["gap_closed"] is None else f"{row['gap_closed']:.0%}"
    return (
        f"  {row['norm']:4} {size:>6}: global {row.get('global', '–')}, CROWN {row['crown']} "
        f"({row['crown_seconds']:.3f} s), with the box {row['crown_box']} "
        f"({row['crown_box_seconds']:.3f} s), ladder {row['ladder']} "
        f"({row['ladder_seconds']:.2f} s), attack {row['attack']} of {row['count']}; "
        f"gap closed {closed}; eclipse-nn {row.get('eclipse_nn', '–')}"
    )

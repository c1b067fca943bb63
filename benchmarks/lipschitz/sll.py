"""What do local proofs add to the global radii of SLL networks?

A dense SLL network of MNIST is trained here. Its global radii come from the proved bound of its
last layer's pairs; local proofs relax its units around each image.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from typing import Any

import torch

from benchmarks.common import mnist_of
from benchmarks.lipschitz.images import BOX
from lben.data import pixels
from lben.evaluation.attacks import pgd_l2
from lben.interop import RadiusCertifier
from lben.models import FeedforwardArchitecture
from lben.radii.relaxation import certify_balls
from lben.training import TrainingConfig, train

RADII = (0.25, 0.5, 0.75, 1.0, 1.5)
SECONDS = 2.0
ARCHITECTURE = FeedforwardArchitecture(
    block="sll", channels=(1,), depths=(0,), pool=1, dense_depth=3, dense_hidden=64
)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train the network, certify images, and print a line for each radius."""
    _, data = mnist_of(arguments.root, "lipschitz")
    count = 10 if arguments.quick else arguments.count
    x, labels = pixels(data.test_images[:count], torch.float32), data.test_labels[:count]
    with tempfile.TemporaryDirectory() as folder:
        config = TrainingConfig(
            model=ARCHITECTURE, epochs=1 if arguments.quick else 5, out=f"{folder}/sll", seed=0
        )
        model = train(config, data)
    certifier = RadiusCertifier.of(model, (1, 28, 28))
    assert certifier.system is not None
    radii = certifier.prove_globally(x, labels, "l2")
    with torch.no_grad():
        clean = int((model(x).argmax(1) == labels).sum())
    print(f"SLL: {clean} of {count} correct, bound {certifier.certificate.bound:.4f}", flush=True)
    rows = []
    for radius in RADII[:2] if arguments.quick else RADII:
        row: dict[str, Any] = {"radius": radius, "global": int((radii >= radius).sum())}
        for rung, seconds in (("relaxation", 0.0), ("ladder", SECONDS)):
            start = time.perf_counter()
            proofs = certify_balls(
                certifier.system, x, labels, radius, norm="l2", box=BOX, seconds=seconds
            )
            either = torch.tensor([proof is not None for proof in proofs]) | (radii >= radius)
            row[rung] = int(either.sum())
            row[f"{rung}_seconds"] = (time.perf_counter() - start) / count
        generator = torch.Generator().manual_seed(0)
        _, broken = pgd_l2(model, x, labels, radius, steps=40, restarts=3, generator=generator)
        row["attack"] = int((~broken).sum())
        rows.append(row)
        print(f"  {row}", flush=True)
    return {"clean": clean, "count": count, "bound": certifier.certificate.bound, "rows": rows}

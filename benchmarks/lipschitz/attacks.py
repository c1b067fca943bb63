"""Does any attacked pair or image violate what is proved of networks from elsewhere?

Pairs are random, at corners where rounding hurts, and from ascent; a quotient above the proved
bound is a violation. Images are attacked inside balls that are proved; a changed label is one.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import mnist_of
from benchmarks.lipschitz.images import BOX
from benchmarks.lipschitz.training import SHAPE, build_convolutional, build_dense, build_wide, train
from lben import ConvertedNetwork, certified_radius, from_torch, load_checkpoint
from lben.certificates.relaxation import InputNorm
from lben.data import Dataset, pixels
from lben.evaluation.attacks import (
    corner_pairs,
    pgd_l2,
    pgd_linf,
    quotients,
    random_pairs,
)
from lben.weights.network import Network

PAIRS, IMAGES = 100_000, 100
_ROUNDING = 1e-9
"""Relative error of a quotient in float64 that is no violation."""


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Attack all networks, and print a line for each."""
    _, data = mnist_of(arguments.root, "lipschitz")
    figures = {}
    for name, network, images in _networks(arguments, data):
        figures[name] = found = _attack_pairs(network, images, 1000 if arguments.quick else PAIRS)
        print(f"{name}: {found}", flush=True)
    x, labels = pixels(data.test_images[:IMAGES], torch.float32), data.test_labels[:IMAGES]
    for build in (build_dense, build_convolutional):
        model = _train(build(), data, arguments.quick)
        for norm in ("l2", "linf"):
            figures[f"{build.__name__}, {norm}"] = found = _attack_images(
                model, x[:10] if arguments.quick else x, labels, norm
            )
            print(f"{build.__name__}, {norm}: {found}", flush=True)
    return figures


def _train(model: nn.Sequential, data: Dataset, quick: bool) -> nn.Sequential:
    return train(model, data, epochs=1 if quick else 3, seed=0)


def _networks(
    arguments: argparse.Namespace, data: Dataset
) -> Iterator[tuple[str, Network, Tensor]]:
    """Yield networks with a bound, and inputs to start from."""
    generator = torch.Generator().manual_seed(0)
    images = pixels(data.test_images[:500], torch.float64)
    for build in (build_wide, build_dense, build_convolutional):
        yield build.__name__, from_torch(_train(build(), data, arguments.quick), SHAPE), images
    for path in sorted(arguments.networks.glob("*.safetensors")):
        if path.stem.startswith(("digits_fnn", "digits_cnn2", "chain_4x", "chain_16x16")):
            network = load_checkpoint(path, "glipsdp")
            assert isinstance(network, Network)
            shape = (500, *network.input_shape)
            yield path.stem, network, torch.randn(shape, generator=generator, dtype=torch.float64)


def _attack_pairs(network: Network, x: Tensor, count: int) -> dict[str, Any]:
    """Return the largest quotient over the bound, and how many are above 1."""
    model = ConvertedNetwork(network)
    bound = model.certificate().bound
    generator = torch.Generator().manual_seed(1)
    largest, violations, pairs = 0.0, 0, 0
    for a, b in (*random_pairs(x, count, generator), *corner_pairs(x, generator)):
        found = quotients(model, a, b)
        resolved = torch.linalg.vector_norm((a - b).flatten(1), dim=1) > _ROUNDING * (
            1 + a.flatten(1).norm(dim=1)
        )  # nearer pairs tell of rounding alone
        found = found[resolved & found.isfinite()]
        largest = max(largest, float(found.max()) if len(found) else 0.0)
        violations += int((found > bound * (1 + 1e-6)).sum())
        pairs += len(found)
    return {"pairs": pairs, "violations": violations, "largest": largest / bound}


def _attack_images(
    model: nn.Sequential, x: Tensor, labels: Tensor, norm: InputNorm
) -> dict[str, Any]:
    """Return how many images have a proved radius, and how many labels change within."""
    labels = labels[: len(x)]
    radii = certified_radius(model, x, labels, norm=norm, box=BOX, seconds=1.0)
    attack = pgd_l2 if norm == "l2" else pgd_linf
    precise, changed = model.double(), 0
    for image, label, radius in zip(x.double(), labels, radii.tolist(), strict=True):
        if radius > 0:
            own = math.nextafter(radius, 0.0)
            generator = torch.Generator().manual_seed(2)
            _, broken = attack(
                precise, image[None], label[None], own, steps=40, restarts=5, generator=generator
            )
            changed += int(broken)
    model.float()
    return {"images": int((radii > 0).sum()), "violations": changed}

"""How long does the LipSDP bound of a 784–256–10 network take, with its proof?"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import torch

from benchmarks.common import mnist_of
from benchmarks.lipschitz.peers import bound_by_eclipse
from benchmarks.lipschitz.quotients import find_quotient
from benchmarks.lipschitz.training import SHAPE, accuracy, build_wide, train
from lben import certify, from_torch, tighten_network
from lben.data import pixels
from lben.tightening.recursion import propose_network_claim

_GAP = 1e-6
_ROUNDS = 7


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train the network, and bound it several times."""
    _, data = mnist_of(arguments.root, "lipschitz")
    model = train(build_wide(), data, epochs=1 if arguments.quick else 5, seed=0)
    network = from_torch(model, SHAPE)
    seconds = []
    for _ in range(3 if arguments.quick else _ROUNDS):
        start = time.perf_counter()
        claim = tighten_network(network, gap=_GAP)
        certificate = certify(network, claim)
        seconds.append(time.perf_counter() - start)
    start = time.perf_counter()
    cheap = certify(network, propose_network_claim(network)).bound
    recursion = time.perf_counter() - start
    norms = [float(np.linalg.norm(m.weight.detach().double().numpy(), 2))
             for m in model if isinstance(m, torch.nn.Linear)]  # fmt: skip
    figures = {
        "accuracy": accuracy(model, pixels(data.test_images, torch.float32), data.test_labels),
        "bound": certificate.bound, "gap": claim.gap, "steps": claim.steps,
        "seconds": float(np.median(seconds)), "all_seconds": seconds,
        "recursion": {"bound": cheap, "seconds": recursion},
        "product_of_norms": float(np.prod(norms)),
        "quotient": find_quotient(network, None),
        "eclipse_nn": bound_by_eclipse(model),
    }  # fmt: skip
    print(
        f"γ = {certificate.bound:.6f} (gap {claim.gap:.0e}, {claim.steps} steps) in "
        f"{figures['seconds']:.2f} s; recursion {cheap:.4f} in {recursion:.2f} s; product of norms "
        f"{figures['product_of_norms']:.4f}; found {figures['quotient']:.4f}; eclipse-nn "
        f"{figures['eclipse_nn']}"
    )
    return figures

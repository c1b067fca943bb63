"""How tight are the global bounds of the networks that GLipSDP published, and in what time?

The digits' figures bound one logit, row 7, on standardised inputs. The chains' bound all outputs.
Every bound is proved; its gap is the estimate of the primal–dual method. The largest quotient that
ascent finds is a lower bound of the true constant.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.lipschitz.quotients import find_quotient
from lben.certificates.network import prove_network
from lben.interop import load_checkpoint
from lben.rigorous import Array
from lben.tightening.network import tighten_network
from lben.tightening.recursion import propose_network_claim
from lben.weights.network import Network

ROW = np.eye(10)[7:8]
QUICK = ("digits_fnn2_0", "digits_fnn3_0", "chain_16x16", "chain_64x16")
GAP = 1e-7
PROVED = ("Lip_LipSDP", "Lip_GLipSDP", "L_LipSDP_mat", "L_GLipSDP_mat", "L_GLipSDP_2_mat")
"""The published figures that are meant as upper bounds of the same program."""


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Bound all networks of the folder, and print a line for each."""
    if not arguments.networks.is_dir():
        sys.exit(f"benchmarks.lipschitz: there is no folder {arguments.networks}: see --networks")
    published = json.loads((arguments.networks / "published.json").read_text())
    figures = {}
    for name, network, rows in _load(arguments):
        figures[name] = found = _measure(network, rows)
        known = published.get(name.removesuffix("_published_order"), {})
        found["published"] = known
        best = min((v for k, v in known.items() if k in PROVED), default=None)
        found["to_published"] = None if best is None else found["bound"] / best
        print(
            f"{name:28} γ = {found['bound']:.9g}, gap {found['gap']:.0e}, {found['steps']} steps, "
            f"{found['seconds']:.2f} s, ÷ found {found['to_found']:.4f}, ÷ best published "
            + ("–" if best is None else f"{found['to_published']:.7f}"),
            flush=True,
        )
    return figures


def _load(arguments: argparse.Namespace) -> Iterator[tuple[str, Network, Array | None]]:
    """Yield name, network and rows; convolutional networks twice, in either flattening order."""
    chosen = arguments.only or (QUICK if arguments.quick else None)
    for path in sorted(arguments.networks.glob("*.safetensors")):
        name = path.stem
        if not name.startswith(("digits", "chain")) or (chosen and name not in chosen):
            continue
        rows = ROW if name.startswith("digits") else None
        yield name, _read(path), rows
        if "cnn" in name:
            yield f"{name}_published_order", _read(path, flatten_order="channels_last"), rows


def _read(path: Path, **options: Any) -> Network:
    network = load_checkpoint(path, "glipsdp", **options)
    assert isinstance(network, Network)
    return network


def _measure(network: Network, rows: Array | None) -> dict[str, Any]:
    """Return bounds, gaps and times of one network."""
    start = time.perf_counter()
    cheap = prove_network(network, propose_network_claim(network, rows), rows).bound
    middle = time.perf_counter()
    claim = tighten_network(network, rows, gap=GAP)
    proposed = time.perf_counter()
    certificate = prove_network(network, claim, rows)
    end = time.perf_counter()
    quotient = find_quotient(network, rows)
    return {
        "bound": certificate.bound,
        "margin": certificate.margin,
        "gap": claim.gap,
        "steps": claim.steps,
        "seconds": end - middle,
        "seconds_of_proof": end - proposed,
        "recursion": {"bound": cheap, "seconds": middle - start},
        "quotient": quotient,
        "to_found": certificate.bound / quotient,
    }

"""How long does the processor take for a solve on a GPU? Microseconds per call, without a GPU.

    python -m benchmarks.gpu_host [--out FILE]

Launches specialise their arguments as on a device and end there (`benchmarks.fake_driver`); the
tensors lie in the memory of the processor, and PyTorch's own operations run on 16 samples of them.
So a call takes what Python, Triton's launcher and PyTorch's dispatcher take; what CUDA's runtime
adds to a launch is not in it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget

from benchmarks.common import finish
from benchmarks.fake_driver import pretended
from benchmarks.gpu_cases import on_the_device
from lben import EquilibriumLinear
from solvers import DenseOperator, Inclusion, PeacemanRachford, ReLU, equilibrium, solve

SAMPLES, ROUNDS, CALLS = 16, 31, 50


def calls(n: int) -> dict[str, Callable[[], Any]]:
    """Return a solve, a solve with its gradient, and those of a layer, for n units."""
    generator = torch.Generator().manual_seed(0)
    W = 0.2 * torch.randn(n, n, generator=generator) / n**0.5
    operator = DenseOperator(W)
    v = torch.randn(SAMPLES, n, generator=generator)
    leaf = v.clone().requires_grad_()
    method = PeacemanRachford(step_size=1.0)
    layer = EquilibriumLinear(n, n, 10, gamma=1.0, method=method).requires_grad_(False)

    def both() -> None:
        z = equilibrium(Inclusion(operator, leaf, ReLU()), method, tol=1e-4).value
        torch.autograd.grad(z.sum(), leaf)

    return {
        "solve": lambda: solve(Inclusion(operator, v, ReLU()), method, tol=1e-4),
        "forward and backward": both,
        "layer": lambda: layer(v),
    }


def microseconds(call: Callable[[], Any]) -> float:
    """Return the median time of a call."""
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        times.append((time.perf_counter() - start) / CALLS)
    return round(1e6 * statistics.median(times), 1)


def _capability(device: object) -> tuple[int, int]:
    return 9, 0


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser(description="host time of solves on a GPU, without one")
    options.add_argument("--out", type=Path, help="also write the JSON object to this file")
    out = options.parse_args().out
    torch.set_num_threads(1)
    figures = {}
    with (
        pretended(GPUTarget("cuda", 90, 32), lambda asked: None), on_the_device(),
        mock.patch.object(torch.cuda, "get_device_capability", _capability),
    ):  # fmt: skip
        for name, call in calls(80).items():
            figures[name] = microseconds(call)
    finish({"microseconds": figures}, out, samples=SAMPLES, rounds=ROUNDS)


if __name__ == "__main__":
    main()

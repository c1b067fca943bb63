"""How long does the processor take for a solve on a GPU? Counted in additions, without a GPU.

    python -m benchmarks.gpu_host [--out FILE]

Launches specialise their arguments as on a device and end there (`benchmarks.fake_driver`); the
tensors lie in the memory of the processor, and PyTorch's own operations run on 16 samples of them.
So a call takes what Python, Triton's launcher and PyTorch's dispatcher take; what CUDA's runtime
adds to a launch is not in it. Machines differ, so it is divided by the time of one addition of
tensors of that size, in turns in one run.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget

from benchmarks.common import finish, interleaved, ratio
from benchmarks.fake_driver import pretended
from benchmarks.gpu_cases import on_the_device
from lben import EquilibriumLinear
from solvers import DenseOperator, Inclusion, PeacemanRachford, ReLU, equilibrium, solve

SAMPLES, ROUNDS, CALLS = 16, 31, 50


def calls(n: int) -> dict[str, Callable[[], Any]]:
    """Return an addition, a solve, a solve with its gradient, and a layer, for n units."""
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
        "addition": lambda: v + v,
        "solve": lambda: solve(Inclusion(operator, v, ReLU()), method, tol=1e-4),
        "forward and backward": both,
        "layer": lambda: layer(v),
    }


def _many(call: Callable[[], Any]) -> Callable[[], None]:
    def repeat() -> None:
        for _ in range(CALLS):
            call()

    return repeat


def _capability(device: object) -> tuple[int, int]:
    return 9, 0


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser(description="host time of solves on a GPU, without one")
    options.add_argument("--out", type=Path, help="also write the JSON object to this file")
    out = options.parse_args().out
    torch.set_num_threads(1)
    with (
        pretended(GPUTarget("cuda", 90, 32), lambda asked: None), on_the_device(),
        mock.patch.object(torch.cuda, "get_device_capability", _capability),
    ):  # fmt: skip
        timed = calls(80)
        seconds = interleaved({name: _many(call) for name, call in timed.items()}, ROUNDS)
    of = {name: 1e6 * statistics.median(times) / CALLS for name, times in seconds.items()}
    finish(
        {
            "additions": {n: round(ratio(seconds, n, "addition"), 1) for n in of},
            "microseconds": {n: round(t, 1) for n, t in of.items()},
        },
        out, samples=SAMPLES, rounds=ROUNDS,
    )  # fmt: skip


if __name__ == "__main__":
    main()

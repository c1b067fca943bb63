"""How fast is a convolutional equilibrium, against the published loop and torchdeq?

    python -m benchmarks.conv [--quick] [--out FILE]

One circular layer of 81 channels on 32 × 32 pixels, batch 32, m = 1 (`--quick`: one tolerance), V
and N of norm 1, float32, all in one run and interleaved:

- forward with new weights (factorization included), forward with kept factors, backward;
- the published Peaceman–Rachford loop, written from its equations: all frequencies of a complex
  transform, complex numbers as 2 × 2 blocks, factors at every forward call; at the best step size
  of its search and stopped by an oracle;
- the same loop with torch's complex products and kept factors ("modern"), for comparison;
- torchdeq's Anderson and fixed-point iteration at the best step size of a grid, with W as a direct
  convolution, as its users write it;
- the floor: the transforms and the product of spectra that one step of Peaceman–Rachford needs,
  times the steps.

`violations` counts states whose error exceeds the returned bound, and pairs of inputs of a layer
with γ = 1, 10⁴ of them attacked, whose outputs are further apart than γ allows.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.case import quietly
from benchmarks.common import finish, interleaved, parser, ratio
from benchmarks.published import Inverse, search
from lben.evaluation.attacks import ascend_quotient
from lben.layers import PooledEquilibriumConv2d
from lben.parameterizations import ConvolutionalParameterization
from solvers import (
    ConvolutionOperator,
    Inclusion,
    LinearSlope,
    PeacemanRachford,
    ReLU,
    solve,
)
from solvers.native import spectral
from solvers.torchdeq import TorchDEQ

SEED = 0
CHANNELS, SIZE, BATCH = 81, (32, 32), 32
STEPS = (1.0, 0.5, 0.25, 0.1)
SOLVERS: tuple[Literal["anderson", "fixed_point_iter"], ...] = ("anderson", "fixed_point_iter")
MODERN = "modern"


@dataclass(frozen=True)
class PublishedInverse(Inverse):
    """((1 + α)I − αW)⁻¹ as the published code applies it.

    All frequencies of a complex transform, and a complex number a + ib as the real block
    [a −b; b a], from before torch could multiply complex matrices.
    """

    blocks: Tensor

    @staticmethod
    def of(kernel: Tensor, alpha: float) -> PublishedInverse:
        """Transform the kernel and invert one 2c × 2c matrix per frequency."""
        W = _blocks(_full_symbols(kernel))
        identity = torch.eye(W.shape[-1], dtype=W.dtype)
        return PublishedInverse(torch.inverse((1 + alpha) * identity - alpha * W))

    def apply(self, x: Tensor) -> Tensor:
        return self._product(x, self.blocks.mT)

    def adjoint(self, x: Tensor) -> Tensor:
        return self._product(x, self.blocks)

    @staticmethod
    def _product(x: Tensor, blocks: Tensor) -> Tensor:
        images = x.reshape(len(x), -1, *SIZE)
        spectrum = torch.view_as_real(torch.fft.fft2(images))
        rows = spectrum.permute(2, 3, 0, 4, 1).reshape(len(blocks), len(x), -1)
        product = (rows @ blocks).reshape(*SIZE, len(x), 2, -1).permute(2, 4, 0, 1, 3)
        return torch.fft.ifft2(torch.view_as_complex(product.contiguous())).real.reshape(x.shape)


@dataclass(frozen=True)
class ComplexInverse(Inverse):
    """The same with complex products."""

    symbols: Tensor

    @staticmethod
    def of(kernel: Tensor, alpha: float) -> ComplexInverse:
        """Invert one c × c matrix per frequency."""
        identity = torch.eye(len(kernel))
        return ComplexInverse(torch.inverse((1 + alpha) * identity - alpha * _full_symbols(kernel)))

    def apply(self, x: Tensor) -> Tensor:
        return self._product(self.symbols, x)

    def adjoint(self, x: Tensor) -> Tensor:
        return self._product(self.symbols.mH, x)

    @staticmethod
    def _product(symbols: Tensor, x: Tensor) -> Tensor:
        c = symbols.shape[-1]
        spectrum = torch.fft.fft2(x.reshape(-1, c, *SIZE))
        product = symbols @ spectrum.flatten(2).permute(2, 1, 0)
        images = product.permute(2, 1, 0).reshape(-1, c, *SIZE)
        return torch.fft.ifft2(images).real.reshape(x.shape)


def _full_symbols(kernel: Tensor) -> Tensor:
    k = kernel.shape[-1]
    full = torch.nn.functional.pad(kernel, (0, SIZE[1] - k, 0, SIZE[0] - k))
    full = full.roll((-(k // 2), -(k // 2)), (2, 3))
    return torch.fft.fft2(full).conj().resolve_conj().flatten(2).permute(2, 0, 1)


def _blocks(symbols: Tensor) -> Tensor:
    a, b = symbols.real, symbols.imag
    return torch.cat([torch.cat([a, -b], 2), torch.cat([b, a], 2)], 1)


@dataclass(frozen=True, eq=False)
class DirectOperator(ConvolutionOperator):
    """The same W with products as a user of torchdeq writes them, by torch's convolution."""

    @property
    def _is_direct(self) -> bool:
        return True


def problem() -> Inclusion:
    """Return the layer at m = 1, W drawn from the seed, and a bias as of normalised images."""
    torch.manual_seed(SEED)
    free = ConvolutionalParameterization(
        3, CHANNELS, None, gamma=None, learn_metric=False, epsilon=1.0, circular=True
    )
    with torch.no_grad():
        for kernel in (free.V, free.N):
            kernel.div_(0.3)
        weights = free()
    assert weights.W is not None
    operator = ConvolutionOperator(weights.W.detach(), SIZE, weights.Lambda)
    bias = torch.randn(BATCH, operator.n)
    return Inclusion(operator, bias, ReLU())


def fresh(forward: Inclusion) -> Inclusion:
    """Return the same problem without any factor."""
    operator = forward.operator
    assert isinstance(operator, ConvolutionOperator)
    again = ConvolutionOperator(operator.kernel, operator.image, operator.channel_metric)
    return Inclusion(again, forward.bias, forward.activation)


def measure(forward: Inclusion, tol: float, rounds: int) -> dict[str, Any]:
    """Time all who take part at one tolerance."""
    method = PeacemanRachford()
    kernel, limit = forward.operator.tensors[0], 500
    solution = solve(forward, method, tol=tol, on_failure="raise")
    cotangent = torch.randn(forward.bias.shape, generator=torch.Generator().manual_seed(1))
    slope = LinearSlope(forward.activation.slope(solution.value))
    adjoint = Inclusion(forward.operator.T, cotangent, slope)
    back = solve(adjoint, method, tol=tol, on_failure="raise")
    loop = search(forward, adjoint, tol, limit, partial(ComplexInverse.of, kernel))
    assert loop.forward_steps is not None
    assert loop.backward_steps is not None
    published = partial(PublishedInverse.of, kernel, loop.alpha)
    modern = ComplexInverse.of(kernel, loop.alpha)
    stored, floor = published(), step_floor(forward)
    runs: dict[str, dict[str, Callable[[], object]]] = {
        "forward, new weights": {
            "lben": lambda: solve(fresh(forward), method, tol=tol, require_monotone=False),
            "published": lambda: loop.forward(forward, published()),
            MODERN: lambda: loop.forward(forward, ComplexInverse.of(kernel, loop.alpha)),
        },
        "forward": {
            "lben": lambda: solve(forward, method, tol=tol),
            "published": lambda: loop.forward(forward, published()),  # it factors at every call
            MODERN: lambda: loop.forward(forward, modern),
            "floor": lambda: [floor() for _ in range(solution.stats.max_steps)],
        },
        "backward": {
            "lben": lambda: solve(adjoint, method, tol=tol),
            "published": lambda: loop.backward(adjoint, stored),
            MODERN: lambda: loop.backward(adjoint, modern),
            "floor": lambda: [floor() for _ in range(back.stats.max_steps)],
        },
    }
    for direction, target in (("forward", forward), ("backward", adjoint)):
        for name, call in torchdeq(target, tol):
            for key in (direction, f"{direction}, new weights"):
                if key in runs:
                    runs[key][f"torchdeq {name}"] = call
    record: dict[str, Any] = {
        "tol": tol, "steps": solution.stats.max_steps, "backward_steps": back.stats.max_steps,
        "published": {"alpha": loop.alpha, "steps": loop.forward_steps,
                      "backward_steps": loop.backward_steps},
        "violations": beyond(forward, solution.value) + beyond(adjoint, back.value),
    }  # fmt: skip
    for key, candidates in runs.items():
        seconds = interleaved(candidates, rounds, warmup=1)
        medians = {name: statistics.median(s) for name, s in seconds.items()}
        peers = [name for name in candidates if name not in ("lben", "floor", MODERN)]
        best = min(peers, key=lambda name: medians[name])
        record[key] = {
            "seconds": medians, "best_peer": best, "ratio": round(ratio(seconds, best, "lben"), 3),
            "ratio_modern": round(ratio(seconds, MODERN, "lben"), 3),
        }  # fmt: skip
        if "floor" in candidates:
            record[key]["floor_ratio"] = round(ratio(seconds, "lben", "floor"), 3)
        print(f"{tol:.0e} {key}: " + ", ".join(f"{n} {1e3 * s:.0f} ms" for n, s in medians.items()))
    return record


def torchdeq(target: Inclusion, tol: float) -> list[tuple[str, Callable[[], object]]]:
    """Return torchdeq's solvers on direct convolutions, at their best steps, if they arrive."""
    W = target.operator
    assert isinstance(W, ConvolutionOperator)
    direct = DirectOperator(W.kernel, W.image, W.channel_metric, W.transposed)
    problem = Inclusion(direct, target.bias, target.activation)
    arrived: list[tuple[str, Callable[[], object]]] = []
    for solver in SOLVERS:
        best: tuple[float, Callable[[], object]] | None = None
        for alpha in STEPS:
            call = partial(
                solve, problem, TorchDEQ(solver=solver, step_size=alpha), tol=tol, max_steps=200,
                require_monotone=False,
            )  # fmt: skip
            start = time.perf_counter()
            found = quietly(call)
            seconds = time.perf_counter() - start
            if found.converged and (best is None or seconds < best[0]):
                best = seconds, call
        if best is not None:
            arrived.append((solver, best[1]))
    return arrived


def step_floor(forward: Inclusion) -> Callable[[], object]:
    """Return the transforms and the product of one step, on memory that is there already."""
    c, bins = CHANNELS, SIZE[1] // 2 + 1
    images = forward.bias.reshape(-1, c, *SIZE)
    symbols = torch.randn(SIZE[0] * bins, c, c, dtype=torch.complex64)
    spectrum = torch.fft.rfft2(images)

    def step() -> None:
        torch.fft.rfft2(images)
        spectral.product(symbols, spectrum.flatten(2))
        torch.fft.irfft2(spectrum, s=SIZE)

    return step


def beyond(target: Inclusion, z: Tensor) -> int:
    """Count samples whose error exceeds the bound, against float64 to 1e-12."""
    few = torch.arange(4)
    exact = target.select(few).to(torch.float64)
    reference = solve(exact, PeacemanRachford(), tol=1e-12, on_failure="raise")
    error = exact.operator.norm(z[few].double() - reference.value) - reference.error_bound
    return int((error > target.select(few).error_bound(z[few])).sum())


def attacked(pairs: int) -> int:
    """Count attacked pairs that beat γ = 1 of a pooled layer with large free kernels."""
    torch.manual_seed(SEED)
    layer = PooledEquilibriumConv2d(
        3, 8, 10, image=(8, 8), dtype=torch.float64, tol=1e-8, on_failure="raise"
    )
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(2)
    generator, beaten = torch.Generator().manual_seed(SEED), 0
    for part in torch.arange(pairs).split(1000):
        images = torch.rand(len(part), 3, 8, 8, generator=generator, dtype=torch.float64)
        found = ascend_quotient(layer, images, steps=2, generator=generator)
        beaten += int((found.quotient > 1.0 + 1e-6).sum())
    return beaten


def main() -> None:
    """Run the benchmark."""
    arguments = parser("convolutional equilibria against their peers").parse_args()
    tolerances, rounds, pairs = ((1e-3,), 7, 500) if arguments.quick else ((1e-3, 1e-5), 9, 10_000)
    forward = problem()
    records = [measure(forward, tol, rounds) for tol in tolerances]

    def worst(key: str, ratio: str = "ratio") -> float:
        return min(record[key][ratio] for record in records)

    figures = {
        "forward_ratio_best_peer": worst("forward, new weights"),
        "cached_forward_ratio_best_peer": worst("forward"),
        "backward_ratio_best_peer": worst("backward"),
        "forward_ratio_modern": worst("forward, new weights", "ratio_modern"),
        "cached_forward_ratio_modern": worst("forward", "ratio_modern"),
        "backward_ratio_modern": worst("backward", "ratio_modern"),
        "floor_ratio": max(record["forward"]["floor_ratio"] for record in records),
        "violations": sum(r["violations"] for r in records) + attacked(pairs),
    }
    finish(figures, arguments.out, seed=SEED, cells=records)


if __name__ == "__main__":
    main()

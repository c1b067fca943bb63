"""Are the feed-forward layers proved, and do they cost more than their products?

    python -m benchmarks.sll [--quick] [--out FILE]

First every layer of the family is proved for random weights and attacked: pairs are ascended
until their quotient stops growing. Then the layers of SLL Small (45 channels with 5 hidden,
3 × 3, 32 × 32; dense 2880 features with 2048 hidden units) are timed at batch 64 against

- naive: the layer written from its formula, with T from UUᵀ at every call (Araujo et al. 2023);
- orthogonium: the layer of that package, where it is installed (extra `benchmarks`);
- floor: the same two products, bias, activation and skip without any T;

in training (forward and backward, weights new at every step) and in eval mode.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from functools import reduce

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.common import finish, interleaved, parser, ratio
from lben import (
    AOLConv2d,
    AOLLinear,
    CertificateError,
    CPLConv2d,
    CPLLinear,
    OrthogonalConv2d,
    OrthogonalLinear,
    SandwichConv2d,
    SandwichLinear,
    SLLConv2d,
    SLLLinear,
    SpectralConv2d,
    SpectralLinear,
    certify,
    stack,
    tighten_diagonal,
)
from lben.layers import FeedforwardLayer
from lben.parameterizations.feedforward import UNIT_BOUND

SEED, BATCH, IMAGE = 0, 64, (10, 9)
FAMILY: dict[str, Callable[[], FeedforwardLayer]] = {
    "SLLLinear": lambda: SLLLinear(60, 40),
    "SLLLinear squared": lambda: SLLLinear(60, 40, squarings=2),
    "CPLLinear": lambda: CPLLinear(60, 40),
    "AOLLinear": lambda: AOLLinear(60, 40),
    "AOLLinear with q": lambda: AOLLinear(60, 40, learn_q=True),
    "SpectralLinear": lambda: SpectralLinear(60, 40),
    "OrthogonalLinear": lambda: OrthogonalLinear(60, 40),
    "SandwichLinear": lambda: SandwichLinear(60, 40),
    "SLLConv2d": lambda: SLLConv2d(8, 5),
    "SLLConv2d circular": lambda: SLLConv2d(8, 5, circular=True),
    "SLLConv2d squared": lambda: SLLConv2d(8, 5, squarings=1),
    "CPLConv2d": lambda: CPLConv2d(8, 5),
    "AOLConv2d": lambda: AOLConv2d(8, 6),
    "AOLConv2d circular": lambda: AOLConv2d(8, 6, circular=True),
    "SpectralConv2d": lambda: SpectralConv2d(8, 6),
    "OrthogonalConv2d": lambda: OrthogonalConv2d(8, 6, image=IMAGE),
    "SandwichConv2d": lambda: SandwichConv2d(8, 6),
}


def main() -> None:
    """Run the benchmark."""
    arguments = parser("feed-forward 1-Lipschitz layers: proofs, attacks and costs").parse_args()
    torch.manual_seed(SEED)
    proved, violations, family = _prove(arguments)
    joint = _joint()
    rounds = 15 if arguments.quick else 41
    peers = _orthogonium()
    dense = _time(
        "dense 2880 → 2048", NaiveLinear(2880, 2048), SLLLinear(2880, 2048),
        peers.get("dense"), torch.randn(BATCH, 2880), rounds,
    )  # fmt: skip
    convolution = _time(
        "convolution 45, 5, 3 × 3", NaiveConv2d(45, 5), SLLConv2d(45, 5),
        peers.get("convolution"), torch.randn(BATCH, 45, 32, 32), rounds,
    )  # fmt: skip
    figures = {
        "layers_proved": proved,
        "violations": violations,
        "dense_train_ratio_naive": round(dense["train"]["naive"], 3),
        "conv_train_ratio_floor": round(1 / convolution["train"]["floor"], 3),
        "eval_ratio_floor": round(
            max(1 / dense["eval"]["floor"], 1 / convolution["eval"]["floor"]), 3
        ),
    }
    finish(
        figures, arguments.out, seed=SEED, quick=arguments.quick, rounds=rounds, family=family,
        joint=joint,
        dense=dense, convolution=convolution,
    )  # fmt: skip


def _prove(arguments: argparse.Namespace) -> tuple[int, int, dict[str, dict[str, float]]]:
    """Prove and attack every layer; return how many were proved, violations, and the details."""
    steps = 150 if arguments.quick else 1000
    proved, violations, details = 0, 0, {}
    print("layer                  proved   least eigenvalue   largest quotient found")
    for name, make in FAMILY.items():
        layer = _drawn(make())
        image = IMAGE if ".Conv" in repr(type(layer)) or "Conv" in name else None
        try:
            certificate = layer.certificate(image)
            proved += 1
        except CertificateError as error:
            print(f"{name}: {error}")
            continue
        quotient, over = _attack(layer, image, steps)
        violations += over
        details[name] = {"margin": certificate.margin, "quotient": quotient}
        print(f"{name:22} yes      {certificate.margin:.1e}            {quotient:.7f}", flush=True)
    return proved, violations, details


def _joint() -> dict[str, dict[str, float]]:
    """Compare the product of the layers' bounds with that of all layers assembled into one."""
    stacks: dict[str, Sequence[FeedforwardLayer]] = {
        "8 sandwich layers": [SandwichLinear(30, 30) for _ in range(8)],
        "3 SLL layers": [SLLLinear(30, 30) for _ in range(3)],  # a skip: no bound is below 1
    }
    found = {}
    for name, layers in stacks.items():
        weights = reduce(
            stack, [_drawn(layer).parameterization.dense(torch.float32) for layer in layers]
        )
        start = time.perf_counter()
        joint = certify(weights, tighten_diagonal(weights)).bound
        found[name] = {"product": certify(weights).bound, "diagonal": joint}
        seconds = time.perf_counter() - start
        print(f"{name}: product {found[name]['product']:.6f}, joint {joint:.6f} ({seconds:.1f} s)")
    return found


def _drawn(layer: FeedforwardLayer) -> FeedforwardLayer:
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
    return layer


def _attack(
    layer: FeedforwardLayer, image: tuple[int, int] | None, steps: int
) -> tuple[float, int]:
    """Return the largest quotient of float64 ascent and of float32 pairs, and those beyond."""
    shape = (32, layer.inputs, *(image or ()))
    single = layer.eval()
    far = [torch.randn(shape), torch.rand(shape)]
    with torch.no_grad():
        change = (single(far[0]) - single(far[1])).flatten(1).norm(dim=1)
    quotients = (change / (far[0] - far[1]).flatten(1).norm(dim=1)).double()
    tensors = layer.parameterization.to_exact(torch.float32)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    delta = torch.randn_like(x).requires_grad_()
    optimizer = torch.optim.Adam([x, delta], lr=0.03)
    largest = quotients.max()
    over = int((quotients > 1 + 1e-6).sum())
    for _ in range(steps):
        y, z = (layer.evaluate(p, torch.float64, tensors) for p in (x, x + delta))
        quotient = (z - y).flatten(1).norm(dim=1) / delta.flatten(1).norm(dim=1)
        largest = torch.maximum(largest, quotient.detach().max())
        over += int((quotient.detach() > UNIT_BOUND).sum())
        gradients = torch.autograd.grad(-quotient.log().sum(), [x, delta])
        x.grad, delta.grad = gradients
        optimizer.step()
    return float(largest), over


class NaiveLinear(nn.Module):
    """SLL from its formula: T from UUᵀ at every call."""

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.U = nn.Parameter(torch.empty(hidden, features))
        self.b, self.log_q = nn.Parameter(torch.zeros(hidden)), nn.Parameter(torch.zeros(hidden))
        nn.init.xavier_normal_(self.U)

    def forward(self, x: Tensor) -> Tensor:
        """Return y."""
        q = self.log_q.exp()
        T = ((self.U @ self.U.T).abs() * q / q[:, None]).sum(1)
        return self.products(x, 2 / T)

    def products(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """Return x − Uᵀ(scale σ(Ux + b)); the floor leaves the scale out."""
        h = torch.relu(functional.linear(x, self.U, self.b))
        return x - functional.linear(h if scale is None else h * scale, self.U.T)


class NaiveConv2d(nn.Module):
    """Convolutional SLL from its formula: T from U correlated with itself at every call."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.U = nn.Parameter(torch.empty(hidden, channels, 3, 3))
        self.b, self.log_q = nn.Parameter(torch.zeros(hidden)), nn.Parameter(torch.zeros(hidden))
        nn.init.xavier_normal_(self.U)

    def forward(self, x: Tensor) -> Tensor:
        """Return y."""
        q = self.log_q.exp()
        G = functional.conv2d(self.U, self.U, padding=2).abs().sum((2, 3))
        return self.products(x, 2 / (G * q / q[:, None]).sum(1))

    def products(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """Return x − Uᵀ(scale σ(Ux + b)); the floor leaves the scale out."""
        h = torch.relu(functional.conv2d(x, self.U, self.b, padding=1))
        h = h if scale is None else h * scale[:, None, None]
        return x - functional.conv_transpose2d(h, self.U, padding=1)


def _orthogonium() -> dict[str, nn.Module]:
    """Return the layers of orthogonium, or none where it is not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from orthogonium.layers.conv.SLL import sll_layer
        except ImportError:
            print("orthogonium is not installed and left out")
            return {}
        return {
            "dense": sll_layer.SDPBasedLipschitzDense(2880, 2880, 2048),
            "convolution": sll_layer.SDPBasedLipschitzResBlock(45, 5.01 / 45),
        }


def _time(
    name: str,
    naive: NaiveLinear | NaiveConv2d,
    layer: FeedforwardLayer,
    peer: nn.Module | None,
    x: Tensor,
    rounds: int,
) -> dict[str, dict[str, float]]:
    """Time training steps and evaluation; return time(candidate) ÷ time(lben) and milliseconds."""
    result = {}
    for mode in ("train", "eval"):
        layer.train(mode == "train")
        candidates: list[tuple[str, nn.Module, Callable[[Tensor], Tensor]]] = [
            ("lben", layer, layer.forward),
            ("naive", naive, naive.forward),
            ("floor", naive, naive.products),
        ]
        if peer is not None:
            candidates.append(("orthogonium", peer.train(mode == "train"), peer.forward))
        calls: dict[str, Callable[[], object]] = {}
        step = _step if mode == "train" else _evaluation
        for label, owner, forward in candidates:
            calls[label] = step(owner, forward, x.clone())
        seconds = interleaved(calls, rounds if mode == "train" else 5 * rounds)
        result[mode] = {
            **{label: ratio(seconds, label, "lben") for label in calls if label != "lben"},
            **{f"{label}_ms": 1e3 * statistics.median(v) for label, v in seconds.items()},
        }
        times = ", ".join(f"{k} {1e3 * statistics.median(v):.2f} ms" for k, v in seconds.items())
        print(f"{name:26} {mode:6} {times}", flush=True)
    return result


def _step(owner: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], object]:
    parameters = list(owner.parameters())

    def step() -> None:
        for p in [x, *parameters]:
            p.grad = None
        forward(x.requires_grad_()).square().sum().backward()
        with torch.no_grad():  # a step changes the weights: no T may be reused
            for p in parameters:
                p.add_(0.0)

    return step


def _evaluation(
    owner: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor
) -> Callable[[], object]:
    def call() -> None:
        with torch.inference_mode():
            forward(x)

    return call


if __name__ == "__main__":
    main()

"""What does a training step of an equilibrium layer cost?

    python -m benchmarks.step [--quick] [--out FILE]

One step is forward and backward of cross-entropy at batch 128, 784 → 80 units → 10, from the free
parameters (assembling W and factoring it included), against

- an MLP of the same size: 784 → 80 → ReLU → 10;
- torchdeq's Anderson solver on the same equation, weights and tolerance, forward and backward by
  implicit differentiation. Anderson fails on the plain map of trained layers, so it is given the
  forward–backward map z ↦ σ((1 − α)z + α(Wz + v)) with the fastest α of a grid that converges.

Weights are those of the γ = 1 model in results/mnist: a trained layer, not an easy random one.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.common import finish, interleaved, parser, ratio, trained
from lben.layers import EquilibriumLinear

BATCH, TOL, SEED = 128, 1e-4, 0
ALPHAS = (1.0, 0.7, 0.5, 0.35, 0.25, 0.18, 0.12, 0.08, 0.05)


def main() -> None:
    """Run the benchmark."""
    arguments = parser("one training step against an MLP and torchdeq's Anderson").parse_args()
    rounds = 50 if arguments.quick else 300
    torch.manual_seed(SEED)
    layer = trained("1").layer.train()
    layer.tol = TOL
    x = torch.rand(BATCH, layer.in_features).sub_(0.1307).div_(0.3081)
    labels = torch.randint(10, (BATCH,))
    mlp = nn.Sequential(
        nn.Linear(layer.in_features, layer.hidden_features), nn.ReLU(),
        nn.Linear(layer.hidden_features, layer.out_features),
    )  # fmt: skip

    alpha, anderson = _anderson(layer, x)
    candidates = {
        "MLP": _step(mlp, mlp, x, labels),
        "lben": _step(layer, layer, x, labels),
        "torchdeq Anderson": _step(layer, anderson, x, labels),
    }
    gap = _agreement(layer, candidates)
    seconds = interleaved(candidates, rounds)
    steps = layer.equilibrium(x).stats.max_steps
    print(f"batch {BATCH}, tolerance {TOL:g}, {torch.get_num_threads()} threads, {rounds} rounds")
    print(f"lben: Peaceman-Rachford, {steps} steps forward; torchdeq: best α = {alpha}")
    print(f"largest relative difference of the two gradients: {gap:.1e}\n")
    for name, times in seconds.items():
        low, high = min(times), max(times)
        print(
            f"{name:20} {1e3 * statistics.median(times):8.2f} ms "
            f"({1e3 * low:.2f} … {1e3 * high:.2f})"
        )
    figures = {
        "ratio_mlp": round(ratio(seconds, "lben", "MLP"), 3),
        "ratio_torchdeq_anderson": round(ratio(seconds, "torchdeq Anderson", "lben"), 3),
    }
    print("\nratio_mlp: lben ÷ MLP; ratio_torchdeq_anderson: torchdeq ÷ lben (median of pairs)")
    finish(
        figures, arguments.out, seed=SEED, quick=arguments.quick, rounds=rounds,
        milliseconds={k: 1e3 * statistics.median(v) for k, v in seconds.items()},
    )  # fmt: skip


def _step(
    owner: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor, labels: Tensor
) -> Callable[[], None]:
    parameters = list(owner.parameters())

    def step() -> None:
        for parameter in parameters:
            parameter.grad = None
        functional.cross_entropy(forward(x), labels).backward()
        with torch.no_grad():  # a step changes the weights: no factor may be reused
            for parameter in parameters:
                parameter.add_(0.0)

    return step


def _agreement(layer: EquilibriumLinear, candidates: dict[str, Callable[[], None]]) -> float:
    """Return the largest relative difference of the gradients of both solvers."""
    gradients = []
    for name in ("lben", "torchdeq Anderson"):
        candidates[name]()
        gradients.append([p.grad.clone() for p in layer.parameters() if p.grad is not None])
    return max(
        float((a - b).norm() / a.norm()) for a, b in zip(*gradients, strict=True) if a.norm() > 0
    )


def _anderson(layer: EquilibriumLinear, x: Tensor) -> tuple[float, Callable[[Tensor], Tensor]]:
    """Return the α and the forward function with which torchdeq's Anderson needs fewest steps."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escape sequences in torchdeq 0.1.0
        from torchdeq import get_deq

    solver = get_deq(
        f_solver="anderson", b_solver="anderson", f_tol=TOL, b_tol=TOL, f_max_iter=200,
        b_max_iter=200, f_stop_mode="rel", b_stop_mode="rel", ift=True,
    )  # fmt: skip

    def solve(x: Tensor, alpha: float) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        w = layer.weights()
        v = functional.linear(x, w.U, w.b)

        def map_(z: Tensor) -> Tensor:
            return torch.relu((1 - alpha) * z + alpha * torch.addmm(v, z, w.W.T))

        states, info = solver(map_, torch.zeros_like(v))
        return states[-1], layer.readout(x, states[-1], w), info

    reached = {}
    for alpha in ALPHAS:
        with torch.no_grad():
            info = solve(x, alpha)[2]
        if float(info["rel_lowest"].max()) < TOL:
            reached[alpha] = float(info["nstep"].max())
    if not reached:
        raise RuntimeError("torchdeq's Anderson reached the tolerance at no α of the grid")
    best = min(reached, key=lambda a: reached[a])
    return best, lambda x: solve(x, best)[1]


if __name__ == "__main__":
    main()

"""Are solves on a device within their proven error of float64 on the CPU, for fresh problems?"""

from __future__ import annotations

import secrets
from typing import Any

import torch
from torch import Tensor

from solvers import (
    DenseOperator,
    DouglasRachford,
    ForwardBackward,
    Inclusion,
    LeakyReLU,
    LinearSlope,
    MixedPrecision,
    PeacemanRachford,
    ProximalActivation,
    ReLU,
    equilibrium,
    solve,
)
from solvers.fused import device as loop
from solvers.method import Request


def correctness(device: str, quick: bool) -> dict[str, Any]:
    """Solve problems that no one has seen before, forward and backward, in both precisions."""
    seed, failed, count = secrets.randbits(32), [], 0
    generator = torch.Generator().manual_seed(seed)
    # On a CPU the kernels are interpreted: only a size for each of them.
    sizes = [7, 80, 129, 700] if quick else [7, 80, 128, 129, 300, 512, 700]
    sizes = sizes if device == "cuda" else [5, 130]
    for n in sizes:
        for dtype in (torch.float32, torch.float64):
            problem = random_inclusion(n, 300 if device == "cuda" else 5, dtype, generator)
            checks = {
                **{f"forward, {a!r}": forward(problem, a, device) for a in _activations(problem)},
                "backward": backward(problem, device),
            }
            count += len(checks)
            failed += [f"n = {n}, {dtype}: {name}" for name, holds in checks.items() if not holds]
    return {"correct": not failed, "checks": count, "failed": failed, "seed": seed}


def random_inclusion(
    n: int, batch: int, dtype: torch.dtype, generator: torch.Generator
) -> Inclusion:
    """Return a problem on the CPU with m ≥ 0.5 in a metric that is not the identity."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    V, N = normal(n, n) / n**0.5, normal(n, n) / n**0.5
    metric = torch.exp(0.5 * normal(n))
    root = metric.sqrt()
    H = 0.5 * torch.eye(n, dtype=torch.float64) + V.T @ V + N - N.T
    W = torch.eye(n, dtype=torch.float64) - H / root[:, None] * root
    operator = DenseOperator(W.to(dtype), metric.to(dtype))
    return Inclusion(operator, normal(batch, n).to(dtype), ReLU())


def _activations(problem: Inclusion) -> tuple[ProximalActivation, ...]:
    slopes = (problem.bias > 0).to(problem.bias.dtype)
    return ReLU(), LeakyReLU(0.1), LinearSlope(slopes)


def forward(problem: Inclusion, activation: ProximalActivation, device: str) -> bool:
    """Compare every splitting's loop on the device with a reference in float64."""
    problem = Inclusion(problem.operator, problem.bias, activation)
    exact = problem.to(torch.float64)
    reference = solve(exact, PeacemanRachford(), tol=1e-12, max_steps=20000)
    there = _moved(problem, device)
    request = Request(tol=1e-3, max_steps=3000)
    holds = True
    for method in (PeacemanRachford(), DouglasRachford(), ForwardBackward()):
        found = loop.run(there, method.iteration(there), request)
        error = exact.operator.norm(found.value.cpu().double() - reference.value)
        bound = exact.error_bound(found.value.cpu()) + reference.error_bound
        holds &= bool((found.residual <= request.tol).all()) and bool((error <= bound).all())
    low = solve(there, MixedPrecision(), tol=1e-5 if problem.bias.dtype == torch.float32 else 1e-9)
    error = exact.operator.norm(low.value.cpu().double() - reference.value)
    return holds and bool((error <= low.error_bound.cpu() + reference.error_bound).all())


def backward(problem: Inclusion, device: str) -> bool:
    """Compare the gradients of W and v with those of float64 on the CPU."""
    tol = 1e-5 if problem.bias.dtype == torch.float32 else 1e-10
    gradients = []
    for own, tol_ in ((_moved(problem, device), tol), (problem.to(torch.float64), 1e-12)):
        W, v = (t.clone().requires_grad_() for t in (own.operator.tensors[0], own.bias))
        operator = DenseOperator(W, own.metric)
        z = equilibrium(Inclusion(operator, v, ReLU()), PeacemanRachford(), tol=tol_).value
        gradients.append([g.cpu().double() for g in torch.autograd.grad(z.sin().sum(), (W, v))])
    # An active unit at rounding from its kink may be counted as inactive: few entries may differ.
    pairs = zip(*gradients, strict=True)
    near = [((a - b).abs() <= 1e3 * tol * b.abs().amax()).double().mean() for a, b in pairs]
    return bool(min(near) > 0.999)


def _moved(problem: Inclusion, device: str) -> Inclusion:
    operator, activation = problem.operator, problem.activation
    if isinstance(activation, LinearSlope):
        activation = LinearSlope(activation.d.to(device))
    W = DenseOperator(operator.tensors[0].to(device), operator.metric.to(device))
    return Inclusion(W, problem.bias.to(device), activation)

"""Are bounds of rounding bounds? Logits as they run, against the same network without an error.

`exact_logits` evaluates a network from pixels to logits in integer arithmetic
(`benchmarks.dyadic`): its stored weights, exact equilibria, no rounding. What `certified_logits`
says of the distance is compared with the distance: at x, and at other images of a ball around x.
`orders` sums one output of a head in many orders by hand, for what a library's order may hide.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.dyadic import Dyadic
from benchmarks.networks import KINDS
from lben import NormalizedLinear
from lben.layers import (
    EquilibriumLayer,
    FeedforwardLayer,
    GroupSort,
    PooledEquilibriumConv2d,
)
from lben.layers.fixed import FixedMap
from lben.models import (
    Classifier,
    ConvolutionalEquilibriumClassifier,
    EquilibriumClassifier,
    FeedforwardClassifier,
)
from lben.weights import DenseWeights
from solvers import DenseOperator, Inclusion, Tanh, solve

DISTANCES = (1e-3, 1.0, 30.0)
"""At which other images of the ball are put, in l2."""


def rounding(quick: bool) -> list[dict[str, Any]]:
    """Return per network and precision how many errors were beyond their bound, and how near."""
    rows = []
    for name, config in KINDS.items():
        if getattr(config, "activation", "relu") == "tanh":
            continue  # no integer arithmetic: its values are not rational
        for dtype in (torch.float32, torch.float64):
            row = _row(name, dtype)
            for seed in range(1 if quick else 4):
                for change in _CHANGES:
                    torch.manual_seed(seed)
                    model = config.build().eval().requires_grad_(False)
                    change(model)
                    for true, bound in _errors(model.to(dtype), 2 if quick else 4):
                        _count(row, true, bound)
            rows.append(row)
            print(row, flush=True)
    return [*rows, *orders()]


def orders() -> list[dict[str, Any]]:
    """Sum the output of a head in orders chosen to lose much, from its bias and from zero."""
    rows = []
    p = 400
    for dtype, number in ((torch.float32, np.float32), (torch.float64, np.float64)):
        row = _row("head, summed by hand", dtype)
        torch.manual_seed(0)
        for size in (0.49 * torch.finfo(dtype).eps, 1.0, 2.0**20):
            head = NormalizedLinear(p, 1, dtype=dtype).requires_grad_(False)
            head.weight.fill_(1.0)
            head.bias.fill_(1.0)
            matrix = head.weights().D
            assert matrix is not None
            weights = matrix[0]
            same = torch.full((p,), size, dtype=dtype) / weights
            for x in (same, same * torch.randn(p, dtype=dtype), same * torch.linspace(-1, 1, p)):
                x = x.to(dtype)
                terms = (weights.numpy() * x.numpy()).astype(number)
                true = Dyadic.of(weights[None]) @ Dyadic.of(x[:, None]) + Dyadic.of(head.bias)
                bound = float(head.rounding(x[None]))
                for order in (np.argsort(terms), np.argsort(-np.abs(terms)), np.arange(p)):
                    for first in (True, False):
                        start = [number(1.0)] if first else []
                        total = number(0.0)
                        for term in [*start, *terms[order]]:
                            total = number(total + term)
                        total = total if first else number(total + number(1.0))
                        away = true - Dyadic.of(torch.tensor(float(total), dtype=torch.float64))
                        _count(row, away.square(), bound)
        rows.append(row)
        print(row, flush=True)
    return rows


def _row(network: str, dtype: torch.dtype) -> dict[str, Any]:
    """Return a row without errors; `nearest` is the largest error ÷ its bound."""
    return {"network": network, "dtype": str(dtype)[6:], "errors": 0, "wrong": 0, "nearest": 0.0}


def _count(row: dict[str, Any], square: Fraction, bound: float) -> None:
    """Add one error, given by its square, and its bound."""
    row["errors"] += 1
    row["wrong"] += math.isnan(bound)
    if math.isfinite(bound):
        limit = Fraction(bound) ** 2
        row["wrong"] += square > limit
        if limit:
            row["nearest"] = max(row["nearest"], round(math.sqrt(square / limit), 4))


def _errors(model: Classifier, count: int) -> Iterator[tuple[Fraction, float]]:
    """Yield squares of true errors and their bounds, at images and around them."""
    dtype = model.dtype
    proof = model.certificate(bound="promised" if model.gamma is not None else "scaled")
    x = torch.rand(count, *model.shape, dtype=torch.float64).to(dtype)
    found = model.forward_with_error(x, proof)
    yield from zip(_away(model, x, found.value), found.error.tolist(), strict=True)
    for distance in DISTANCES:
        step = torch.randn(x.shape, dtype=torch.float64)
        step = step / step.flatten(1).norm(dim=1)[:, None, None, None] * distance
        moved = (x.double() + step).to(dtype)
        away = (moved.double() - x.double()).flatten(1).norm(dim=1) * (1 + 1e-12)
        bounds = found.uniform.at(away).tolist()
        yield from zip(_away(model, moved, model(moved)), bounds, strict=True)


def _away(model: Classifier, x: Tensor, logits: Tensor) -> list[Fraction]:
    exact = exact_logits(model, x)
    return [(Dyadic.of(y) - e).square() for y, e in zip(logits, exact, strict=True)]


def exact_logits(model: Classifier, x: Tensor) -> list[Dyadic]:
    """Return the logits of images, without any error above 2⁻⁴⁰⁰ or so, for σ piecewise linear."""
    mean, std = (
        Dyadic.of(t.expand(1, *model.shape).reshape(-1))
        for t in (model.normalize.mean.to(x.dtype), model.normalize.std.to(x.dtype))
    )
    maps = list(_maps(model))
    logits = []
    for image in x:
        y = (Dyadic.of(image.reshape(-1)) - mean).divide(std)
        for each in maps:
            y = each(y).rounded()
        logits.append(y)
    return logits


Map = Callable[[Dyadic], Dyadic]


def _maps(model: Classifier) -> Iterator[Map]:
    shape = model.shape
    if isinstance(model, EquilibriumClassifier):
        yield _equilibrium(model.layer, model.layer.weights())
    elif isinstance(model, ConvolutionalEquilibriumClassifier):
        layer = model.layer
        assert isinstance(layer, PooledEquilibriumConv2d)
        w = layer.weights()
        yield _linear(nn.Sequential(model.stem, nn.PixelUnshuffle(w.state.placed.stride)), shape)
        yield _equilibrium(layer, w.state.dense(w.image), (w.A.flatten(1), w.C.flatten(1), w.b_y))
    else:
        assert isinstance(model, FeedforwardClassifier)
        for part in model.features:
            yield _map(part, shape)
            shape = tuple(part(torch.zeros(1, *shape, dtype=model.dtype)).shape[1:])
        yield _map(model.head, shape)


def _map(layer: nn.Module, shape: tuple[int, ...]) -> Map:
    if isinstance(layer, GroupSort):
        return lambda x: _sorted(x, shape, layer.group)
    if isinstance(layer, FixedMap):
        return _linear(layer, shape)
    assert isinstance(layer, FeedforwardLayer | EquilibriumLayer | NormalizedLinear)
    w = layer.weights()
    w = w if isinstance(w, DenseWeights) else w.dense((shape[1], shape[2]))
    if isinstance(layer, EquilibriumLayer):
        return _equilibrium(layer, w)
    U, b, C, b_y = (Dyadic.of(t) for t in (w.U, w.b, w.C, w.b_y))
    D = None if w.D is None else Dyadic.of(w.D)

    def feed_forward(x: Dyadic) -> Dyadic:
        y = b_y if not w.hidden_features else C @ (U @ x + b).positive() + b_y
        return y if D is None else y + D @ x

    return feed_forward


def _linear(layer: nn.Module, shape: tuple[int, ...]) -> Map:
    """Return a map without parameters as the matrix whose columns it makes of unit vectors."""
    size = math.prod(shape)
    columns = layer(torch.eye(size, dtype=torch.float64).reshape(size, *shape))
    A = Dyadic.of(columns.reshape(size, -1).T)
    return lambda x: A @ x


def _sorted(x: Dyadic, shape: tuple[int, ...], group: int) -> Dyadic:
    grouped = x.m.reshape(shape[0] // group, group, -1)
    return Dyadic(np.sort(grouped, axis=1).reshape(-1), x.e)


def _equilibrium(
    layer: EquilibriumLayer[Any],
    w: DenseWeights,
    pooled: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Map:
    """Return an equilibrium layer; `pooled` is A, C and b_y of W + AᵀC and of the output."""
    W, U, b = (Dyadic.of(t) for t in (w.W, w.U, w.b))
    C, b_y = Dyadic.of(w.C), Dyadic.of(w.b_y)
    if pooled is not None:
        A, C, b_y = (Dyadic.of(t) for t in pooled)
        W = W + Dyadic(A.m.T, A.e) @ C
    D = None if w.D is None else Dyadic.of(w.D)
    assert not isinstance(layer.activation, Tanh)
    slope = getattr(layer.activation, "negative_slope", 0.0)

    operator = DenseOperator(torch.from_numpy(W.nearest()), w.Lambda.double())

    def map(x: Dyadic) -> Dyadic:
        v = (U @ x + b).rounded()
        problem = Inclusion(operator, torch.from_numpy(v.nearest()), layer.activation)
        near = solve(problem, tol=1e-12, max_steps=20_000).value
        y = C @ _at_rest(W, v, near, slope) + b_y
        return y if D is None else y + D @ x

    return map


def _at_rest(W: Dyadic, v: Dyadic, near: Tensor, slope: float) -> Dyadic:
    """Solve z = σ(Wz + v) from nearby by Newton's method: steps in float64, residuals exact."""
    below = Dyadic.of(torch.tensor(slope, dtype=torch.float64))
    dense, z = W.nearest(), Dyadic.of(near)
    scale = max(float(np.abs(v.nearest()).max()), 1e-300)
    for _ in range(40):
        p = W @ z + v
        residual = p.positive() - (-p).positive() * below - z
        size = float(np.abs(residual.nearest()).max())
        if size <= scale * 1e-120:
            return z
        slopes = np.where(p.m > 0, 1.0, slope)
        step = np.linalg.solve(
            np.eye(len(dense)) - slopes[:, None] * dense, residual.nearest() / size
        )
        z = (z + Dyadic.of(torch.from_numpy(step * size))).rounded()
    raise RuntimeError(f"no equilibrium: the residual is {size} of {scale}")


def _as_built(model: Classifier) -> None:
    pass


def _moved(model: Classifier) -> None:
    for parameter in model.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))


def _large_biases(model: Classifier) -> None:
    """Accumulators that start from a bias then round at its size."""
    for name, parameter in model.named_parameters():
        if name.rsplit(".")[-1] in ("b", "b_y", "bias"):
            parameter.add_(2.0**16 * torch.randn_like(parameter))


def _rows_of_all_sizes(model: Classifier) -> None:
    for parameter in model.parameters():
        if parameter.ndim > 1:
            rows = torch.randint(-12, 3, (len(parameter), *[1] * (parameter.ndim - 1)))
            parameter.mul_(2.0**rows)


_CHANGES = (_as_built, _moved, _large_biases, _rows_of_all_sizes)

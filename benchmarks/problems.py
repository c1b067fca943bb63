"""Which problems are solvers compared on?

Random families with a known monotonicity and a known skew part, from easy to hard, and the trained
layers of `benchmarks.mnist` on MNIST test images.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.common import trained
from lben.data import load, pixels
from solvers import DenseOperator, Inclusion, ReLU

SEED = 0
DIFFICULTIES = ((1.0, 1.0), (0.1, 10.0), (0.01, 100.0))
"""(m, norm of the skew part), from easy to hard."""
TRAINED = ("0.2", "0.5", "1", "5", "monotone")


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One problem in float64, from which those of every dtype are cast.

    Attributes:
        name: unique.
        family: "random" or "trained".
        m, skew: monotonicity and norm of the skew part; None for a trained layer.
        W, metric, bias: of z = σ(Wz + v), ReLU.
    """

    name: str
    family: str
    m: float | None
    skew: float | None
    W: Tensor
    metric: Tensor
    bias: Tensor

    @property
    def layer(self) -> str:
        """The name without the batch."""
        return " ".join(word for word in self.name.split() if not word.startswith("batch="))

    @property
    def n(self) -> int:
        """Number of units."""
        return self.W.shape[0]

    @property
    def batch(self) -> int:
        """Number of samples."""
        return self.bias.shape[0]

    def inclusion(self, dtype: torch.dtype) -> Inclusion:
        """Return the problem with an operator of its own, nothing cached."""
        operator = DenseOperator(self.W.to(dtype), self.metric.to(dtype))
        return Inclusion(operator, self.bias.to(dtype), ReLU())


def random_problem(n: int, batch: int, m: float, skew: float) -> Problem:
    """Return H = mI + VᵀV + S with V Gaussian of variance 1/n, S skew of norm `skew`.

    H = Λ^½ (I − W) Λ^(−½) with a log-normal Λ, so I − W has monotonicity at least m in Λ; the bias
    is standard normal.
    """
    g = torch.Generator().manual_seed(SEED)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    V, N = normal(n, n) / n**0.5, normal(n, n)
    S = N - N.T
    S *= skew / torch.linalg.matrix_norm(S, 2)
    metric = torch.exp(0.5 * normal(n))
    identity = torch.eye(n, dtype=torch.float64)
    root = metric.sqrt()
    W = identity - (m * identity + V.T @ V + S) / root[:, None] * root
    name = f"n={n} batch={batch} m={m:g} skew={skew:g}"
    return Problem(
        name=name, family="random", m=m, skew=skew, W=W, metric=metric, bias=normal(batch, n)
    )


def random_problems(
    sizes: tuple[int, ...], batches: tuple[int, ...], hardest: int = len(DIFFICULTIES)
) -> Iterator[Problem]:
    """Yield the grid of sizes, batches and the first `hardest` difficulties."""
    for n in sizes:
        for batch in batches:
            for m, skew in DIFFICULTIES[:hardest]:
                yield random_problem(n, batch, m, skew)


def trained_problems(root: str, batches: tuple[int, ...]) -> Iterator[Problem]:
    """Yield the trained MNIST layers on the first images of the test set.

    Args:
        root: folder that holds MNIST/raw.
        batches: numbers of images.
    """
    images = pixels(load("mnist", root).test_images[: max(batches)], torch.float64)
    for gamma in TRAINED:
        model = trained(gamma).double()
        for batch in batches:
            with torch.no_grad():
                inclusion = model.layer.inclusion(model.normalize(images[:batch]).flatten(1))
            yield Problem(
                name=f"MNIST γ={gamma} batch={batch}", family="trained", m=None, skew=None,
                W=inclusion.operator.tensors[0].detach(), metric=inclusion.metric.detach(),
                bias=inclusion.bias.detach(),
            )  # fmt: skip

"""Random problems with known properties, shared by the tests."""

import torch

from solvers import DenseOperator, Inclusion, ProximalActivation, ReLU


def monotone_operator(
    n: int,
    *,
    m: float = 0.3,
    skew: float = 1.0,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    identity_metric: bool = False,
) -> DenseOperator:
    """I − W = Λ⁻¹(VᵀV + N − Nᵀ) + mI, so its monotonicity in Λ is at least m."""
    g = torch.Generator().manual_seed(seed)
    Lambda = torch.rand(n, generator=g, dtype=dtype) * 2 + 0.2
    if identity_metric:
        Lambda = torch.ones_like(Lambda)
    V = torch.randn(n, n, generator=g, dtype=dtype) / n**0.5
    N = skew * torch.randn(n, n, generator=g, dtype=dtype) / n**0.5
    W = (1 - m) * torch.eye(n, dtype=dtype) - (V.T @ V + N - N.T) / Lambda[:, None]
    return DenseOperator(W, Lambda)


def random_inclusion(
    n: int = 12,
    batch: tuple[int, ...] = (9,),
    activation: ProximalActivation | None = None,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    m: float = 0.3,
    skew: float = 1.0,
) -> Inclusion:
    operator = monotone_operator(n, m=m, skew=skew, seed=seed, dtype=dtype)
    g = torch.Generator().manual_seed(seed + 1)
    bias = torch.randn(*batch, n, generator=g, dtype=dtype)
    return Inclusion(operator, bias, ReLU() if activation is None else activation)

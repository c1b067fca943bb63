"""Random problems with known properties, shared by the tests."""

from dataclasses import dataclass

import torch

from solvers import (
    BlockTriangularOperator,
    ConvolutionOperator,
    DenseOperator,
    Inclusion,
    LinearOperator,
    LowRankOperator,
    LowRankUpdate,
    ProximalActivation,
    ReLU,
    ZeroOperator,
)


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


def low_rank_operator(
    n: int,
    r: int,
    *,
    m: float = 0.3,
    spread: float = 1.0,
    weak: int = 0,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> LowRankOperator:
    """I − W = D + Λ⁻¹(VVᵀ + skew) of rank r with D ≥ m, so its monotonicity in Λ is at least m.

    The first `weak` units have I + 0.3(I − W) without a diagonal but for the low-rank part.
    """
    g = torch.Generator().manual_seed(seed)
    Lambda = torch.rand(n, generator=g, dtype=dtype) * 2 + 0.2
    D = m + spread * torch.rand(n, generator=g, dtype=dtype)
    # ΛABᵀ = −VVᵀ + (xyᵀ − yxᵀ) with at least r − 2 columns in V
    skew = 2 if r - weak >= 2 else 0
    V = torch.randn(n, r - skew, generator=g, dtype=dtype) / n**0.5
    x, y = torch.randn(2, n, 1, generator=g, dtype=dtype) / n**0.5
    A, B = [-V, x, -y][: 1 + skew], [V, y, x][: 1 + skew]
    left, right = torch.cat(A, 1), torch.cat(B, 1)
    if weak:
        # Columns of their own carry the diagonal of the weak units.
        D[:weak] = -1 / 0.3
        left[:, :weak], right[:, :weak] = 0, 0
        for i in range(weak):
            left[i, i], right[i, i] = -(1 / 0.3 + m + spread) * Lambda[i], 1
    return LowRankOperator(1 - D, left / Lambda[:, None], right, Lambda)


class SpectralConvolution(ConvolutionOperator):
    """A convolution whose products are by the Fourier transform however small it is."""

    _is_direct = False


def convolution_operator(
    channels: int,
    size: int,
    image: tuple[int, int],
    *,
    m: float = 0.3,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    kind: type[ConvolutionOperator] = SpectralConvolution,
) -> ConvolutionOperator:
    """Kernels so small that I − W is monotone by more than m in a metric per channel."""
    g = torch.Generator().manual_seed(seed)
    Lambda = torch.rand(channels, generator=g, dtype=dtype) + 0.5
    kernel = torch.randn(channels, channels, size, size, generator=g, dtype=dtype)
    similar = kernel * (Lambda[:, None] / Lambda).sqrt()[:, :, None, None]
    kernel = kernel * ((1 - m) / similar.abs().sum())
    return kind(kernel, image, Lambda)


def updated_convolution_operator(
    *, seed: int = 0, dtype: torch.dtype = torch.float64
) -> LowRankUpdate:
    """A convolution less a positive semi-definite matrix of rank 2 in the Λ norm."""
    base = convolution_operator(2, 3, (4, 3), seed=seed, dtype=dtype)
    g = torch.Generator().manual_seed(seed + 1)
    C = torch.randn(base.n, 2, generator=g, dtype=dtype) / base.n**0.5
    return LowRankUpdate(base, -C / base.metric[:, None], C)


def block_triangular_operator(
    *, monotone: bool = False, seed: int = 0, dtype: torch.dtype = torch.float64
) -> BlockTriangularOperator:
    """Four blocks of three kinds, coupled so strongly that only another metric is monotone."""
    g = torch.Generator().manual_seed(seed)
    blocks = [
        monotone_operator(4, seed=seed, dtype=dtype),
        ZeroOperator(torch.tensor([0.5, 1.0, 2.0], dtype=dtype)),
        low_rank_operator(5, 1, seed=seed, dtype=dtype),
        monotone_operator(2, seed=seed + 1, dtype=dtype),
    ]
    couplings = {
        (i, j): torch.randn(blocks[i].n, blocks[j].n, generator=g, dtype=dtype)
        for i, j in ((3, 0), (1, 0), (2, 1), (3, 2))
    }
    operator = BlockTriangularOperator(blocks, couplings)
    if not monotone:
        return operator
    return BlockTriangularOperator(blocks, couplings, operator.monotone_metric())


@dataclass(frozen=True, eq=False)
class Kronecker(LinearOperator):
    """W = A ⊗ B with what an operator needs, and nothing more."""

    A: torch.Tensor
    B: torch.Tensor
    metric: torch.Tensor

    def mv(self, z: torch.Tensor) -> torch.Tensor:
        Z = z.unflatten(-1, (len(self.A), len(self.B)))
        return (self.A @ Z @ self.B.T).flatten(-2)

    def rmv(self, z: torch.Tensor) -> torch.Tensor:
        Z = z.unflatten(-1, (len(self.A), len(self.B)))
        return (self.A.T @ Z @ self.B).flatten(-2)


def kronecker_operator(
    p: int, q: int, *, seed: int = 0, dtype: torch.dtype = torch.float64
) -> Kronecker:
    """‖A‖‖B‖ = 0.8 in a metric that is itself a Kronecker product."""
    g = torch.Generator().manual_seed(seed)
    left, right = (torch.rand(k, generator=g, dtype=torch.float64) + 0.5 for k in (p, q))
    A, B = (torch.randn(k, k, generator=g, dtype=torch.float64) for k in (p, q))
    A, B = A / torch.linalg.matrix_norm(A, 2), 0.8 * B / torch.linalg.matrix_norm(B, 2)
    A, B = (X * s / s[:, None] for X, s in ((A, left), (B, right)))
    metric = torch.kron(left, right).square()
    return Kronecker(A.to(dtype), B.to(dtype), metric.to(dtype))


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

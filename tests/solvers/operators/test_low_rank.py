import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from solvers import (
    Anderson,
    DenseOperator,
    DouglasRachford,
    ForwardBackward,
    Inclusion,
    LowRankOperator,
    NotMonotoneError,
    PeacemanRachford,
    ReLU,
    Tanh,
    equilibrium,
    solve,
)
from solvers.operators.eigenvalue_bounds import DiagonalPlusLowRank
from tests.problems import low_rank_operator

METHODS = [
    PeacemanRachford(),
    PeacemanRachford(step_size=0.4),
    DouglasRachford(),
    ForwardBackward(),
    Anderson(),
    Anderson(method=ForwardBackward()),
]


def full(W: LowRankOperator) -> DenseOperator:
    return DenseOperator(W.d.diag() + W.A @ W.B.T, W.metric)


@pytest.mark.parametrize("method", METHODS, ids=repr)
@pytest.mark.parametrize("weak", [0, 2])
@pytest.mark.parametrize("activation", [ReLU(), Tanh()], ids=repr)
def test_every_method_finds_what_it_finds_on_the_full_matrix(method, weak, activation):
    W = low_rank_operator(14, 4, m=1.0, weak=weak)
    v = torch.randn(6, 14, dtype=torch.float64)
    z, expected = (
        solve(Inclusion(operator, v, activation), method, tol=1e-11, max_steps=20000).value
        for operator in (W, full(W))
    )
    torch.testing.assert_close(z, expected, rtol=1e-9, atol=1e-9)
    assert expected.abs().max() > 0.1


@pytest.mark.parametrize("activation", [ReLU(), Tanh()], ids=repr)
def test_first_and_second_derivatives(activation):
    W = low_rank_operator(5, 2, m=1.0)
    tensors = [t.requires_grad_() for t in (*W.tensors, torch.randn(2, 5, dtype=torch.float64))]

    def f(d, A, B, v):
        problem = Inclusion(LowRankOperator(d, A, B, W.metric), v, activation)
        return equilibrium(problem, tol=1e-14, max_steps=3000).value

    assert torch.autograd.gradcheck(f, tensors)
    assert torch.autograd.gradgradcheck(f, tensors)


def test_float32_goes_on_in_float64():
    W = low_rank_operator(20, 3, m=0.01, dtype=torch.float32)
    v = torch.randn(5, 20)
    solution = solve(Inclusion(W, v, ReLU()), tol=6e-7, on_failure="raise")
    assert solution.residual.max() <= 6e-7
    assert (solution.error_bound < 1e-2).all()


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation returned."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = (t.numel() for t in tree_leaves(result) if isinstance(t, torch.Tensor))
        self.numbers = max([self.numbers, *sizes])
        return result


def test_nothing_of_size_n_squared_is_formed():
    n, r, batch = 20000, 3, 4
    W = low_rank_operator(n, r)
    tensors = tuple(t.requires_grad_() for t in W.tensors)
    v = torch.randn(batch, n, dtype=torch.float64)
    with Largest() as largest:
        for transposed in (W, W.T):
            assert transposed.is_monotone()
            transposed.log_determinant()
            transposed.diagonal()
            transposed.submatrix(torch.arange(9), torch.arange(7))
        for method in (PeacemanRachford(), Anderson()):
            problem = Inclusion(W.rebuild(tensors), v, ReLU())
            z = equilibrium(problem, method, on_failure="raise").value
            z.square().sum().backward()
    assert largest.numbers <= 10 * n * batch
    with Largest() as largest:
        W = low_rank_operator(3000, r)
        constants = W.constants()
    assert constants.m >= 0.3
    assert largest.numbers <= 10 * 3000 * 2 * r
    with Largest() as largest:
        full(low_rank_operator(300, r)).constants()
    assert largest.numbers >= 300 * 300  # it would have been noticed


def random_parts(seed):
    """Diagonals with duplicates, constant or graded; factors zero, opposite or of any scale."""
    g = torch.Generator().manual_seed(seed)
    n = int(torch.randint(2, 15, (1,), generator=g))
    r = int(torch.randint(0, n, (1,), generator=g))
    d, (A, B) = (
        torch.randn(n, generator=g, dtype=torch.float64),
        torch.randn(2, n, r, generator=g, dtype=torch.float64),
    )
    d = [d, d.round(), d.clamp(0.5, 0.5), d * 10.0 ** (8 * d)][seed % 4]
    A = [A, -B, 0 * A, A * 1e3, A * 1e-7][seed % 5]
    Lambda = torch.rand(n, generator=g, dtype=torch.float64) + 0.1
    return d, A, B, Lambda ** (1 + 5 * (seed % 3))


@pytest.mark.parametrize("seed", range(120))
def test_constants_and_determinant_of_hard_cases(seed):
    d, A, B, Lambda = random_parts(seed)
    W = LowRankOperator(d, A, B, Lambda)
    root = Lambda.sqrt()
    n = len(d)
    H = root[:, None] * (torch.eye(n, dtype=d.dtype) - full(W).W) / root
    m = float(torch.linalg.eigvalsh(0.5 * (H + H.T))[0])
    L = float(torch.linalg.matrix_norm(H, 2))
    # What the proof may lose is a multiple of the parts, which may cancel in H.
    parts = float((1 - d).abs().max() + (root[:, None] * A).norm() * (B / root[:, None]).norm())
    c = W.constants()
    rounding = 1e-15 * n * parts
    assert m - 1e-8 * max(L, 1e-4 * parts) <= c.m <= m + rounding
    assert L - rounding <= c.L <= L + 1e-8 * max(L, 1e-4 * parts)
    if abs(m) > 1e-9 * L + rounding:
        assert W.is_monotone() == (m > 0)


@pytest.mark.parametrize("seed", range(40))
def test_definiteness_changes_at_the_smallest_eigenvalue(seed):
    d, A, B, _ = random_parts(4 * seed)
    part = DiagonalPlusLowRank.of(d, A, B)
    exact = torch.linalg.eigvalsh(d.diag() + A @ B.T + B @ A.T)
    torch.testing.assert_close(
        torch.linalg.eigvalsh(part.D.diag() + part.Y @ part.Y.T - part.X @ part.X.T), exact
    )
    size = float(exact.abs().max() + A.norm() * B.norm())
    assert part.exceeds(float(exact[0]) - 1e-8 * size)
    assert not part.exceeds(float(exact[0]) + 1e-12 * size)
    # at and beyond an entry of the diagonal
    assert part.exceeds(float(d.max()) + 1) is False
    for t in d:
        assert not part.exceeds(float(t)) or float(t) <= float(exact[0]) + 1e-12 * size


def test_weak_pivots_keep_the_accuracy():
    # I − W = diag(ε, 1, …) − ABᵀ is well conditioned while one pivot vanishes.
    for epsilon in (0.0, 1e-18, 1e-9, -1e-9):
        d = torch.full((6,), -1.0, dtype=torch.float64)
        d[2] = 1 - epsilon
        A = torch.zeros(6, 2, dtype=torch.float64)
        A[2, 0], A[:, 1] = -3.0, 0.1
        B = torch.ones_like(A)
        W = LowRankOperator(d, A, B)
        assert W.log_determinant() == pytest.approx(full(W).log_determinant(), rel=1e-12)


def test_rank_defect_is_a_singular_matrix():
    zero = torch.zeros(4, 1, dtype=torch.float64)
    W = LowRankOperator(torch.ones(4, dtype=torch.float64), zero + 1, zero + 1)
    assert W.log_determinant() == -torch.inf


def test_non_monotone_and_not_finite_weights_are_refused():
    d, A, v = torch.zeros(4), torch.ones(4, 1), torch.ones(2, 4)
    W = LowRankOperator(d, A, A)  # eigenvalue 4 of W
    assert not W.is_monotone()
    with pytest.raises(NotMonotoneError, match="m = -3"):
        solve(Inclusion(W, v, ReLU()))
    with pytest.raises(NotMonotoneError, match="singular or not finite"):
        W.resolvent(1 / 3)
    W = LowRankOperator(d, A * torch.inf, A)
    assert W.constants().m == -torch.inf
    assert not W.is_monotone()
    with pytest.raises(NotMonotoneError, match="singular or not finite"):
        W.resolvent(0.5)


@pytest.mark.parametrize(
    ("d", "A", "B", "metric", "message"),
    [
        ((3, 1), (3, 1), (3, 1), None, r"got \(3, 1\), \(3, 1\), \(3, 1\)"),
        ((3,), (3,), (3,), None, r"got \(3,\), \(3,\), \(3,\)"),
        ((3,), (3, 1), (3, 2), None, r"shapes \(n,\), \(n, r\) and \(n, r\), got"),
        ((3,), (4, 1), (4, 1), None, r"got \(3,\), \(4, 1\), \(4, 1\)"),
        ((3,), (3, 3), (3, 3), None, "rank of ABᵀ must be below n.*use a DenseOperator"),
        ((3,), (3, 1), (3, 1), torch.ones(4), r"shape \(3,\), got \(4,\)"),
        ((3,), (3, 1), (3, 1), torch.ones(3).double(), "metric is torch.float64"),
    ],
)
def test_bad_shapes(d, A, B, metric, message):
    with pytest.raises(ValueError, match=message):
        LowRankOperator(torch.zeros(d), torch.zeros(A), torch.zeros(B), metric)


@pytest.mark.parametrize("which", ["A", "B"])
def test_bad_dtypes(which):
    A, B = (
        torch.zeros(3, 1, dtype=torch.float64 if name == which else torch.float32) for name in "AB"
    )
    with pytest.raises(ValueError, match=f"{which} is torch.float64 on cpu, d is torch.float32"):
        LowRankOperator(torch.zeros(3), A, B)

"""Two products make an operator: what follows from them, and what is refused."""

from dataclasses import dataclass

import pytest
import torch

from solvers import (
    Anderson,
    Auto,
    DenseOperator,
    DouglasRachford,
    ForwardBackward,
    Inclusion,
    InverseGeometricMean,
    LinearOperator,
    NeuralODE,
    NotMonotoneError,
    PeacemanRachford,
    ReLU,
    SemismoothNewton,
    Tanh,
    equilibrium,
    solve,
)
from solvers.testing import check_operator, check_solution, written_out
from tests.problems import (
    Kronecker,
    kronecker_operator,
)

METHODS = [
    PeacemanRachford(), PeacemanRachford(step_size=InverseGeometricMean()), DouglasRachford(),
    ForwardBackward(), SemismoothNewton(patience=4), Auto(), Anderson(), NeuralODE(),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_an_operator_of_two_products_is_solved_by_every_method(method, dtype):
    for W in (kronecker_operator(2, 4, dtype=dtype), kronecker_operator(3, 2, dtype=dtype).T):
        v = torch.randn(7, W.n, dtype=dtype)
        solution = solve(Inclusion(W, v, ReLU()), method, tol=1e-5, on_failure="raise")
        check_solution(solution, W, v)
        assert float(solution.error_bound.max()) < 1e-3


def equilibrium_of(A, B, v, metric):
    return equilibrium(Inclusion(Kronecker(A, B, metric), v, Tanh()), tol=1e-13).value


def test_an_operator_of_two_products_has_derivatives_of_first_and_second_order():
    W = kronecker_operator(2, 3)
    v = torch.randn(2, W.n, dtype=torch.float64)
    arguments = tuple(t.clone().requires_grad_() for t in (W.A, W.B, v))

    def find(*tensors):
        return equilibrium_of(*tensors, W.metric)

    assert torch.autograd.gradcheck(find, arguments)
    assert torch.autograd.gradgradcheck(find, arguments, fast_mode=True)


def test_an_operator_of_two_products_passes_through_transforms():
    W = kronecker_operator(2, 3)
    v = torch.randn(2, W.n, dtype=torch.float64)

    def loss(A):
        return equilibrium_of(A, W.B, v, W.metric).square().sum()

    A = W.A.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(A), A)
    torch.testing.assert_close(torch.func.grad(loss)(W.A), expected)
    together = torch.func.vmap(loss)(torch.stack([W.A, 0.5 * W.A]))
    torch.testing.assert_close(together, torch.stack([loss(W.A), loss(0.5 * W.A)]))


def test_one_matrix_serves_an_operator_and_its_transpose(monkeypatch):
    W = kronecker_operator(2, 4)
    W.T.resolvent(0.3)
    monkeypatch.setattr(torch.linalg, "inv_ex", lambda A: pytest.fail("factored twice"))
    monkeypatch.setattr(Kronecker, "rmv", lambda *_: pytest.fail("written out twice"))
    W.resolvent(0.3), W.diagonal(), W.T.log_determinant(), W.T.T.relax(0.3)


@dataclass(frozen=True, eq=False)
class OfParts(LinearOperator):
    """Half of another operator, on tensors in a tuple, with indices."""

    part: LinearOperator
    gains: tuple[torch.Tensor, ...]
    order: torch.Tensor
    metric: torch.Tensor

    def mv(self, z):
        return 0.5 * self.part.mv(z) - z[..., self.order] * self.gains[0] * self.gains[1]

    def rmv(self, z):
        moved = torch.zeros_like(z).index_add(-1, self.order, z * self.gains[0] * self.gains[1])
        return 0.5 * self.part.rmv(z) - moved


def test_operators_are_made_of_others_and_of_tuples_of_tensors():
    g = torch.Generator().manual_seed(0)
    gains = tuple(0.3 * torch.rand(6, generator=g, dtype=torch.float64) for _ in range(2))
    part = kronecker_operator(2, 3)
    W = OfParts(part, gains, torch.randperm(6, generator=g), part.metric)
    assert [t.data_ptr() for t in W.tensors] == [t.data_ptr() for t in (*part.tensors, *gains)]
    check_operator(W)
    before = W.diagonal()
    part.A.mul_(0.5)
    assert not torch.equal(W.diagonal(), before)  # a part's tensors are those of the whole
    W.order.copy_(W.order.flip(0))
    torch.testing.assert_close(W.diagonal(), written_out(W).diagonal())


def test_what_is_too_large_to_write_out_says_what_to_define(monkeypatch):
    monkeypatch.setattr("solvers.operators.base._LARGEST", 7)
    W = kronecker_operator(2, 4)
    with pytest.raises(ValueError, match=r"Kronecker has 8 units.*at most 7: define resolvent"):
        W.resolvent(1.0)


def test_an_operator_that_is_not_monotone_is_refused():
    W = Kronecker(2 * torch.eye(2), torch.eye(2), torch.ones(4))
    assert not W.is_monotone()
    with pytest.raises(NotMonotoneError, match="singular"):
        W.resolvent(1.0)
    with pytest.raises(NotMonotoneError, match="m = -1"):
        solve(Inclusion(W, torch.ones(1, 4), ReLU()))


def test_an_operator_must_be_a_dataclass_or_say_what_its_tensors_are():
    class Plain(LinearOperator):
        def __init__(self, metric):
            self.metric = metric

        def mv(self, z):
            return -z

        rmv = mv

    with pytest.raises(TypeError, match="Plain must be a dataclass of its tensors"):
        Plain(torch.ones(3)).constants()


def test_constants_of_an_operator_bound_its_matrix_with_the_rounding_of_writing_it():
    W = kronecker_operator(3, 4)
    own, of_matrix = W.constants(), DenseOperator(torch.kron(W.A, W.B), W.metric).constants()
    rounding = W.rounding_gain(torch.float64)
    assert 0 < rounding < 1e-13
    assert own.m < of_matrix.m - 0.5 * rounding
    assert of_matrix.L + 0.5 * rounding < own.L
    assert own.m == pytest.approx(of_matrix.m)

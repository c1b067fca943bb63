"""A problem refuses what does not fit; residual and error bound are true."""

import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

from solvers import (
    DenseOperator,
    Inclusion,
    LeakyReLU,
    LinearSlope,
    ReLU,
    Sigmoid,
    Softplus,
    Tanh,
    solve,
)
from tests.problems import monotone_operator, random_inclusion
from tests.solvers import exactly

ACTIVATIONS = [ReLU(), LeakyReLU(0.2), Tanh(), Sigmoid(), Softplus()]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
@pytest.mark.parametrize("tol", [1e-1, 1e-3, 1e-8])
def test_error_bound_holds_and_is_not_idle(activation, tol):
    problem = random_inclusion(20, (50,), activation, seed=3)
    exact = solve(problem, tol=1e-14, max_steps=5000, on_failure="raise").value
    solution = solve(problem, tol=tol, on_failure="raise")
    error = problem.operator.norm(solution.value - exact)
    assert (error <= solution.error_bound + 1e-12).all()
    assert (solution.error_bound <= 100 * error.max() + 1e-11).all()


def test_error_bound_holds_for_arbitrary_points():
    problem = random_inclusion(20, (500,), Tanh())
    exact = solve(problem, tol=1e-14, on_failure="raise").value
    for scale in (1e-6, 1.0, 1e3):
        z = exact + scale * torch.randn_like(exact)
        assert (problem.operator.norm(z - exact) <= problem.error_bound(z)).all()


def test_error_bound_is_infinite_without_monotonicity():
    operator = DenseOperator(1.5 * torch.eye(3, dtype=torch.float64))
    problem = Inclusion(operator, torch.ones(1, 3, dtype=torch.float64), ReLU())
    assert problem.error_bound(problem.bias).isinf().all()


def test_error_bound_is_infinite_where_nothing_is_known():
    problem = random_inclusion()
    z = problem.bias.clone()
    z[1, 2], z[3, 0] = torch.nan, torch.inf
    infinite = [i in (1, 3) for i in range(9)]
    assert problem.error_bound(z).isinf().tolist() == infinite
    d = torch.full_like(z, 0.5)
    d[1, 0], d[3, 1], d[5] = 1.5, -1e-9, 1.0
    problem = Inclusion(problem.operator, problem.bias, LinearSlope(d))
    assert problem.error_bound(torch.zeros_like(z)).isinf().tolist() == infinite


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        (torch.zeros(3, 11, dtype=torch.float64), "must have 12 units"),
        (torch.zeros(3, 12), "bias is torch.float32 on cpu, W is torch.float64"),
        (torch.zeros(3, 12, dtype=torch.float64, device="meta"), "on meta, W is torch.float64 on"),
    ],
)
def test_bias_that_does_not_fit_is_refused(bias, message):
    problem = random_inclusion()
    with pytest.raises(ValueError, match=message):
        solve(Inclusion(problem.operator, bias, ReLU()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("flush", [False, True])
def test_a_residual_of_small_numbers_is_not_taken_for_none(dtype, flush):
    tiny = torch.finfo(dtype).tiny
    operator = DenseOperator(torch.full((3, 3), -0.5, dtype=dtype))
    v = torch.full((1, 3), 64 * tiny, dtype=dtype)
    problem = Inclusion(operator, v, ReLU())
    torch.set_flush_denormal(flush)
    try:
        residual = problem.relative_residual(torch.zeros_like(v))
        solution = solve(problem, tol=1e-3, on_failure="raise")
    finally:
        torch.set_flush_denormal(False)
    assert float(residual) == 1.0
    torch.testing.assert_close(solution.value, v / 2.5, rtol=3e-3, atol=0.0)
    subnormal = Inclusion(operator, v * 2.0**-16, ReLU())
    assert float(subnormal.relative_residual(torch.zeros_like(v))) == 1.0


def test_the_residual_hides_nothing_of_a_large_bias():
    # One unit is active, and far smaller than v: its residual is what it is.
    v = torch.tensor([[1e-6, -1.0, -1.0]], dtype=torch.float32)
    problem = Inclusion(DenseOperator(torch.zeros(3, 3)), v, ReLU())
    z = torch.tensor([[1.1e-6, 0.0, 0.0]])
    assert float(problem.relative_residual(z)) == pytest.approx(1 / 11, rel=1e-5)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (nn.ReLU(), r"pass solvers\.ReLU\(\)"),
        (torch.relu, r"pass solvers\.ReLU\(\)"),
        (nn.functional.leaky_relu, r"pass solvers\.LeakyReLU\(\)"),
        ("tanh", r"pass solvers\.Tanh\(\)"),
        (Tanh, r"pass solvers\.Tanh\(\)"),
        (nn.GELU(), "one of solvers"),
        (None, "one of solvers"),
    ],
)
def test_other_activations_are_refused_at_once(given, named):
    with pytest.raises(TypeError, match=f"activation must be a ProximalActivation.*{named}"):
        Inclusion(monotone_operator(3), torch.ones(2, 3, dtype=torch.float64), given)


@pytest.mark.parametrize(
    ("operator", "bias", "named"),
    [
        (np.eye(3), torch.ones(2, 3), r"operator must be a LinearOperator.*DenseOperator\(W\)"),
        (torch.eye(3), torch.ones(2, 3), r"operator must be a LinearOperator"),
        (monotone_operator(3), np.ones((2, 3)), "bias must be a torch.Tensor, got numpy.ndarray"),
        (monotone_operator(3), [[1.0, 2.0, 3.0]], r"bias must be a torch.Tensor.*torch\.tensor"),
        (monotone_operator(3), torch.ones(2, 3).long(), "bias must hold real floating-point"),
        (monotone_operator(3), torch.ones(2, 3).to(torch.complex64), "bias must hold real"),
    ],
)
def test_other_pieces_are_refused_at_once(operator, bias, named):
    with pytest.raises(TypeError, match=named):
        Inclusion(operator, bias, ReLU())


def test_pieces_of_unequal_types_are_refused_at_once():
    with pytest.raises(ValueError, match=r"bias is torch\.float32.*W is torch\.float64"):
        Inclusion(monotone_operator(3), torch.ones(2, 3), ReLU())


def test_rationals_agree_with_the_float64_evaluation():
    # The tests' own exact arithmetic, against the library's.
    problem = random_inclusion(6, (5,))
    z = torch.randn_like(problem.bias)
    true = exactly.largest_residual(problem, z)
    assert true == pytest.approx(float(problem.relative_residual(z).max()), rel=1e-12)
    assert Fraction(1, 3) == exactly.product([[Fraction(1, 3)]], [Fraction(1)])[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solve(problem, tol=1e-10)


def test_denormal_numbers_count_where_the_process_reads_them_as_zero():
    W = torch.tensor([[0.5, 0.0], [0.25, 0.0]])
    v = torch.tensor([[1e-40, 3e-42]])  # denormal in float32
    problem = Inclusion(DenseOperator(W), v, ReLU())
    exact = torch.tensor([[2.0, 0.5]], dtype=torch.float64) * v[0, 0].double()
    exact[0, 1] += v[0, 1].double()
    torch.set_flush_denormal(True)
    try:
        bound = problem.error_bound(torch.zeros_like(v))
        solved = solve(problem).error_bound
    finally:
        torch.set_flush_denormal(False)
    assert float(bound) >= float(exact.norm())
    assert float(solved) >= float(exact.norm())  # what was found is zero
    assert float(problem.error_bound(torch.zeros_like(v))) >= float(exact.norm())

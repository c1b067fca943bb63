import pytest
import torch
from torch.autograd import gradcheck

from solvers import (
    DenseOperator,
    DouglasRachford,
    Gradient,
    ImplicitGradient,
    Inclusion,
    JacobianFreeGradient,
    PhantomGradient,
    ReLU,
    SemismoothNewton,
    Tanh,
    TruncatedGradient,
    equilibrium,
)
from tests.problems import random_inclusion

BIASED = [
    TruncatedGradient(),
    PhantomGradient(),
    PhantomGradient(steps=2, damping=1.0),
    JacobianFreeGradient(),
]


def gradients(gradient: Gradient | None, activation=None, scale=1.0):
    problem = random_inclusion(12, (9,), activation or Tanh(), m=0.8)
    W = (problem.operator.W * scale).requires_grad_()
    v = problem.bias.clone().requires_grad_()
    operator = DenseOperator(W, problem.operator.metric)
    z = equilibrium(
        Inclusion(operator, v, activation or Tanh()), tol=1e-13, gradient=gradient
    ).value
    return (W, v, z), torch.autograd.grad(z.sin().sum(), (W, v), create_graph=True)


@pytest.mark.parametrize(
    "method", [DouglasRachford(), SemismoothNewton(patience=0), SemismoothNewton()], ids=repr
)
def test_the_adjoint_may_be_solved_by_another_method(method):
    _, expected = gradients(None, ReLU())
    _, actual = gradients(ImplicitGradient(method=method), ReLU())
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


def test_the_adjoint_has_its_own_tolerance():
    _, exact = gradients(None)
    _, loose = gradients(ImplicitGradient(tol=1e-2))
    error = (loose[1] - exact[1]).norm() / exact[1].norm()
    assert 1e-6 < error < 1e-1


def test_an_unrolled_phantom_gradient_is_the_derivative_of_damped_iterations():
    (W, v, z), (W_grad, v_grad) = gradients(PhantomGradient(steps=3, damping=0.7), scale=0.3)
    W, v, z = W.detach().requires_grad_(), v.detach().requires_grad_(), z.detach()
    for _ in range(3):
        z = 0.3 * z + 0.7 * torch.tanh(z @ W.T + v)
    expected_W, expected_v = torch.autograd.grad(z.sin().sum(), (W, v))
    torch.testing.assert_close(v_grad, expected_v, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(W_grad, expected_W, rtol=1e-9, atol=1e-11)


def test_the_phantom_gradient_approaches_the_exact_one_where_the_iteration_contracts():
    _, (_, exact) = gradients(None, scale=0.2)
    errors = []
    for steps in (1, 4, 16, 64):
        _, (_, v_grad) = gradients(PhantomGradient(steps=steps), scale=0.2)
        errors.append(float((v_grad - exact).detach().norm() / exact.detach().norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.1
    assert errors[-1] < 1e-6


def test_the_truncated_gradient_approaches_the_exact_one_where_the_plain_iteration_diverges():
    _, (_, exact) = gradients(None, ReLU())
    errors = []
    for steps in (1, 3, 9, 40):
        _, (_, v_grad) = gradients(TruncatedGradient(steps=steps), ReLU())
        errors.append(float((v_grad - exact).detach().norm() / exact.detach().norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.05
    assert errors[-1] < 1e-6


def test_the_jacobian_free_gradient_is_one_undamped_phantom_step():
    _, one = gradients(JacobianFreeGradient())
    _, other = gradients(PhantomGradient(steps=1, damping=1.0))
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("gradient", BIASED, ids=repr)
def test_biased_gradients_have_no_second_derivative_and_say_so(gradient):
    (_, v, _), (_, v_grad) = gradients(gradient)
    with pytest.raises(NotImplementedError, match="is not the gradient of a function"):
        torch.autograd.grad(v_grad.sum(), v)


@pytest.mark.parametrize("gradient", BIASED, ids=repr)
def test_biased_gradients_say_so_also_where_the_cotangent_is_constant(gradient):
    (_, v, z), _ = gradients(gradient)
    (v_grad,) = torch.autograd.grad(z.sum(), v, create_graph=True)
    with pytest.raises(NotImplementedError, match="is not the gradient of a function"):
        v_grad.sum().backward()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"damping": 0.0}, r"damping must lie in \(0, 1\]"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PhantomGradient(**options)
    with pytest.raises(ValueError, match="steps must be at least 1"):
        TruncatedGradient(steps=0)


def test_a_hard_problem_switches_its_adjoint_to_lu_and_stays_exact():
    problem = random_inclusion(40, (20,), m=0.003, skew=30.0)
    v = problem.bias.clone().requires_grad_()
    solution = equilibrium(
        Inclusion(problem.operator, v, ReLU()), tol=1e-12, max_steps=20000, on_failure="raise"
    )
    assert float(solution.stats.steps.double().mean()) > 500
    (switched,) = torch.autograd.grad(solution.value.sum(), v)
    D = (solution.value > 0).double()
    matrix = torch.eye(40, dtype=torch.float64) - problem.operator.W.T * D[:, None, :]
    # (I − WᵀD) λ = g, u = Dλ
    expected = D * torch.linalg.solve(matrix, torch.ones_like(v))
    torch.testing.assert_close(switched, expected, rtol=1e-7, atol=1e-8)


def test_forward_mode_is_refused_not_dropped():
    problem = random_inclusion()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(problem.bias, torch.ones_like(problem.bias))
        with pytest.raises(RuntimeError, match="jvp"):
            equilibrium(Inclusion(problem.operator, dual, problem.activation))


def test_exact_gradient_passes_gradcheck_by_newton():
    problem = random_inclusion(5, (2,), ReLU(), m=0.6)

    def f(W, v):
        inclusion = Inclusion(DenseOperator(W, problem.operator.metric), v, ReLU())
        return equilibrium(inclusion, SemismoothNewton(patience=3), tol=1e-13).value

    W, v = problem.operator.W.clone().requires_grad_(), problem.bias.clone().requires_grad_()
    assert gradcheck(f, (W, v))

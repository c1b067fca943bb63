from itertools import pairwise

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from solvers import (
    DenseOperator,
    Inclusion,
    JacobiDeterminant,
    LeakyReLU,
    LinearSlope,
    Masked,
    ReLU,
    Sigmoid,
    Softplus,
    Tanh,
    equilibrium,
    fixed_step_equilibrium,
    refine_inverse,
    resolvent_inverse,
    solve,
)
from tests.problems import random_inclusion

ACTIVATIONS = [ReLU(), LeakyReLU(0.2), Tanh(), Sigmoid(), Softplus()]


def pieces(problem):
    operator = problem.operator
    return operator.W, problem.bias, problem.activation, operator.metric


@pytest.mark.parametrize("step_size", [1.0, 0.5, JacobiDeterminant()], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
def test_enough_steps_reach_the_solution(activation, dtype, step_size):
    problem = random_inclusion(activation=activation, dtype=dtype, batch=(2, 3))
    W, v, σ, metric = pieces(problem)
    α = step_size if isinstance(step_size, float) else step_size(problem.operator)
    z, residual = fixed_step_equilibrium(W, v, σ, step_size=α, steps=300, metric=metric)
    tol = 100 * torch.finfo(dtype).eps
    expected = solve(problem, tol=tol, max_steps=20000, on_failure="raise").value
    assert z.dtype == residual.dtype == dtype
    assert residual.shape == (2, 3)
    assert (residual <= tol).all()
    torch.testing.assert_close(z, expected, rtol=0, atol=100 * tol)


@pytest.mark.parametrize("activation", [ReLU(), Tanh()], ids=repr)
def test_residual_is_the_problems_own_and_hides_nothing(activation):
    problem = random_inclusion(activation=activation)
    W, v, σ, metric = pieces(problem)
    before = 10.0
    for steps in (1, 5, 25):
        z, residual = fixed_step_equilibrium(W, v, σ, step_size=0.5, steps=steps, metric=metric)
        torch.testing.assert_close(residual, problem.relative_residual(z))
        assert 1e-12 < residual.max() < before
        before = 0.5 * residual.max()
    plain = fixed_step_equilibrium(W, v, σ, step_size=0.5, steps=5)[1]
    again = Inclusion(DenseOperator(W), v, σ)
    z = fixed_step_equilibrium(W, v, σ, step_size=0.5, steps=5)[0]
    torch.testing.assert_close(plain, again.relative_residual(z))


def test_a_matrix_without_an_inverse_shows_in_the_residual():
    W, v = 2.0 * torch.eye(3), torch.ones(2, 3)  # I + (I − W) = 0
    _, residual = fixed_step_equilibrium(W, v, ReLU(), step_size=1.0, steps=5)
    assert not (residual < 1e-3).any()


def test_steps_are_those_of_the_splitting_and_so_is_a_mask():
    problem = random_inclusion(activation=Masked(Tanh(), torch.arange(12) % 3 != 0))
    W, v, σ, _ = pieces(problem)
    z, _ = fixed_step_equilibrium(W, v, σ, step_size=0.4, steps=200)
    torch.testing.assert_close(z, solve(problem, tol=1e-12).value, rtol=0, atol=1e-10)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
def test_gradient_is_the_implicit_one(activation):
    problem = random_inclusion(activation=activation)
    W, v, σ, metric = pieces(problem)
    α = JacobiDeterminant()(problem.operator)
    W, v = W.requires_grad_(), v.requires_grad_()
    g = torch.randn_like(v)
    exact = equilibrium(Inclusion(DenseOperator(W, metric), v, σ), tol=1e-13, max_steps=20000)
    expected = torch.autograd.grad(exact.value, (W, v), g)
    z, residual = fixed_step_equilibrium(W, v, σ, step_size=α, steps=300)
    assert not residual.requires_grad
    torch.testing.assert_close(torch.autograd.grad(z, (W, v), g), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("activation", [LeakyReLU(0.2), Tanh()], ids=repr)
@pytest.mark.parametrize("batch", [(), (3,), (2, 2)])
def test_gradcheck(activation, batch):
    problem = random_inclusion(5, batch, activation)
    W, v, σ, _ = pieces(problem)
    torch.autograd.gradcheck(
        lambda W, v: fixed_step_equilibrium(W, v, σ, step_size=1.0, steps=100)[0],
        (W.requires_grad_(), v.requires_grad_()),
    )


def test_gradient_of_one_argument_alone_and_no_second_derivative():
    W, v, σ, _ = pieces(random_inclusion())
    W.requires_grad_()
    z, _ = fixed_step_equilibrium(W, v, σ, step_size=0.5, steps=200)
    (first,) = torch.autograd.grad(z.sum(), W, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative: use equilibrium"):
        first.sum().backward()


def test_residual_of_the_adjoint_is_told_and_its_steps_act():
    problem = random_inclusion(activation=Tanh())
    W, v, σ, metric = pieces(problem)
    v.requires_grad_()
    g, found = torch.randn_like(v), []
    for steps in (2, 200):
        r = torch.full((9,), torch.nan, dtype=v.dtype)
        z, _ = fixed_step_equilibrium(
            W,
            v,
            σ,
            step_size=0.5,
            steps=200,
            backward_steps=steps,
            metric=metric,
            adjoint_residual=r,
        )
        assert r.isnan().all()
        (u,) = torch.autograd.grad(z, v, g)
        adjoint = Inclusion(DenseOperator(W, metric).T, g, LinearSlope(σ.slope(z.detach())))
        torch.testing.assert_close(r, adjoint.relative_residual(u))
        found.append(float(r.max()))
    assert found[0] > 1e-3 > 1e-10 > found[1]


def test_changed_weights_are_noticed():
    W, v, σ, _ = pieces(random_inclusion())
    z, _ = fixed_step_equilibrium(W, v, σ, step_size=0.5, steps=200)
    W.mul_(0.5)
    moved, _ = fixed_step_equilibrium(W, v, σ, step_size=0.5, steps=200)
    expected = solve(Inclusion(DenseOperator(W), v, σ), tol=1e-12).value
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-10)
    assert (moved - z).abs().max() > 1e-2


@pytest.mark.parametrize("step_size", [0.5, torch.linspace(0.3, 0.9, 12, dtype=torch.float64)])
def test_an_inverse_that_is_given_gives_what_one_that_is_computed_does(step_size):
    W, v, σ, metric = pieces(random_inclusion(activation=Tanh()))
    W, v = W.requires_grad_(), v.requires_grad_()
    options = {"step_size": step_size, "steps": 40, "metric": metric}
    inverse = resolvent_inverse(W, step_size=step_size)
    assert not inverse.requires_grad
    A = torch.eye(12) + torch.as_tensor(step_size).reshape(-1, 1) * (torch.eye(12) - W)
    torch.testing.assert_close(A @ inverse, torch.eye(12, dtype=W.dtype))
    z, residual = fixed_step_equilibrium(W, v, σ, inverse=inverse, **options)
    expected, own = fixed_step_equilibrium(W, v, σ, **options)
    assert torch.equal(z, expected)
    assert torch.equal(residual, own)
    g = torch.randn_like(z)
    for found, wanted in zip(
        torch.autograd.grad(z, (W, v), g), torch.autograd.grad(expected, (W, v), g), strict=True
    ):
        assert torch.equal(found, wanted)


def test_the_residual_tells_of_an_inverse_that_is_none():
    W, v, σ, _ = pieces(random_inclusion())
    near = 1.05 * resolvent_inverse(W, step_size=0.5)
    options = {"step_size": 0.5, "steps": 200}
    _, residual = fixed_step_equilibrium(W, v, σ, inverse=near, **options)
    assert (residual > 1e-3).all()
    r = torch.zeros_like(residual)
    z, _ = fixed_step_equilibrium(
        W.requires_grad_(), v, σ, inverse=near, adjoint_residual=r, **options
    )
    z.sum().backward()
    assert (r > 1e-3).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_inverse_is_refined_by_squares(dtype):
    W = pieces(random_inclusion(dtype=dtype))[0]
    exact, eps = resolvent_inverse(W, step_size=0.5), torch.finfo(dtype).eps
    near = exact + 0.02 * torch.randn_like(exact)
    errors = [float(refine_inverse(W, near, step_size=0.5, steps=k)[1]) for k in (1, 2, 3, 6)]
    for before, after in pairwise(errors):
        assert after <= 1.01 * before**2 + 100 * eps
    assert errors[-1] < 100 * eps
    X, _ = refine_inverse(W, near, step_size=0.5, steps=6)
    torch.testing.assert_close(X, exact, rtol=0, atol=100 * eps)
    _, error = refine_inverse(W, -exact, step_size=0.5, steps=3)
    assert not error < 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda W: refine_inverse(W, W, step_size=0.5, steps=0), "at least 1, got 0"),
        (lambda W: refine_inverse(W, W[:2], step_size=0.5, steps=1), r"\(3, 3\).*\(2, 3\)"),
        (lambda W: refine_inverse(W, W.double(), step_size=0.5, steps=1), "float64"),
        (lambda W: refine_inverse(W, W, step_size=0.0, steps=1), "positive and finite, got 0"),
        (lambda W: resolvent_inverse(W[:2], step_size=0.5), "square"),
        (lambda W: resolvent_inverse(W, step_size=-1.0), "positive and finite, got -1"),
    ],
)
def test_bad_inverses_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(3, 3))


class NoLook(TorchDispatchMode):
    """Refuses to tell a number, and to bring one from the host: either waits for the device."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "equal", "nonzero", "lift_fresh"), name
        return operation(*args, **kwargs or {})


@pytest.mark.parametrize("look", [float, torch.equal, torch.as_tensor, torch.Tensor.new_tensor])
def test_a_look_is_seen(look):
    x = torch.ones(())
    rest = {torch.equal: (x + 1,), torch.Tensor.new_tensor: (0.5,)}.get(look, ())
    with NoLook(), pytest.raises(AssertionError):
        look(0.5 if look is torch.as_tensor else x, *rest)


@pytest.mark.parametrize("step_size", [0.5, torch.tensor(0.5), torch.full((4,), 0.5)], ids=str)
@pytest.mark.parametrize("activation", [*ACTIVATIONS, Masked(Tanh(), torch.ones(4) > 0)], ids=repr)
def test_nothing_waits_for_the_device(activation, step_size):
    W, v = torch.zeros(4, 4, requires_grad=True), torch.ones(3, 4)
    r = torch.zeros(3)
    with NoLook():
        z, _ = fixed_step_equilibrium(
            W, v, activation, step_size=step_size, steps=3, adjoint_residual=r
        )
        z.sum().backward()
        X, _ = refine_inverse(W, W, step_size=step_size, steps=2)
        fixed_step_equilibrium(W, v, activation, step_size=step_size, steps=3, inverse=X)


def test_autocast_does_not_reach_the_products():
    W, v, σ, _ = pieces(random_inclusion(dtype=torch.float32))
    plain = fixed_step_equilibrium(W, v, σ, step_size=0.5, steps=50)
    with torch.autocast("cpu", torch.bfloat16):
        cast = fixed_step_equilibrium(W, v, σ, step_size=0.5, steps=50)
    torch.testing.assert_close(cast, plain, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"backward_steps": 0}, "backwards 0"),
        ({"W": torch.zeros(4, 3)}, "square"),
        ({"v": torch.zeros(2, 5)}, "4 units"),
        ({"v": torch.zeros(2, 4, dtype=torch.float64)}, "float64"),
        ({"v": torch.zeros(2, 4, dtype=torch.bfloat16)}, "bfloat16"),
        ({"step_size": -1.0}, "positive and finite, got -1"),
        ({"step_size": torch.ones(3)}, r"one per unit, shape \(4,\)"),
        ({"step_size": torch.ones(4, dtype=torch.float64)}, "got .* of torch.float64"),
        ({"metric": torch.ones(3)}, "metric"),
        ({"inverse": torch.ones(3, 3)}, r"shaped as W, \(4, 4\).*got \(3, 3\)"),
        ({"adjoint_residual": torch.ones(3)}, r"shape \(2,\), got \(3,\)"),
        ({"activation": LinearSlope(torch.ones(2, 4).requires_grad_())}, "slopes get no gradient"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_refused(change, message):
    given = {
        "W": torch.zeros(4, 4),
        "v": torch.zeros(2, 4),
        "activation": ReLU(),
        "step_size": 1.0,
        "steps": 3,
    }
    with pytest.raises(ValueError, match=message):
        fixed_step_equilibrium(**given | change)

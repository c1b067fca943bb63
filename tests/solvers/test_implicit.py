import pytest
import torch

from solvers import (
    DenseOperator,
    ForwardBackward,
    Inclusion,
    JacobianFreeGradient,
    LeakyReLU,
    LinearSlope,
    NonFiniteError,
    PeacemanRachford,
    PhantomGradient,
    ReLU,
    Sigmoid,
    Softplus,
    SolveError,
    SolveWarning,
    Tanh,
    TruncatedGradient,
    equilibrium,
    solve,
)
from tests.problems import (
    block_triangular_operator,
    convolution_operator,
    low_rank_operator,
    monotone_operator,
    random_inclusion,
    updated_convolution_operator,
)

ACTIVATIONS = [ReLU(), LeakyReLU(0.2), Tanh(), Sigmoid(), Softplus()]
TIGHT = {"tol": 1e-13, "max_steps": 5000, "on_failure": "raise"}


def parts(activation, n=5, batch=(3,), **options):
    problem = random_inclusion(n, batch, activation, **options)
    W, v = problem.operator.W.requires_grad_(), problem.bias.requires_grad_()
    return W, problem.operator.metric, v


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
@pytest.mark.parametrize("method", [PeacemanRachford(), ForwardBackward()], ids=repr)
def test_first_and_second_derivatives(activation, method):
    W, metric, v = parts(activation, n=3, batch=(2,), m=1.0)

    def f(W, v):
        return equilibrium(
            Inclusion(DenseOperator(W, metric), v, activation), method, **TIGHT
        ).value

    assert torch.autograd.gradcheck(f, (W, v))
    assert torch.autograd.gradgradcheck(f, (W, v))


def test_derivatives_of_the_linear_problem_in_its_slope():
    W, metric, v = parts(Tanh())
    d = torch.rand(3, 5, dtype=torch.float64).requires_grad_()

    def f(W, v, d):
        return equilibrium(Inclusion(DenseOperator(W, metric), v, LinearSlope(d)), **TIGHT).value

    assert torch.autograd.gradcheck(f, (W, v, d))
    assert torch.autograd.gradgradcheck(f, (W, v, d))


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
def test_implicit_equals_unrolled(activation):
    # ‖W‖₂ = 0.7, so plain iteration converges and can be unrolled.
    W = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0].mul_(0.7).requires_grad_()
    v = torch.randn(6, 8, dtype=torch.float64).requires_grad_()
    weight = torch.randn(6, 8, dtype=torch.float64)
    implicit = equilibrium(Inclusion(DenseOperator(W), v, activation), **TIGHT).value
    expected = torch.autograd.grad((implicit * weight).sum(), (W, v))
    z = torch.zeros_like(v)
    for _ in range(120):
        z = activation(z @ W.T + v)
    torch.testing.assert_close(z, implicit, rtol=1e-8, atol=1e-10)
    actual = torch.autograd.grad((z * weight).sum(), (W, v))
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-8)


def test_gradient_in_closed_form():
    # n = 1, ReLU active: z = v / (1 − w).
    w, v = (
        torch.tensor([[-2.0]], dtype=torch.float64, requires_grad=True),
        torch.tensor([[3.0]], dtype=torch.float64, requires_grad=True),
    )
    z = equilibrium(Inclusion(DenseOperator(w), v, ReLU()), **TIGHT).value
    z.sum().backward()
    assert z.item() == pytest.approx(1.0)
    assert v.grad.item() == pytest.approx(1 / 3)
    assert w.grad.item() == pytest.approx(1 / 3)


def test_double_use_in_one_graph():
    W, metric, v = parts(Tanh())

    def f(W, v):
        operator = DenseOperator(W, metric)
        z = equilibrium(Inclusion(operator, v, Tanh()), **TIGHT).value
        return equilibrium(Inclusion(operator, z * z, Tanh()), **TIGHT).value + z

    assert torch.autograd.gradcheck(f, (W, v))


def test_nothing_is_recorded_without_need():
    problem = random_inclusion()
    assert not equilibrium(problem).value.requires_grad
    problem.bias.requires_grad_()
    with torch.no_grad():
        assert not equilibrium(problem).value.requires_grad
    assert equilibrium(problem).value.requires_grad
    assert not solve(problem).value.requires_grad


def test_saved_memory_does_not_grow_with_iterations():
    def saved(tol):
        problem = random_inclusion(30, (16,), Tanh(), m=0.05, skew=3.0)
        problem.operator.W.requires_grad_()
        problem.bias.requires_grad_()
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.append(t.numel()) or t, lambda t: t
        ):
            solution = equilibrium(problem, tol=tol, max_steps=5000)
        return sum(sizes), solution.stats.max_steps

    loose, few = saved(1e-2)
    tight, many = saved(1e-12)
    assert many > 2 * few
    assert loose == tight <= 3 * (30 * 30 + 16 * 30)


def test_forward_and_backward_share_one_factorization(monkeypatch):
    count = []
    original = torch.linalg.inv_ex
    monkeypatch.setattr(torch.linalg, "inv_ex", lambda A: count.append(1) or original(A))
    W, metric, v = parts(ReLU())
    equilibrium(Inclusion(DenseOperator(W, metric), v, ReLU()), **TIGHT).value.sum().backward()
    assert len(count) == 1


def test_weight_changed_in_place_before_backward_is_noticed():
    W, metric, v = parts(ReLU())
    z = equilibrium(Inclusion(DenseOperator(W, metric), v, ReLU())).value
    with torch.no_grad():
        W.add_(0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def test_failed_adjoint_solve_warns():
    W, metric, v = parts(Softplus(), n=20, batch=(4,))
    problem = Inclusion(DenseOperator(W, metric), v, Softplus())
    z0 = solve(problem, tol=1e-14, max_steps=2000).value
    z = equilibrium(problem, tol=1e-13, max_steps=6, z0=z0).value
    with pytest.warns(SolveWarning, match="adjoint solve by SemismoothNewton"):
        z.sum().backward()


def test_torch_func_gradient():
    problem = random_inclusion(6, (4,), Tanh())

    def f(v):
        return equilibrium(Inclusion(problem.operator, v, Tanh()), **TIGHT).value.square().sum()

    v = problem.bias.clone().requires_grad_()
    (expected,) = torch.autograd.grad(f(v), v)
    torch.testing.assert_close(torch.func.grad(f)(problem.bias), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_is_kept(dtype):
    problem = random_inclusion(dtype=dtype)
    problem.bias.requires_grad_()
    z = equilibrium(problem).value
    z.sum().backward()
    assert z.dtype == problem.bias.grad.dtype == dtype


OPERATORS = {
    "dense": lambda: monotone_operator(4),
    "low rank": lambda: low_rank_operator(5, 2),
    "convolution": lambda: convolution_operator(2, 3, (3, 4)),
    "convolution plus low rank": updated_convolution_operator,
    "block triangular": lambda: block_triangular_operator(monotone=True),
}


def state_of(kind, gradient=None, activation=None):
    """Return z as a function of v and of the tensors of W, with some of both."""
    operator = OPERATORS[kind]()
    options = {"tol": 1e-12, "max_steps": 5000, "on_failure": "raise", "gradient": gradient}

    def z(v, *tensors):
        W = operator.rebuild(tensors) if tensors else operator
        return equilibrium(Inclusion(W, v, activation or Tanh()), **options).value

    return z, torch.randn(3, operator.n, dtype=torch.float64), operator.tensors


@pytest.mark.parametrize("kind", OPERATORS)
def test_jacobians_by_every_transform(kind):
    z, v, _ = state_of(kind)
    expected = torch.stack([torch.autograd.functional.jacobian(z, row) for row in v])
    near = {"rtol": 1e-8, "atol": 1e-9}
    func = torch.func
    torch.testing.assert_close(func.vmap(z)(v), z(v), **near)
    torch.testing.assert_close(func.vmap(func.jacrev(z))(v), expected, **near)
    for size in (1, 2):
        torch.testing.assert_close(func.jacrev(z, chunk_size=size)(v[0]), expected[0], **near)
    vectorized = torch.autograd.functional.jacobian(z, v[0], vectorize=True)
    torch.testing.assert_close(vectorized, expected[0], **near)
    x = v.clone().requires_grad_()
    cotangents = torch.randn(2, *v.shape, dtype=v.dtype)
    (batched,) = torch.autograd.grad(z(x), x, cotangents, is_grads_batched=True)
    torch.testing.assert_close(batched, torch.einsum("mbi,bij->mbj", cotangents, expected), **near)
    hessian = torch.autograd.functional.hessian(lambda v: z(v).sum(), v[0])
    found = func.jacrev(func.jacrev(lambda v: z(v).sum()))(v[0])
    torch.testing.assert_close(found, hessian, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", OPERATORS)
def test_weights_may_be_mapped(kind):
    z, v, tensors = state_of(kind)
    stacked = tuple(torch.stack([t, 0.9 * t]) for t in tensors)
    members = [z(v, *(t[i] for t in stacked)) for i in (0, 1)]
    mapped = torch.func.vmap(z, (None, *(0 for _ in tensors)))(v, *stacked)
    torch.testing.assert_close(mapped, torch.stack(members), rtol=1e-9, atol=1e-10)
    wrt = tuple(range(1, 1 + len(tensors)))
    gradient = torch.func.grad(lambda *a: z(*a).square().sum(), argnums=wrt)
    per_sample = torch.func.vmap(gradient, (0, *(None for _ in tensors)))(v, *tensors)
    for i, row in enumerate(v):
        own = tuple(t.detach().clone().requires_grad_() for t in tensors)
        expected = torch.autograd.grad(z(row, *own).square().sum(), own)
        for found, e in zip(per_sample, expected, strict=True):
            torch.testing.assert_close(found[i], e, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize(
    "gradient", [TruncatedGradient(), PhantomGradient(), JacobianFreeGradient()], ids=repr
)
def test_biased_gradients_take_transforms(gradient):
    z, v, _ = state_of("dense", gradient)
    expected = torch.stack([torch.autograd.functional.jacobian(z, row) for row in v])
    torch.testing.assert_close(torch.func.vmap(torch.func.jacrev(z))(v), expected)


def test_forward_mode_is_refused_in_a_sentence():
    z, v, _ = state_of("dense")
    with pytest.raises(RuntimeError, match=r"no forward-mode derivatives \(jvp.*take reverse"):
        torch.func.jvp(z, (v,), (v,))
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises(RuntimeError, match="no forward-mode derivatives"),
    ):
        z(torch.autograd.forward_ad.make_dual(v, v))


def test_evidence_within_a_transform():
    problem, bounds = random_inclusion(4, (3,), Tanh()), []

    def z(v):
        solution = equilibrium(Inclusion(problem.operator, v, Tanh()), tol=1e-10)
        assert solution.converged
        with pytest.raises(RuntimeError, match="error_bound is evaluated for plain tensors"):
            bounds.append(solution.error_bound)
        return solution.value, solution.residual, solution.stats.steps

    value, residual, steps = torch.func.vmap(z)(problem.bias)
    assert value.shape == (3, 4)
    assert residual.shape == steps.shape == (3,)
    assert float(residual.max()) <= 1e-10
    hard = random_inclusion(4, (3,), Tanh(), m=1e-3)
    with pytest.raises(SolveError):
        torch.func.vmap(
            lambda v: (
                equilibrium(
                    Inclusion(hard.operator, v, Tanh()), tol=1e-12, max_steps=1, on_failure="raise"
                ).value
            )
        )(hard.bias)
    with pytest.raises(NonFiniteError, match="bias contains NaN"):
        torch.func.vmap(lambda v: equilibrium(Inclusion(hard.operator, v, Tanh())).value)(
            torch.full_like(hard.bias, torch.nan)
        )

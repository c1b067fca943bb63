import pytest
import torch

from solvers import (
    DenseOperator,
    DouglasRachford,
    ForwardBackward,
    Inclusion,
    LeakyReLU,
    LinearSlope,
    PeacemanRachford,
    ReLU,
    Tanh,
    native,
    solve,
)
from solvers.native import library
from tests.problems import monotone_operator, random_inclusion

pytestmark = pytest.mark.skipif(
    library.build().kernels is None, reason=f"no compiled kernels here: {native.status()}"
)
METHODS = [PeacemanRachford, DouglasRachford, ForwardBackward]


def activation(kind, problem):
    if kind == "linear":
        return LinearSlope(torch.rand_like(problem.bias).round(decimals=1))
    return {"relu": ReLU(), "leaky": LeakyReLU(0.2)}[kind]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["relu", "leaky", "linear"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("n", "samples"), [(1, 3), (5, 1), (17, 40), (48, 33), (70, 130)])
def test_compiled_and_plain_loop_agree(method, kind, dtype, n, samples):
    problem = random_inclusion(n, (samples,), dtype=dtype, m=1.0, seed=n)
    problem = Inclusion(problem.operator, problem.bias, activation(kind, problem))
    tol = 1e-11 if dtype == torch.float64 else 2e-6
    one = solve(problem, method(compiled=True), tol=tol, max_steps=20000, on_failure="raise")
    other = solve(problem, method(compiled=False), tol=tol, max_steps=20000, on_failure="raise")
    assert (one.stats.loop, other.stats.loop) == ("compiled", "torch")
    assert (problem.relative_residual(one.value, problem.noise) <= 1.01 * tol).all()
    distance = problem.operator.norm(one.value - other.value)
    assert (distance <= one.error_bound + other.error_bound).all()
    torch.testing.assert_close(
        one.value, other.value, atol=2e3 * tol * float(other.value.abs().max()), rtol=0
    )


@pytest.mark.parametrize("method", METHODS)
def test_a_given_number_of_steps_gives_the_same_iterate(method):
    problem = random_inclusion(30, (50,), m=0.05, skew=3.0)
    z0 = torch.randn_like(problem.bias)
    for k in (2, 3, 7):
        options = {"tol": 1e-14, "max_steps": k, "z0": z0}
        with pytest.warns(RuntimeWarning, match=f"stopped at its step limit after {k} steps"):
            one = solve(problem, method(compiled=True), **options)
        with pytest.warns(RuntimeWarning, match=f"stopped at its step limit after {k} steps"):
            other = solve(problem, method(compiled=False), **options)
        torch.testing.assert_close(one.value, other.value, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(one.residual, other.residual, rtol=1e-9, atol=1e-12)


def test_the_result_does_not_depend_on_the_number_of_threads():
    problem = random_inclusion(33, (500,), dtype=torch.float32, m=0.05)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = solve(problem, tol=1e-5, on_failure="raise")
        torch.set_num_threads(2)
        two = solve(problem, tol=1e-5, on_failure="raise")
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one.value, two.value)
    assert torch.equal(one.stats.steps, two.stats.steps)


def test_tensors_of_any_layout_are_read_as_they_are():
    problem = random_inclusion(20, (30,))
    strided = torch.stack([problem.bias, torch.randn_like(problem.bias)], -1)[..., 0]
    assert not strided.is_contiguous()
    expected = solve(problem, tol=1e-12).value
    actual = solve(Inclusion(problem.operator, strided, problem.activation), tol=1e-12).value
    assert torch.equal(actual, expected)
    adjoint = Inclusion(
        problem.operator.T, problem.bias, LinearSlope(torch.rand(20, 30).double().T)
    )
    one = solve(adjoint, PeacemanRachford(compiled=True), tol=1e-12).value
    other = solve(adjoint, PeacemanRachford(compiled=False), tol=1e-12).value
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", METHODS)
def test_weights_changed_in_place_are_solved_as_they_are(method, dtype):
    problem = random_inclusion(20, (9,), dtype=dtype, m=1.0)
    solve(problem, method(compiled=True), on_failure="raise").error_bound.max()
    with torch.no_grad():
        problem.operator.W.mul_(0.5)
    solution = solve(problem, method(compiled=True), on_failure="raise")
    fresh = DenseOperator(problem.operator.W.clone(), problem.operator.metric)
    fresh = Inclusion(fresh, problem.bias, problem.activation)
    assert (fresh.relative_residual(solution.value) <= 1.01e-4).all()
    assert torch.equal(solution.error_bound, fresh.error_bound(solution.value))


@pytest.mark.parametrize(
    ("dtype", "exponent"),
    [(torch.float64, e) for e in (-300, -200, -160, 160, 300)]
    + [(torch.float32, e) for e in (-30, -20, 20, 30)],
)
@pytest.mark.parametrize("kind", ["relu", "leaky", "linear"])
@pytest.mark.parametrize("method", METHODS)
def test_biases_of_any_size_are_solved(method, kind, dtype, exponent):
    problem = random_inclusion(20, (9,), dtype=dtype, m=1.0)
    activation_ = activation(kind, problem)
    scale = torch.tensor([1.0, 10.0**exponent, 10.0**exponent] * 3, dtype=dtype)[:, None]
    problem = Inclusion(problem.operator, problem.bias * scale, activation_)
    z0 = torch.randn_like(problem.bias) * scale
    for start in (None, z0):
        solution = solve(problem, method(compiled=True), tol=1e-5, z0=start, on_failure="raise")
        assert (problem.relative_residual(solution.value) <= 1.1e-5).all()
        assert (solution.error_bound <= 1e-2 * problem.operator.norm(solution.value)).all()


def test_the_default_device_is_of_no_concern():
    problem = random_inclusion(20, (9,))
    expected = solve(problem, PeacemanRachford(compiled=True))
    problem = random_inclusion(20, (9,))
    with torch.device("meta"):
        for method in (PeacemanRachford(compiled=True), DouglasRachford(step_size=0.5)):
            solution = solve(problem, method, on_failure="raise")
            assert solution.residual.device == problem.bias.device
    assert torch.equal(solve(problem, PeacemanRachford(compiled=True)).value, expected.value)


def test_a_pending_negation_is_read():
    problem = random_inclusion(6, (4,))
    negated = Inclusion(problem.operator, torch._neg_view(problem.bias), problem.activation)
    assert negated.bias.is_contiguous()
    solution = solve(negated, PeacemanRachford(compiled=True), tol=1e-10)
    assert (negated.relative_residual(solution.value) <= 1.01e-10).all()


def test_the_compiled_loop_is_demanded_where_it_cannot_be():
    with pytest.raises(ValueError, match=r"demanded, but Tanh\(\) is not piecewise linear"):
        solve(random_inclusion(activation=Tanh()), PeacemanRachford(compiled=True))


def test_float32_goes_on_in_float64_where_it_stalls():
    operator = monotone_operator(60, m=0.01, skew=30.0, dtype=torch.float32)
    problem = Inclusion(operator, torch.randn(40, 60), ReLU())
    for in_one in (True, False):
        method = PeacemanRachford(compiled=in_one)
        solution = solve(problem, method, tol=3e-6, max_steps=20000, on_failure="raise")
        double = solve(problem.to(torch.float64), tol=1e-12, max_steps=20000, on_failure="raise")
        error = double.value - solution.value.double()
        assert (operator.to(torch.float64).norm(error) <= solution.error_bound).all()

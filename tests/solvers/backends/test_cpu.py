import subprocess
import sys

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
    solve,
)
from solvers import native as compiled
from solvers.native import library
from tests.problems import monotone_operator, random_inclusion

pytestmark = pytest.mark.skipif(
    library.build().kernels is None, reason=f"no compiled kernels here: {compiled.status()}"
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


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"PATH": ""}, "no C\\+\\+ compiler found"),
        ({"CXX": "false"}, "no compiled kernels: .*false"),
        ({"CXX": "'false"}, "no compiled kernels: No closing quotation"),
        ({"CXX": "env false"}, "no compiled kernels: .*env false failed"),
        (
            {"CXX": "sh -c 'printf \\\\351 >&2; exit 1'"},
            "no compiled kernels: .*sh .*failed: \ufffd",
        ),
        ({"XDG_CACHE_HOME": "/proc/nowhere"}, "no compiled kernels: .*nowhere"),
    ],
)
def test_without_a_compiler_every_solve_runs_in_torch_and_says_so(
    environment, message, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    result = library.build.__wrapped__()
    assert result.kernels is None
    monkeypatch.setattr("solvers.backends.cpu.build", lambda: result)
    problem = random_inclusion()
    assert solve(problem).stats.loop == "torch"
    with pytest.raises(ValueError, match=f"demanded, but .*{message}"):
        solve(problem, PeacemanRachford(compiled=True))


def test_without_a_home_every_solve_runs_in_torch(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(library.Path, "home", no_home)
    assert library.build.__wrapped__().message.endswith(
        "no compiled kernels: Could not determine home directory."
    )


@pytest.mark.parametrize("size", [0, 100, 9000])
def test_a_damaged_library_is_built_again(size, tmp_path):
    code = "from solvers import compiled; print(compiled.status())"
    environment = {"XDG_CACHE_HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "CXX": "env c++"}
    command = [sys.executable, "-c", code]
    for _ in range(2):
        output = subprocess.run(command, env=environment, capture_output=True, check=True).stdout
        assert output.startswith(b"compiled kernels: ")
        (library,) = (tmp_path / "lben").iterdir()
        library.write_bytes(library.read_bytes()[:size])


def test_two_processes_may_build_at_once(tmp_path):
    code = "from solvers import compiled; print(compiled.status())"
    environment = {"XDG_CACHE_HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    both = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    for process in both:
        output, _ = process.communicate(timeout=120)
        assert output.startswith(b"compiled kernels: ")
    assert len(list((tmp_path / "lben").iterdir())) == 1

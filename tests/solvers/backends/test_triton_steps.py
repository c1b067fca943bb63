"""How many compilations does the launcher ask for, and what does a solve do when one fails?"""

import ast
import warnings
from dataclasses import replace

import pytest
import torch

from solvers import LinearSlope, PeacemanRachford, ReLU, solve
from tests.problems import random_inclusion

pytest.importorskip("triton")

from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources

from benchmarks.gpu_cases import Solve
from tests.solvers.fake_driver import launches

__all__ = ["launches"]  # a fixture
SIZES = [80, 256, 600]


@pytest.mark.parametrize("n", SIZES)
def test_the_same_solve_is_compiled_once(launches, n):
    case = Solve(n=n)
    case()
    first, launched = len(launches.compiled), len(launches.launched)
    assert first >= 1
    case()
    assert len(launches.compiled) == first
    assert len(launches.launched) == 2 * launched
    for launch in launches.launched:
        assert all(programs >= 1 for programs in launch.grid)
        assert any(isinstance(value, torch.Tensor) for value in launch.arguments.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", SIZES)
def test_few_compilations_serve_all_batches_limits_and_strides(launches, n, dtype):
    """Each takes seconds when it is first met, in the middle of somebody's training."""
    case = Solve(n=n, dtype=dtype)
    for adjoint in (False, True):
        for samples in (1, 2, 7, 16, 100):
            for max_steps in (2, 16, 1000, 2**31):
                replace(case, samples=samples, max_steps=max_steps, adjoint=adjoint)()
    for (kernel, constants), keys in launches.keys().items():
        words = ", ".join(f"{name}={value}" for name, value in constants)
        assert len(keys) <= 4, f"{kernel} is compiled {len(keys)} times for {words}"


@pytest.mark.parametrize("n", SIZES)
def test_an_empty_batch_launches_nothing(launches, n):
    problem = random_inclusion(n, (0,), dtype=torch.float32, m=1.0)
    assert solve(problem, PeacemanRachford(step_size=1.0)).value.shape == (0, n)
    assert launches.launched == []


def test_launches_say_whether_multiply_adds_are_fused(launches, monkeypatch):
    """Triton 3.9 warns where they do not, and 3.10 stops fusing: products would halve."""
    import triton

    monkeypatch.delenv("TRITON_DEFAULT_FP_FUSION")
    warned = getattr(triton._utils, "warn_once", None)
    if warned is None:
        pytest.skip(f"Triton {triton.__version__} has no opinion")
    warned.cache_clear()
    for n in SIZES:
        Solve(n=n)()
    assert all(one.options.enable_fp_fusion for one in launches.compiled)


def failing(launches, kind):
    """Make every launch fail, and return the lines of which the warning may quote one."""
    if kind == "compilation":
        node = ast.parse("for i in range(3):\n    total = 1").body[0].body[0]
        error = CompilationError("for i in range(3):\n    total = 1", node, "total was a float")
        launches.at_compilation = error
        # The first line says where it was, the last one what it was.
        return [str(error).splitlines()[0], str(error).splitlines()[-1]]
    launches.at_launch = OutOfResources(278528, 232448, "shared memory")
    return [str(launches.at_launch).splitlines()[0]]


@pytest.mark.parametrize("kind", ["compilation", "resources"])
@pytest.mark.parametrize("n", [81, 257, 601])
def test_a_launch_that_fails_goes_on_in_pytorch_with_one_warning(launches, n, kind):
    problem = random_inclusion(n, (5,), m=1.0, skew=0.3)
    lines = failing(launches, kind)
    method = PeacemanRachford(step_size=1.0)
    with pytest.warns(RuntimeWarning) as told:
        first = solve(problem, method, tol=1e-6, on_failure="raise")
    assert launches.compiled, "nothing was launched"
    assert len(told) == 1, [str(one.message) for one in told]
    assert any(line in str(told[0].message) for line in lines), str(told[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = solve(problem, method, tol=1e-6, on_failure="raise")
    plain = solve(problem, replace(method, compiled=False), tol=1e-6, on_failure="raise")
    for solution in (first, again):
        assert solution.stats.loop == "torch"
        torch.testing.assert_close(solution.value, plain.value, rtol=0, atol=0)


def test_an_adjoint_solve_falls_back_too(launches):
    problem = random_inclusion(81, (5,), m=1.0, skew=0.3)
    adjoint = replace(
        problem, operator=problem.operator.T, activation=LinearSlope(torch.ones_like(problem.bias))
    )
    failing(launches, "resources")
    with pytest.warns(RuntimeWarning, match="out of resource"):
        solution = solve(adjoint, PeacemanRachford(step_size=1.0), tol=1e-6, on_failure="raise")
    assert solution.stats.loop == "torch"


def test_other_errors_are_not_swallowed(launches):
    """What is no fault of the JIT is a fault of this library, and has to be seen."""
    problem = random_inclusion(81, (5,), m=1.0, skew=0.3)
    assert isinstance(problem.activation, ReLU)
    launches.at_launch = TypeError("an argument is missing")
    with pytest.raises(TypeError, match="an argument is missing"):
        solve(problem, PeacemanRachford(step_size=1.0), tol=1e-6)

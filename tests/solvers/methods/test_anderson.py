import pytest
import torch

from solvers import Anderson, ForwardBackward, LeakyReLU, PeacemanRachford, ReLU, Tanh, solve
from tests.problems import random_inclusion


def steps(problem, method):
    return solve(problem, method, tol=1e-8, max_steps=20000, on_failure="raise").stats.max_steps


@pytest.mark.parametrize("activation", [ReLU(), Tanh(), LeakyReLU(0.3)], ids=repr)
def test_acceleration_saves_most_steps_of_forward_backward(activation):
    problem = random_inclusion(20, (30,), activation, m=0.3)
    plain = ForwardBackward()
    assert steps(problem, Anderson(method=plain)) < 0.4 * steps(problem, plain)


def test_memory_acts():
    problem = random_inclusion(20, (30,), m=0.3)
    short, long = (Anderson(method=ForwardBackward(), memory=m) for m in (1, 6))
    assert steps(problem, long) < steps(problem, short)


@pytest.mark.parametrize(
    "method", [PeacemanRachford(compiled=False), ForwardBackward(compiled=False)], ids=repr
)
def test_without_accepted_steps_it_is_the_plain_method(method):
    problem = random_inclusion(10, (8,), m=0.5)
    plain = solve(problem, method, tol=1e-9, max_steps=5000)
    guarded = solve(problem, Anderson(method=method, safeguard=0.0), tol=1e-9, max_steps=5000)
    torch.testing.assert_close(plain.value, guarded.value, rtol=1e-9, atol=1e-12)
    assert torch.equal(plain.stats.steps, guarded.stats.steps)


@pytest.mark.parametrize("safeguard", [1e-3, 0.5, 1e6])
@pytest.mark.parametrize("seed", range(4))
def test_no_sample_is_caught_between_kinks(seed, safeguard):
    problem = random_inclusion(20, (30,), seed=seed, m=0.3)
    method = Anderson(method=ForwardBackward(), memory=8, safeguard=safeguard)
    limit = 2.5 * steps(problem, ForwardBackward())
    assert steps(problem, method) <= limit


def test_safeguard_acts():
    problem = random_inclusion(20, (30,), m=0.3)
    free, tight = (Anderson(method=ForwardBackward(), safeguard=d) for d in (1e6, 1e-3))
    assert steps(problem, free) < steps(problem, tight)


def test_warm_start_is_passed_on():
    problem = random_inclusion(20, (30,), m=0.3)
    method = Anderson(method=ForwardBackward())
    cold = solve(problem, method, tol=1e-11, max_steps=5000, on_failure="raise")
    warm = solve(problem, method, tol=1e-9, z0=cold.value)
    assert warm.stats.checks == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_parallel_and_zero_differences_do_no_harm(dtype):
    problem = random_inclusion(1, (5,), dtype=dtype)
    solution = solve(problem, Anderson(memory=6), tol=1e-5, on_failure="raise")
    assert torch.isfinite(solution.value).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": 0}, "memory must be at least 1, got 0"),
        ({"safeguard": -1.0}, "safeguard must be at least 0"),
        ({"safeguard": float("nan")}, "safeguard must be at least 0"),
        ({"method": Anderson()}, "must not be accelerated itself"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        Anderson(**options)

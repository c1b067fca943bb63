"""What every method has: a repr that is Python, and parts that are checked."""

from dataclasses import dataclass

import pytest
import torch

from solvers import (
    Anderson,
    BlockSubstitution,
    DenseOperator,
    ForwardBackward,
    ImplicitGradient,
    Inclusion,
    Method,
    Outcome,
    PeacemanRachford,
    ReLU,
    SemismoothNewton,
    SolveWarning,
    solve,
)
from tests.problems import random_inclusion


@dataclass(frozen=True, kw_only=True, repr=False)
class Iterate(Method):
    """Plain fixed-point iteration: all that a method of one's own has to be."""

    times: int = 5

    def run(self, problem, request):
        z = torch.zeros_like(problem.bias) if request.z0 is None else request.z0
        for _ in range(self.times):
            z = problem.image(z)
        steps = torch.full(z.shape[:1], self.times)
        return Outcome(value=z, residual=problem.relative_residual(z), steps=steps, checks=1)


def test_one_method_of_run_is_enough():
    W, v = 0.1 * torch.randn(6, 6), torch.randn(2, 3, 6)
    problem = Inclusion(DenseOperator(W.double()), v.double(), ReLU())
    with pytest.warns(SolveWarning, match=r"Iterate\(times=1\) stalled above its tolerance"):
        assert not solve(problem, Iterate(times=1), tol=1e-9).converged
    solution = solve(problem, Iterate(times=400), tol=1e-9, on_failure="raise")
    assert solution.value.shape == (2, 3, 6)
    assert solution.method == "Iterate(times=400)"


def test_a_method_runs_itself_and_has_no_fallback_unless_it_says_so():
    problem = random_inclusion()
    assert Iterate().choose(problem) == Iterate()
    assert Iterate().fallbacks(problem, None) == ()
    assert Iterate().step_cause(problem, 1.0, 1.0) == ""


def test_method_repr_is_python():
    method = PeacemanRachford(step_size=0.3)
    assert eval(repr(method)) == method


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: SemismoothNewton(method=PeacemanRachford), r"method must.*PeacemanRachford\(\)"),
        (lambda: BlockSubstitution(method="newton"), "method must be a solvers.Method"),
        (lambda: Anderson(method=SemismoothNewton()), "method must be a splitting"),
        (lambda: ImplicitGradient(method=BlockSubstitution), r"method must.*BlockSubstitution\(\)"),
        (lambda: PeacemanRachford(step_size="best"), "step_size must be a number or"),
        (lambda: ForwardBackward(step_size=True), "step_size must be a number or"),
    ],
)
def test_methods_check_their_parts(make, named):
    with pytest.raises(TypeError, match=named):
        make()

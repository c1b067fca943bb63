"""Each rule is what its formula says, and steps that are none are refused."""

import pytest
import torch

from solvers import (
    Determinant,
    ForwardStep,
    InverseGeometricMean,
    JacobiDeterminant,
    PeacemanRachford,
    StepSizeRule,
    ZeroOperator,
    solve,
)
from solvers.methods.step_size import check_step_size, choose_step_size
from tests.problems import monotone_operator, random_inclusion

RULES = [Determinant(), JacobiDeterminant(), InverseGeometricMean(), ForwardStep()]


def test_determinant_rule_is_near_the_best_constant_step():
    for seed in range(5):
        problem = random_inclusion(40, (20,), seed=seed, m=0.1, skew=2.0)
        grid = torch.logspace(-2, 1, 40).tolist()
        steps = [
            solve(problem, PeacemanRachford(step_size=a), tol=1e-6, max_steps=2000).stats.max_steps
            for a in grid
        ]  # fmt: skip
        chosen = solve(problem, tol=1e-6).stats.max_steps
        assert chosen <= 1.3 * min(steps)


@pytest.mark.parametrize("step", [0.0, -1.0, float("inf"), float("nan")])
def test_bad_step_sizes_are_refused(step):
    with pytest.raises(ValueError, match="step_size must be positive and finite"):
        PeacemanRachford(step_size=step)


def test_rules_of_the_constants_are_their_formulas():
    W = monotone_operator(9)
    m, L = W.constants().m, W.constants().L
    assert InverseGeometricMean()(W) == pytest.approx((m * L) ** -0.5)
    assert ForwardStep()(W) == pytest.approx(m / L**2)


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_a_rule_gives_a_positive_step_that_a_transpose_shares(rule):
    W = monotone_operator(9)
    step = torch.as_tensor(rule(W))
    assert (step > 0).all()
    assert step.shape in ((), (9,))
    torch.testing.assert_close(torch.as_tensor(rule(W.T)), step)


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_where_w_is_zero_every_rule_gives_one(rule):
    step = torch.as_tensor(rule(ZeroOperator(torch.ones(4, dtype=torch.float64))))
    torch.testing.assert_close(step.double(), torch.ones_like(step).double())


def test_a_rule_is_evaluated_once_per_operator_and_a_number_is_itself():
    calls = []

    class Counting(StepSizeRule):
        def __call__(self, operator):
            calls.append(operator)
            return 0.25

    W, rule = monotone_operator(5), Counting()
    assert [choose_step_size(rule, W) for _ in range(3)] == [0.25] * 3
    assert len(calls) == 1
    assert choose_step_size(2, W) == 2.0


def test_a_class_of_rules_is_refused_with_the_instance_to_pass():
    with pytest.raises(TypeError, match=r"pass ForwardStep\(\)"):
        check_step_size(ForwardStep)

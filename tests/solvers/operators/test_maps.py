import torch

from solvers.operators.maps import Reflection, column, own_step, step_key
from tests.problems import monotone_operator


def test_a_reflection_by_solves_is_that_of_the_matrix():
    R = monotone_operator(5).resolvent(0.7)
    x, shift = torch.randn(2, 4, 5, dtype=torch.float64)
    expected = R.reflection().add(x, shift, None)
    out = torch.empty_like(x)
    torch.testing.assert_close(Reflection(R).add(x, shift, out), expected)
    torch.testing.assert_close(out, expected)


def test_steps_are_named_by_value():
    step = torch.tensor([0.1, 0.2])
    key, own = step_key(step), own_step(step)
    assert key == step_key(step.clone())
    step.mul_(2)
    assert key == step_key(own)
    assert key != step_key(step)
    assert step_key(0.5) == 0.5
    assert column(own).shape == (2, 1)
    assert column(0.5) == 0.5

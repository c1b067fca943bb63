import pytest
import torch

from solvers import Inclusion, Tanh, ZeroOperator, solve


def test_an_equilibrium_of_nothing_is_the_activation():
    v = torch.randn(4, 3, dtype=torch.float64)
    solution = solve(Inclusion(ZeroOperator(torch.ones(3, dtype=torch.float64)), v, Tanh()))
    torch.testing.assert_close(solution.value, torch.tanh(v), atol=1e-3, rtol=0)


def test_nothing_rounds_and_nothing_is_lost():
    W, z = ZeroOperator(torch.ones(3)), torch.randn(2, 3)
    for zero in (W.rounding(z), W.losses(), W.unread(z), W.magnitude(z), W.rmv(z)):
        assert not zero.any()
    assert W.tensors == W.pullback(z, z) == ()
    assert (W.constants().m, W.constants().L) == (1.0, 1.0)


@pytest.mark.parametrize(("metric", "error"), [
    (torch.ones(2, 2), ValueError), (torch.ones(2, dtype=torch.long), TypeError), (3, TypeError),
])  # fmt: skip
def test_a_metric_must_be_a_vector_of_numbers(metric, error):
    with pytest.raises(error, match="metric must"):
        ZeroOperator(metric)

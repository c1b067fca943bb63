import pytest
import torch

from solvers.operators.matrix import is_finite
from tests.problems import monotone_operator


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_constants_bound_the_operator_and_are_attained(seed, transposed):
    W = monotone_operator(7, seed=seed)
    W = W.T if transposed else W
    c = W.constants()
    z = torch.randn(20000, 7, dtype=torch.float64)
    Az = z - W.mv(z)
    inner = (W.metric * Az * z).sum(-1) / W.norm(z) ** 2
    gain = W.norm(Az) / W.norm(z)
    assert c.m <= inner.min()
    assert inner.min() < c.m + 0.25 * (inner.max() - c.m)
    assert gain.max() <= c.L
    assert gain.max() > 0.8 * c.L
    assert c.m >= 0.3 - 1e-9


@pytest.mark.parametrize(("numbers", "finite"), [
    ([1.0, -2.0], True), ([3e38, 3e38], True), ([torch.inf, -torch.inf], False),
    ([torch.nan, 1.0], False), ([-torch.inf, 3e38], False),
])  # fmt: skip
def test_sums_that_overflow_are_no_evidence(numbers, finite):
    assert is_finite(torch.tensor(numbers)) == finite

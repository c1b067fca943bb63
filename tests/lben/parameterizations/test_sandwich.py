"""y = √2AᵀSΨσ(√2Ψ⁻¹SBx + b) + b_y is 1-Lipschitz for every Ψ."""

import pytest
import torch

from lben import certify
from lben.parameterizations import Gershgorin, SandwichParameterization, Spectral


@pytest.mark.parametrize("rule", [lambda: Gershgorin(6), lambda: Spectral(2)])
@pytest.mark.parametrize("spread", [0.0, 3.0])
def test_the_certificate_holds_for_every_psi(rule, spread):
    free = SandwichParameterization((6, 3 + 4), 3, rule(), dtype=torch.float64)
    with torch.no_grad():
        free.log_psi.normal_().mul_(spread)
    weights = free.dense(torch.float64).apply(torch.Tensor.detach)
    assert certify(weights).bound == pytest.approx(1, abs=2e-6)
    torch.testing.assert_close(weights.Lambda, (2 * free.log_psi).exp().detach())


def test_no_slopes_exceed_the_bound_and_it_is_approached():
    free = SandwichParameterization((6, 3 + 4), 3, Spectral(4), dtype=torch.float64)
    weights = free.dense(torch.float64).apply(torch.Tensor.detach)
    slopes = (torch.rand(500, 6) > 0.3).double()
    J = (weights.C * slopes[:, None]) @ weights.U
    largest = float(torch.linalg.matrix_norm(J, 2).max())
    assert 0.3 < largest <= 1


@pytest.mark.parametrize("outputs", [0, 7, 9])
def test_outputs_must_leave_a_column_for_inputs(outputs):
    with pytest.raises(ValueError, match="outputs must lie in"):
        SandwichParameterization((6, 7), outputs, Spectral())

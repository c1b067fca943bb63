"""y = x − 2UᵀT⁻¹σ(Ux + b): the weights that are proved are those of the tensors that run."""

import pytest
import torch

from lben import certify
from lben.parameterizations import Gershgorin, ResidualParameterization, Spectral


@pytest.mark.parametrize("rule", [lambda: Gershgorin(6), lambda: Spectral(2)])
def test_the_certificate_holds_and_the_block_is_that_of_T(rule):
    free = ResidualParameterization((6, 4), rule(), dtype=torch.float64)
    weights = free.dense(torch.float64).apply(torch.Tensor.detach)
    assert certify(weights).bound == pytest.approx(1, abs=2e-6)
    torch.testing.assert_close(weights.C, -weights.U.T * weights.Lambda)
    gap = torch.diag(2 / weights.Lambda) - weights.U @ weights.U.T
    assert float(torch.linalg.eigvalsh(gap)[0]) > 0


def test_a_kernel_becomes_its_adjoint_with_the_scale_of_each_channel():
    free = ResidualParameterization((3, 2, 3, 3), Spectral(), dtype=torch.float64)
    weights = free.convolutional(torch.float64, circular=True)
    expected = -weights.U.transpose(0, 1).flip(2, 3) * weights.Lambda[:, None, None]
    torch.testing.assert_close(weights.C, expected)
    assert weights.circular


@pytest.mark.parametrize("shape", [(3, 0), (3, 2, 1)])
def test_bad_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="at least 1"):
        ResidualParameterization(shape, Spectral())

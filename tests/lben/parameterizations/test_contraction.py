"""y = VT^(−½)x + b is 1-Lipschitz for every rule, and starts near the identity."""

import pytest
import torch

from lben import certify
from lben.parameterizations import ContractionParameterization, Gershgorin, Orthonormal, Spectral


@pytest.mark.parametrize(
    "rule", [lambda: Gershgorin(5), lambda: Gershgorin(5, learn_q=False), lambda: Spectral(2)]
)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_no_weight_has_a_norm_above_one(rule, scale):
    free = ContractionParameterization((4, 5), rule(), dtype=torch.float64)
    with torch.no_grad():
        free.V.normal_().mul_(scale)
        weights = free.dense(torch.float64)
    norm = float(torch.linalg.matrix_norm(weights.D, 2))
    assert 0.3 < norm <= 1
    assert certify(weights).bound == pytest.approx(1, abs=2e-6)


def test_square_maps_start_near_the_identity_and_others_orthogonal():
    with torch.no_grad():
        square = ContractionParameterization((8, 8), Spectral(), dtype=torch.float64)
        assert float((square.V - torch.eye(8)).norm()) < 0.5 * 8**0.5
        wide = ContractionParameterization((3, 8), Orthonormal(), dtype=torch.float64)
        torch.testing.assert_close(wide.V @ wide.V.T, torch.eye(3, dtype=torch.float64))


def test_a_convolution_has_its_scales_per_input_channel():
    free = ContractionParameterization((2, 3, 3, 3), Spectral(), dtype=torch.float64)
    V, b, scale = free(torch.float64)
    weights = free.convolutional(torch.float64, circular=False)
    torch.testing.assert_close(weights.D, V * scale[:, None, None])
    assert torch.equal(weights.b_y, b)

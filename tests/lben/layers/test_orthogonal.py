"""Orthogonal convolutions keep norms, and run the symbols whose kernel is proved."""

import copy

import pytest
import torch

from lben import (
    OrthogonalConv2d,
)
from lben.parameterizations.feedforward import UNIT_BOUND
from tests.lben.layers.families import IMAGE, check_gradients, perturb, sample


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("channels", [(3, 3), (2, 5), (5, 2)])
def test_cayley_convolutions_are_proved_and_keep_norms(channels, dtype):
    layer = perturb(OrthogonalConv2d(*channels, image=IMAGE, dtype=dtype))
    assert layer.certificate(IMAGE).bound == UNIT_BOUND
    x = sample(layer, 4)
    change = (layer(x) - layer(torch.zeros_like(x))).flatten(1).norm(dim=1)
    ratio = (change / x.flatten(1).norm(dim=1)).detach()
    assert float(ratio.max()) <= 1 + 1e-6
    if channels[0] <= channels[1]:
        assert float(ratio.min()) > 1 - 1e-5
    error = (copy.deepcopy(layer).double()(x.double()) - layer(x).double()).flatten(1).norm(dim=1)
    assert (error <= layer.rounding(x).double() + 1e-5).all()
    shifted = layer(x.roll((1, 2), (2, 3)))
    torch.testing.assert_close(shifted, layer(x).roll((1, 2), (2, 3)), rtol=1e-4, atol=1e-4)


def test_cayley_convolutions_are_those_of_one_image():
    layer = OrthogonalConv2d(2, 2, image=IMAGE)
    with pytest.raises(ValueError, match="made for images of 5 × 6"):
        layer(torch.zeros(1, 2, 6, 6))
    with pytest.raises(ValueError, match="smaller than the kernel"):
        OrthogonalConv2d(2, 2, 7, image=IMAGE)
    check_gradients(perturb(OrthogonalConv2d(2, 3, image=IMAGE, dtype=torch.float64)))


@pytest.mark.parametrize("channels", [(3, 3), (2, 5), (5, 2)])
@torch.no_grad()
def test_the_kernel_that_is_proved_is_that_of_the_symbols_that_run(channels):
    layer = perturb(OrthogonalConv2d(*channels, image=IMAGE, dtype=torch.float64))
    whole = layer.weights().dense(IMAGE)
    basis = torch.eye(whole.in_features, dtype=torch.float64).view(-1, channels[0], *IMAGE)
    runs = (layer(basis) - layer(torch.zeros_like(basis))).flatten(1)
    found, proved = (torch.linalg.svdvals(matrix) for matrix in (runs, whole.D))
    torch.testing.assert_close(found, proved, rtol=1e-9, atol=1e-9)
    assert whole.D.shape == runs.T.shape
    Q, _, s = layer.parameterization.compute_in_float64(torch.float64)
    assert Q.is_complex()
    assert float(torch.linalg.matrix_norm(Q * s, 2).max()) <= 1
    with pytest.raises(ValueError, match="made for images"):
        layer.certificate((9, 9))

"""Cayley transforms are orthogonal; the convolution's weights are those of its symbols."""

import pytest
import torch
from torch import nn

from lben.parameterizations import CayleyRows
from lben.parameterizations.orthogonal import CayleyConvolution, cayley, register_orthogonal


@pytest.mark.parametrize("shape", [(3, 7), (4, 4), (1, 1)])
def test_cayley_rows_are_orthonormal_and_differentiable(shape):
    V = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    Q = CayleyRows()(V)
    torch.testing.assert_close(Q @ Q.T, torch.eye(shape[0], dtype=Q.dtype))
    assert torch.autograd.gradcheck(CayleyRows(), V)


@pytest.mark.parametrize("shape", [(4, 4), (6, 3), (2, 5, 2)])
def test_cayley_columns_are_orthonormal_for_complex_matrices_too(shape):
    Q = cayley(torch.randn(shape, dtype=torch.complex128))
    torch.testing.assert_close(Q.mH @ Q, torch.eye(shape[-1], dtype=Q.dtype).expand_as(Q.mH @ Q))


@pytest.mark.parametrize("shape", [(3, 3, 3, 3), (2, 4, 3, 3), (4, 2, 3, 3)])
def test_the_kernel_of_a_cayley_convolution_keeps_norms(shape):
    free = CayleyConvolution(shape, (5, 6), dtype=torch.float64)
    D = free.convolutional(torch.float64, circular=True).D.detach()
    values = torch.linalg.svdvals(torch.fft.fft2(D).permute(2, 3, 0, 1))
    assert float(values.max()) <= 1
    assert float(values.min()) > 1 - 1e-5


def test_images_smaller_than_the_kernel_and_dense_weights_are_refused():
    with pytest.raises(ValueError, match="smaller than the kernel"):
        CayleyConvolution((2, 2, 5, 5), (4, 8))
    with pytest.raises(ValueError, match="no dense weights"):
        CayleyConvolution((2, 2, 3, 3), (4, 8)).dense(torch.float32)


def test_a_decayed_diagonal_leaves_householder_matrices_orthogonal():
    linear = nn.Linear(3, 3, bias=False)
    register_orthogonal(linear, "weight", "householder")
    with torch.no_grad():
        linear.parametrizations.weight.original.mul_(0.9)
    torch.testing.assert_close(linear.weight @ linear.weight.T, torch.eye(3))

import pytest
import torch

from solvers.operators import Torus

SIZES = [(1, 1, 1), (2, 3, 4), (3, 4, 3), (1, 5, 5)]


@pytest.mark.parametrize("size", SIZES)
def test_synthesis_inverts_the_spectrum(size):
    torus = Torus(*size)
    z = torch.randn(2, 3, torus.n, dtype=torch.float64)
    Z = torus.spectrum(z)
    torch.testing.assert_close(torus.synthesis(Z, z.shape), z)
    norm = (Z.abs().square().sum((1, 2)) * torus.multiplicity(z)).sum()
    torch.testing.assert_close(norm, z.square().sum())


@pytest.mark.parametrize("size", SIZES[1:])
def test_products_by_symbols_and_by_kernels_agree(size):
    torus, c = Torus(*size), size[0]
    kernel = torch.randn(c, c, 3, 3, dtype=torch.float64)
    z = torch.randn(4, torus.n, dtype=torch.float64)
    by_symbols = torus.multiply(torus.symbols(kernel), z)
    torch.testing.assert_close(by_symbols, torus.convolve(z, kernel))


def test_correlation_is_the_gradient_of_a_convolution():
    torus = Torus(2, 3, 4)
    kernel = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    u, z = torch.randn(2, 5, torus.n, dtype=torch.float64)
    (expected,) = torch.autograd.grad((u * torus.convolve(z, kernel)).sum(), kernel)
    torch.testing.assert_close(torus.correlation(u, z, kernel.detach()), expected)


def test_steps_are_equal_within_a_channel():
    torus = Torus(2, 1, 3)
    steps = torch.tensor([1.0, 2.0]).repeat_interleave(3)
    assert torus.per_channel(steps).tolist() == [1.0, 2.0]
    assert torus.per_channel(0.5) == 0.5
    with pytest.raises(ValueError, match="equal within each channel"):
        torus.per_channel(torch.arange(6.0))

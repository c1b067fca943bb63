"""A linear map and its adjoint are transposes of each other, and refuse what does not fit."""

import pytest
import torch

from lben.weights.linear_maps import Convolution, Dense, mirror, taps


@pytest.mark.parametrize("map", [
    Dense(), Convolution(kernel_size=3, padding=1), Convolution(kernel_size=3, padding=0),
    Convolution(kernel_size=3, padding=2, stride=1), Convolution(kernel_size=2, padding=1),
    Convolution(kernel_size=3, padding=1, circular=True),
    Convolution(kernel_size=4, padding=2, circular=True),
])  # fmt: skip
def test_adjoints(map):
    dense = isinstance(map, Dense)
    U = torch.randn(2, 3, *([] if dense else [map.kernel_size] * 2), dtype=torch.float64)
    x = torch.randn(1, 3, *([] if dense else [5, 6]), dtype=torch.float64)
    y = map.apply(x, U)
    h = torch.randn_like(y)
    torch.testing.assert_close((y * h).sum(), (x * map.adjoint(h, U)).sum())


def test_sizes_of_outputs_are_known_before_there_are_any():
    for map, shape in (
        (Dense(), (7,)), (Convolution(kernel_size=3, padding=1), (4, 5, 6)),
        (Convolution(kernel_size=3, padding=0, stride=2), (4, 5, 6)),
        (Convolution(kernel_size=2, padding=1, circular=True), (4, 5, 6)),
    ):  # fmt: skip
        kernel = () if map.dims == 1 else (map.kernel_size,) * 2
        y = map.apply(torch.randn(2, *shape), torch.randn(3, shape[0], *kernel))
        assert map.outputs(shape, 3) == tuple(y.shape[1:])
        assert map.spread(torch.ones(3)).shape[0] == 3


@pytest.mark.parametrize(("map", "shape", "message"), [
    (Dense(), (4,), "expected 3 features"),
    (Convolution(kernel_size=3, padding=1), (4, 5, 5), "images of 3 channels"),
    (Convolution(kernel_size=3, padding=1), (3, 2, 5), "smaller than the kernel"),
])  # fmt: skip
def test_inputs_that_do_not_fit_are_named(map, shape, message):
    with pytest.raises(ValueError, match=message):
        map.check(shape, 3)


def test_the_mirror_of_a_kernel_is_that_of_its_adjoint():
    K = torch.randn(2, 3, 3, 3, dtype=torch.float64)
    x, h = torch.randn(1, 3, 5, 5).double(), torch.randn(1, 2, 5, 5).double()
    y = torch.nn.functional.conv2d(x, K, padding=1)
    back = torch.nn.functional.conv2d(h, mirror(K), padding=1)
    torch.testing.assert_close((y * h).sum(), (x * back).sum())


def test_mirror_is_the_adjoint_of_a_convolution():
    kernel, x = torch.randn(2, 3, 3, 3).double(), torch.randn(1, 3, 5, 5).double()
    y = torch.nn.functional.conv2d(x, kernel, padding=1)
    w = torch.randn_like(y)
    back = torch.nn.functional.conv2d(w, mirror(kernel), padding=1)
    torch.testing.assert_close((y * w).sum(), (x * back).sum())
    assert taps(torch.ones(3)).shape == (3, 1, 1)

"""States lie on a torus that holds the image, and nothing leaks over its border."""

import pytest
import torch

from lben.weights import ImageGeometry
from solvers import ReLU, Sigmoid


def geometry(image=(5, 7), **options):
    options = {"circular": False, "state_kernel": 3, "input_kernel": 3, **options}
    return ImageGeometry(image, state_channels=2, **options)


@pytest.mark.parametrize("options", [
    {}, {"circular": True}, {"state_kernel": 1}, {"image": (6, 8), "stride": 2},
    {"image": (6, 8), "stride": 2, "circular": True},
])  # fmt: skip
def test_embedding_and_cropping_are_inverse(options):
    g = geometry(**options)
    assert g.grid == tuple(size // g.stride for size in g.image)
    x = torch.randn(3, 2, *g.grid)
    z = g.embed(x)
    assert z.shape == (3, 2 * g.torus[0] * g.torus[1])
    assert torch.equal(g.crop(z), x)
    assert torch.equal(g.embed(g.crop(z)), z)
    torch.testing.assert_close(z.norm(dim=1), x.flatten(1).norm(dim=1))
    assert g.crop(z.view(3, 1, -1)).shape == (3, 1, 2, *g.grid)


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_the_border_is_as_wide_as_W_reaches(kernel):
    g = geometry(state_kernel=kernel)
    for torus, grid in zip(g.torus, g.grid, strict=True):
        assert torus - grid >= kernel // 2
        assert kernel == 1 or torus % 2 == 0
    assert geometry(state_kernel=kernel, circular=True).torus == (5, 7)


def test_an_activation_is_zero_on_the_border_and_itself_inside():
    g = geometry()
    z = torch.randn(4, 2 * g.torus[0] * g.torus[1])
    values = g.restrict(Sigmoid(), torch.device("cpu"))(z)
    torch.testing.assert_close(g.crop(values), Sigmoid()(g.crop(z)))
    assert int((values != 0).sum()) == g.crop(z).numel()
    circular, relu = geometry(circular=True), ReLU()
    assert circular.restrict(relu, torch.device("cpu")) is relu


def test_pixels_become_channels():
    g = geometry((4, 6), stride=2, input_kernel=1)
    x = torch.randn(2, 3, 4, 6)
    y = g.downsample(x)
    assert y.shape == (2, 12, 2, 3)
    assert torch.equal(torch.nn.functional.pixel_shuffle(y, 2), x)
    assert geometry().downsample(x) is x


@pytest.mark.parametrize(("image", "options", "message"), [
    ((5, 6), {"stride": 2}, "5 × 6 pixels do not divide into blocks of 2 × 2"),
    ((0, 4), {}, "do not divide"),
    ((4, 2), {}, r"smaller than the kernel of U \(3 × 3\)"),
    ((4, 4), {"state_kernel": 5, "circular": True}, r"smaller than the kernel of W \(5 × 5\)"),
    ((8, 8), {"stride": 4, "input_kernel": 3}, r"2 × 2 pixels \(after down-sampling\)"),
])  # fmt: skip
def test_sizes_that_do_not_fit_are_named(image, options, message):
    with pytest.raises(ValueError, match=message):
        geometry(image, **options)


def test_a_mask_is_made_with_numbers_also_where_the_default_device_has_none():
    with torch.device("meta"):
        g = geometry()
    z = torch.ones(2 * g.torus[0] * g.torus[1])
    assert int(g.restrict(ReLU(), torch.device("cpu"))(z).sum()) == 2 * 5 * 7

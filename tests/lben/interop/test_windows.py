"""Windows cover what those of PyTorch cover."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lben.interop.maps import ConversionError
from lben.interop.windows import adapt, cover, slide


@pytest.mark.parametrize("size", [5, 8])
@pytest.mark.parametrize("kernel", [1, 2, 3])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("dilation", [1, 2])
def test_windows_slide_as_those_of_pytorch(size, kernel, stride, padding, dilation):
    image = torch.arange(1.0, size + 1).reshape(1, 1, 1, size)
    expected = F.unfold(
        image, (1, kernel), dilation=dilation, padding=(0, padding), stride=(1, stride)
    )[0].T
    found = slide(size, kernel, stride=stride, padding=(padding, padding), dilation=dilation)
    np.testing.assert_array_equal(found + 1, expected.numpy())


@pytest.mark.parametrize(
    ("size", "kernel", "stride"), [(6, 3, 2), (7, 2, 2), (5, 3, 3), (6, 2, 3), (1, 4, 2)]
)
def test_the_last_window_may_reach_out(size, kernel, stride):
    image = torch.arange(1.0, size + 1)[None]
    expected = F.max_pool1d(image, kernel, stride, padding=1, ceil_mode=True)[0]
    found = slide(size, kernel, stride=stride, padding=(1, 1), ceil=True)
    np.testing.assert_array_equal(found.max(axis=1) + 1, expected.numpy())


@pytest.mark.parametrize(("size", "outputs"), [(7, 3), (5, 5), (4, 6), (9, 1)])
def test_adaptive_windows_are_those_of_pytorch(size, outputs):
    image = torch.randn(1, size, dtype=torch.float64)
    places = adapt(size, outputs)
    means = [image[0, torch.from_numpy(p[p >= 0])].mean() for p in places]
    torch.testing.assert_close(torch.stack(means), F.adaptive_avg_pool1d(image, outputs)[0])


def test_grids_are_in_c_order():
    axes = [slide(3, 2), slide(4, 3, padding=(1, 1))]
    places = cover(axes, (3, 4))
    image = torch.arange(1.0, 13).reshape(1, 1, 3, 4)
    np.testing.assert_array_equal(places + 1, F.unfold(image, (2, 3), padding=(0, 1))[0].T.numpy())


def test_a_window_that_does_not_fit_is_refused():
    with pytest.raises(ConversionError, match="window of 4 taps does not fit an axis of 3"):
        slide(3, 4)

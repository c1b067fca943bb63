"""A convolution between scales is one of stride 1 between images of the coarsest grid."""

import pytest
import torch
from torch.nn import functional

from lben.parameterizations.polyphase import Polyphase, phases


def test_the_input_and_state_kernels_have_the_channels_of_the_coarsest_grid():
    layout = Polyphase(1, (2, 3), 3)
    assert layout.factors == (2, 1)
    U = layout.input(torch.randn(2, 1, 3, 3))
    assert U.shape == (2 * 4 + 3, 4, 3, 3)
    assert not bool(U[8:].any())
    V = layout.state([torch.randn(2, 2, 3, 3), torch.randn(3, 3, 3, 3), torch.randn(3, 2, 3, 3)])
    assert V.shape == (11, 11, 3, 3)
    assert not bool(V[:8, 8:].any())  # no coupling from a coarse scale to a finer one
    assert bool(V[8:, :8].any())


@pytest.mark.parametrize("k", [1, 3, 5])
def test_the_finest_scale_is_convolved_as_before(k):
    kernel, image = torch.randn(3, 2, k, k).double(), torch.randn(1, 2, 8, 8).double()
    pad = [k // 2] * 4
    expected = functional.conv2d(functional.pad(image, pad, mode="circular"), kernel)
    coarse = functional.pixel_unshuffle(image, 2)
    found = functional.conv2d(functional.pad(coarse, pad, mode="circular"), phases(kernel, 2, 2))
    torch.testing.assert_close(functional.pixel_shuffle(found, 2), expected)


def test_numbers_and_channels_are_spread_alike():
    layout = Polyphase(1, (1, 2), 3)
    values = torch.tensor([5.0, 6.0, 7.0])
    assert layout.spread(values).tolist() == [5.0] * 4 + [6.0, 7.0]
    G = values.reshape(1, 3, 1, 1)
    assert layout.spread_channels(G).flatten().tolist() == [5.0] * 4 + [6.0, 7.0]
    assert layout.sides(values).tolist() == [2.0, 1.0, 1.0]

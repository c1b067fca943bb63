"""Sizes, flags, image sizes and dtypes are what they say, or refused by name."""

import numpy as np
import pytest
import torch

from lben.weights.sizes import flag, image_size, integer, real


def test_integers_of_any_kind_become_python_ones():
    for value in (3, np.int64(3), torch.tensor(3)):
        assert type(integer("n", value)) is int
        assert integer("n", value) == 3
    for wrong in (3.0, "3", None, True, torch.tensor(3.5)):
        with pytest.raises(TypeError, match="n must be an integer"):
            integer("n", wrong)
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        integer("n", 0)
    assert integer("n", -2, least=None) == -2


def test_image_sizes_are_pairs_of_positive_integers():
    assert image_size([np.int64(4), 5]) == (4, 5)
    for wrong in ((4,), (1, 4, 4), "44", 4, None):
        with pytest.raises(TypeError, match="pair"):
            image_size(wrong)
    with pytest.raises(ValueError, match="the width of an image must be at least 1"):
        image_size((4, 0))


def test_flags_and_dtypes():
    assert flag("circular", False) is False
    with pytest.raises(TypeError, match="circular must be True or False, got 1"):
        flag("circular", 1)
    assert real(None) is None
    assert real(torch.float64) is torch.float64
    for wrong in (torch.int64, torch.complex64, "float32"):
        with pytest.raises(TypeError, match="real floating-point numbers"):
            real(wrong)

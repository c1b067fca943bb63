"""What is wrong with an input, or with the layer, is said with its place."""

import math

import numpy as np
import pytest
import torch

from lben import EquilibriumLinear
from lben.layers.inputs import non_finite, tensor


def test_only_tensors_are_inputs():
    x = torch.zeros(2)
    assert tensor(x) is x
    for wrong in (np.zeros(2), [0.0], None):
        with pytest.raises(TypeError, match=r"torch\.Tensor"):
            tensor(wrong)


def test_the_first_number_that_is_not_finite_is_named():
    layer, x = EquilibriumLinear(3, 4, 2), torch.zeros(5, 3)
    x[1, 2] = x[4, 0] = math.nan
    assert "NaN or Inf in 2 of 5 samples (first at sample 1, feature 2)" in str(
        non_finite(layer, x, 1, "feature")
    )
    images = x.view(5, 1, 1, 3)
    assert "first at sample 1, entry 2" in str(non_finite(layer, images, 3, "entry"))
    overflow = str(non_finite(layer, torch.ones(1, 3), 1, "feature"))
    assert "overflows torch.float32: scale the input or use float64" in overflow
    with torch.no_grad():
        layer.parameterization.b[0] = math.inf
    assert "parameterization.b contains NaN or Inf" in str(
        non_finite(layer, torch.ones(1, 3), 1, "feature")
    )

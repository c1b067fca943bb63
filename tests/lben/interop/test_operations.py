"""Operations on expressions, where PyTorch's functions do not already try them."""

import numpy as np
import pytest

from lben.interop import operations
from lben.interop.expressions import Builder
from lben.interop.maps import ConversionError
from lben.interop.windows import slide


def run(expression, x):
    return expression.builder.finish(expression).evaluate(x[None])[0].reshape(expression.shape)


def test_one_sided_limits_are_exact_units():
    x = Builder((5,)).input()
    v = np.array([-2.0, -0.5, 0.0, 0.75, 3.0])
    np.testing.assert_array_equal(run(operations.clamp(x, -0.5, None), v), np.maximum(v, -0.5))
    np.testing.assert_array_equal(run(operations.clamp(x, None, 0.5), v), np.minimum(v, 0.5))
    assert operations.clamp(x, None, None) is x


def test_slopes_of_channels_may_have_any_sign():
    x = Builder((2, 2)).input()
    v = np.array([[-1.0, 2.0], [-3.0, 4.0]])
    slopes = np.array([[-0.5], [3.0]])
    found = run(operations.apply_prelu(x, slopes), v)
    np.testing.assert_allclose(found, np.where(v > 0, v, slopes * v), rtol=1e-15)


def test_a_maximum_of_an_empty_window_is_refused():
    x = Builder((1, 3)).input()
    with pytest.raises(ConversionError, match="no largest entry"):
        operations.take_largest(x, [slide(3, 1, padding=(1, 1))])


def test_a_variance_that_is_not_positive_is_refused():
    x = Builder((2,)).input()
    with pytest.raises(ConversionError, match="must be positive"):
        operations.normalize(x, np.zeros(2), np.array([1.0, -1.0]), None, None, 1e-5)


def test_division_by_zero_is_refused():
    with pytest.raises(ConversionError, match="divides by zero"):
        operations.divide(Builder((2,)).input(), np.array([1.0, 0.0]))

"""Operations on expressions, where PyTorch's functions do not already try them."""

from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import pytest
from torch import nn

from lben.interop import from_torch, operations
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


def test_normalised_and_averaged_numbers_lie_within_their_radius():
    """y = the mean over three entries of (Wx + b − μ)/√(v + ε)·w + c, by hand."""
    model = nn.Sequential(nn.Conv1d(1, 2, 1), nn.BatchNorm1d(2), nn.AvgPool1d(3)).eval()
    norm = model[1]
    for values in (norm.running_mean, norm.running_var, norm.weight.data, norm.bias.data):
        values.uniform_(0.1, 3)
    affine = from_torch(model, (1, 3)).output
    assert not affine.exact
    found = affine.enclosure(0)
    for k in range(2):
        W, b, mu, v, w, c = (
            Decimal(float(t.detach().ravel()[k]))
            for t in (model[0].weight, model[0].bias, norm.running_mean, norm.running_var,
                      norm.weight, norm.bias)
        )  # fmt: skip
        with localcontext() as context:
            context.prec = 60
            factor = w / (v + Decimal(norm.eps)).sqrt()
            slope, shift = W * factor / 3, (b - mu) * factor + c
            radius = Decimal(affine.relative_radius) * Decimal(float(affine.bias_size[k]))
            assert abs(shift - Decimal(float(affine.bias[k]))) <= radius
            for i in range(3):
                error = abs(slope - Decimal(float(found.mid[k, i])))
                assert error <= Decimal(float(found.radius[k, i]))
                assert Fraction(float(found.radius[k, i])) < Fraction(1, 10**13)

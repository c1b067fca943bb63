"""Expressions build networks that compute what was written."""

import numpy as np

from lben.interop.expressions import Builder, join
from lben.weights.activation import TANH


def test_an_expression_is_what_it_says():
    builder = Builder((2, 3))
    x = builder.input()
    y = x.activate(TANH).select(np.array([[5, -1], [0, 0]]))
    z = y.times(np.array([2.0, 3.0])).plus(y.constant(np.ones((2, 2)))).minus(y.negate())
    network = builder.finish(join([z, x.maximum(x.negate()), x.minimum(x.negate())]))
    v = np.linspace(-2, 2, 6).reshape(1, 2, 3)
    t = np.tanh(v).ravel()
    picked = np.array([t[5], 0, t[0], t[0]])
    expected = [*(picked * [3, 4, 3, 4] + 1), *np.abs(v).ravel(), *-np.abs(v).ravel()]
    np.testing.assert_allclose(network.evaluate(v)[0], expected, atol=1e-15)


def test_broadcasting_repeats_entries():
    x = Builder((3, 1)).input().broadcast((2, 3, 4))
    network = x.builder.finish(x)
    v = np.arange(3.0).reshape(1, 3, 1)
    np.testing.assert_array_equal(
        network.evaluate(v).reshape(2, 3, 4), np.broadcast_to(v[0], (2, 3, 4))
    )

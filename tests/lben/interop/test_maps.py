"""Products and sums of affine maps hold what is exact, and know what they round."""

from fractions import Fraction

import numpy as np
import pytest
import scipy.sparse

from lben.interop.maps import (
    ConversionError,
    add,
    compose,
    make_constant,
    make_map,
    make_selection,
    scale,
    stack,
)

NUMBERS = np.random.default_rng(0)


def random(rows, columns, sparse=False):
    matrix = NUMBERS.standard_normal((rows, columns))
    if sparse:
        matrix = scipy.sparse.csr_array(matrix * (NUMBERS.random((rows, columns)) < 0.5))
    return make_map(matrix, NUMBERS.standard_normal(rows), columns + 1)


def written_out(matrix):
    return matrix.toarray() if scipy.sparse.issparse(matrix) else np.asarray(matrix)


def fractions(matrix):
    return [[Fraction(v) for v in row] for row in written_out(matrix)]


def encloses(affine, matrix, bias):
    found = affine.enclosure(0)
    for i, row in enumerate(matrix):
        for j, value in enumerate(row):
            if abs(value - Fraction(found.mid[i, j])) > Fraction(found.radius[i, j]):
                return False
        radius = Fraction(affine.relative_radius * affine.bias_size[i])
        if abs(bias[i] - Fraction(affine.bias[i])) > radius:
            return False
    return True


@pytest.mark.parametrize("sparse", [(False, False), (True, False), (False, True), (True, True)])
def test_products_enclose_the_exact_ones(sparse):
    inner, outer = random(6, 5, sparse[0]), random(4, 6, sparse[1])
    product = compose(outer, inner)
    A, W = fractions(outer.matrices[0]), fractions(inner.matrices[0])
    exact = [[sum(a * w for a, w in zip(r, c, strict=True)) for c in zip(*W, strict=True)]
             for r in A]  # fmt: skip
    b = [Fraction(v) for v in inner.bias]
    bias = [
        sum(a * v for a, v in zip(row, b, strict=True)) + Fraction(c)
        for row, c in zip(A, outer.bias, strict=True)
    ]
    assert not product.exact
    assert encloses(product, exact, bias)
    assert product.operations == inner.operations + outer.operations


def test_selections_and_powers_of_two_keep_numbers_exact():
    affine = random(6, 5)
    chosen = compose(make_selection(np.array([3, -1, 3, 0]), 6), affine)
    assert chosen.exact
    rows = affine.matrices[0]
    expected = np.stack([rows[3], np.zeros(5), rows[3], rows[0]])
    np.testing.assert_array_equal(chosen.matrices[0], expected)
    assert scale(np.array([2.0, -0.5, 1, 1, 1, 1]), affine).exact
    assert not scale(np.full(6, 3.0), affine).exact


def test_a_selection_is_exact_below_a_matrix_unless_entries_meet():
    sparse = random(4, 6, sparse=True)
    assert compose(sparse, make_selection(np.array([5, 4, 3, 2, 1, 0]), 6)).exact
    assert not compose(random(4, 6), make_selection(np.array([0, 0, 1, 1, 2, 2]), 3)).exact
    pairs = scipy.sparse.csr_array(np.array([[1.1, 0, 2.2], [0, 3.3, 0]]))
    apart, meeting = make_selection(np.array([0, 0, 1]), 2), make_selection(np.array([0, 1, 0]), 2)
    assert compose(make_map(pairs, np.zeros(2), 3), apart).exact
    assert not compose(make_map(pairs, np.zeros(2), 3), meeting).exact


def test_sums_are_exact_where_nothing_meets():
    one, other = random(4, 3), random(4, 3)
    total = add(one, other)
    assert not total.exact
    exact = [
        [a + b for a, b in zip(r, s, strict=True)]
        for r, s in zip(fractions(one.matrices[0]), fractions(other.matrices[0]), strict=True)
    ]
    bias = [Fraction(a) + Fraction(b) for a, b in zip(one.bias, other.bias, strict=True)]
    assert encloses(total, exact, bias)
    assert add(one, make_constant(np.zeros(4))).exact
    assert not add(one, make_constant(np.ones(4))).exact
    left = make_map(np.array([[1.1, 0.0]]), np.zeros(1), 1)
    right = make_map(scipy.sparse.csr_array([[0.0, 0.1]]), np.zeros(1), 1)
    assert add(left, right).exact
    assert add(right, right).exact is False


def test_stacked_maps_keep_their_rows():
    one, other = random(2, 3), random(4, 3, sparse=True)
    whole = stack([one, make_constant(np.ones(2)), other])
    expected = np.vstack([one.matrices[0], np.zeros((2, 3)), other.matrices[0].toarray()])
    np.testing.assert_array_equal(written_out(whole.matrices[0]), expected)
    np.testing.assert_array_equal(whole.bias, [*one.bias, 1, 1, *other.bias])
    assert whole.exact


def test_products_that_leave_the_range_are_refused():
    small, large = (make_map(np.full((2, 2), v), np.zeros(2), 3) for v in (1e-200, 1e200))
    with pytest.raises(ConversionError, match="loses their digits"):
        compose(small, small)
    with pytest.raises(ConversionError, match="leave the range"), np.errstate(over="ignore"):
        compose(large, large)

"""Claims of `rigorous` against exact rational arithmetic (python-flint)."""

import math

import flint
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lben.rigorous import (
    Enclosure,
    block,
    down,
    largest_eigenvalue_bound,
    norm_bound,
    smallest_eigenvalue_bound,
    solve,
    up,
)


def exact(x: float) -> flint.fmpq:
    numerator, denominator = float(x).as_integer_ratio()
    return flint.fmpq(numerator, denominator)


def rational(a: np.ndarray) -> flint.fmpq_mat:
    return flint.fmpq_mat(*a.shape, [exact(x) for x in a.ravel()])


def contains(enclosure: Enclosure, truth: flint.fmpq_mat) -> bool:
    rows, columns = enclosure.mid.shape
    return all(
        abs(exact(enclosure.mid[i, j]) - truth[i, j]) <= exact(enclosure.radius[i, j])
        for i in range(rows)
        for j in range(columns)
    )


def hilbert(n: int) -> np.ndarray:
    return 1.0 / (np.arange(n)[:, None] + np.arange(n) + 1)


@pytest.mark.parametrize("n", [1, 2, 5, 9])
def test_solutions_of_hard_systems_are_enclosed(n):
    """Condition numbers up to 1e12."""
    A, B = hilbert(n), np.random.default_rng(n).normal(size=(n, 3))
    found = solve(Enclosure(A), Enclosure(B))
    assert contains(found, rational(A).inv() * rational(B))
    assert (found.radius <= 1e-14 * np.linalg.cond(A) * np.abs(found.mid).max()).all()


def test_solutions_of_all_matrices_in_an_enclosure_are_enclosed():
    """The extremes of a scalar are reached: nothing is left out."""
    for radius in (0.1, 0.3):
        found = solve(Enclosure([[1.0]], np.array([[radius]])), Enclosure([[1.0]]))
        for a in (1 - radius, 1.0, 1 + radius):
            assert abs(1 / a - found.mid[0, 0]) <= found.radius[0, 0] * (1 + 1e-15)
        assert found.radius[0, 0] <= 2 * radius
    rng = np.random.default_rng(0)
    A, B = np.eye(6) + 0.1 * rng.normal(size=(6, 6)), rng.normal(size=(6, 2))
    wide = np.full_like(A, 0.02)
    found = solve(Enclosure(A, wide), Enclosure(B))
    for _ in range(200):
        truth = np.linalg.solve(A + wide * rng.choice([-1, 1], size=A.shape), B)
        assert (np.abs(truth - found.mid) <= found.radius).all()


@pytest.mark.parametrize("A", [np.zeros((2, 2)), np.ones((3, 3)), hilbert(16)])
def test_singular_systems_are_refused(A):
    with pytest.raises(ValueError, match=r"[Ss]ingular"):
        solve(Enclosure(A), Enclosure(np.eye(len(A))))


def is_positive_definite(a: flint.fmpq_mat) -> bool:
    n = a.nrows()
    minors = (
        flint.fmpq_mat(k, k, [a[i, j] for i in range(k) for j in range(k)]) for k in range(1, n + 1)
    )
    return all(m.det() > 0 for m in minors)


scales = pytest.mark.parametrize("scale", [1e-200, 1e-5, 1.0, 1e5, 1e100])


@scales
def test_enclosures_contain_the_exact_results(scale):
    g = np.random.default_rng(1)
    a, b = scale * g.standard_normal((5, 7)), g.standard_normal((7, 4)) / scale
    c = scale * g.standard_normal((5, 7))
    A, B, C = map(Enclosure, (a, b, c))
    assert contains(A @ B, rational(a) * rational(b))
    assert contains(A + C, rational(a) + rational(c))
    assert contains(A - C, rational(a) - rational(c))
    third = A / 3.0
    assert contains(third, rational(a) * flint.fmpq(1, 3))
    assert contains(third @ B, rational(a) * rational(b) * flint.fmpq(1, 3))
    nested = (A - C) @ B + (A @ B)
    assert contains(nested, (rational(a) * 2 - rational(c)) * rational(b))
    assert (third.radius <= 1e-15 * np.abs(a)).all() or scale < 1e-100


def test_products_of_tiny_and_huge_numbers_contain_the_exact_results():
    g = np.random.default_rng(2)
    for _ in range(100):
        a = 2.0**-1024 * (1 + g.random((1, 1)))
        b = 2.0**1000 * (1 + g.random((1, 1)))
        assert contains(Enclosure(a) @ Enclosure(b), rational(a) * rational(b))
        assert contains(Enclosure(a) * Enclosure(a), rational(a) * rational(a))


def test_square_roots_and_reciprocals_contain_the_exact_results():
    values = np.random.default_rng(2).uniform(1e-3, 1e3, (6, 1))
    root = Enclosure(values).sqrt()
    low, high = root.mid - root.radius, root.mid + root.radius
    for v, a, b in zip(values.ravel(), low.ravel(), high.ravel(), strict=True):
        assert exact(a) ** 2 <= exact(v) <= exact(b) ** 2
    inverse = Enclosure(values).reciprocal()
    for v, mid, radius in zip(
        values.ravel(), inverse.mid.ravel(), inverse.radius.ravel(), strict=True
    ):
        assert abs(exact(mid) - 1 / exact(v)) <= exact(radius)


@given(x=st.floats(allow_nan=False, allow_infinity=False))
def test_directed_moves(x):
    assert down(x) < x < up(x)


@pytest.mark.parametrize("seed", range(5))
def test_smallest_eigenvalue_bound_is_proved_and_tight(seed):
    g = np.random.default_rng(seed)
    a = g.standard_normal((6, 6))
    a = a + a.T
    bound = smallest_eigenvalue_bound(Enclosure(a))
    below = rational(a - 0) - rational(np.eye(6)) * exact(bound)
    assert is_positive_definite(below)
    above = rational(a) - rational(np.eye(6)) * exact(bound + 1e-12)
    assert not is_positive_definite(above)
    assert largest_eigenvalue_bound(Enclosure(a)) >= np.linalg.eigvalsh(a)[-1]


def test_smallest_eigenvalue_bound_covers_the_radius():
    a, radius = np.eye(3), np.full((3, 3), 0.25)
    worst = a - radius * np.outer([1, 1, 1], [1, 1, 1])
    bound = smallest_eigenvalue_bound(Enclosure(a, radius))
    assert bound <= np.linalg.eigvalsh(worst)[0] + 1e-15
    assert bound == pytest.approx(0.25)


def test_singular_and_indefinite_matrices_are_never_called_positive():
    for n in (1, 2, 10, 60):
        v = np.random.default_rng(n).standard_normal((n, max(n - 1, 1)))
        a = v @ v.T if n > 1 else np.zeros((1, 1))
        if is_positive_definite_float(a):
            a = a - 1e-13 * np.eye(n)
        assert smallest_eigenvalue_bound(Enclosure(a)) <= 1e-12


def is_positive_definite_float(a: np.ndarray) -> bool:
    return bool(np.linalg.eigvalsh(a)[0] > 0)


def test_overflow_proves_nothing():
    matrix = 1e308 * np.array([[-0.6, -0.6, -0.6], [-0.6, -0.6, -0.6], [-0.6, -0.6, 0.8]])
    with np.errstate(all="ignore"):
        assert smallest_eigenvalue_bound(Enclosure(matrix)) == -np.inf


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nothing_is_proved_about_matrices_that_are_not_finite(bad):
    a = np.eye(3)
    a[1, 1] = bad
    assert smallest_eigenvalue_bound(Enclosure(a)) == -math.inf


@scales
@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (1, 5)])
def test_norm_bound_is_above_the_norm_and_close(scale, shape):
    a = scale * np.random.default_rng(3).standard_normal(shape)
    norm = float(np.linalg.norm(a / scale, 2)) * scale
    bound = norm_bound(Enclosure(a))
    assert bound >= norm * (1 - 1e-14)
    if scale > 1e-100:
        assert bound <= norm * (1 + 1e-12)


def test_block_keeps_radii():
    one = Enclosure(np.ones((2, 2)), np.full((2, 2), 0.5))
    whole = block([[one, -one], [-one, one]])
    assert whole.radius.shape == (4, 4)
    assert (whole.radius == 0.5).all()


def test_undefined_operations_are_refused():
    wide = Enclosure(np.ones((1, 1)), np.full((1, 1), 2.0))
    with pytest.raises(ValueError, match="contains zero"):
        wide.reciprocal()
    with pytest.raises(ValueError, match="exact entries only"):
        wide.sqrt()

"""Claims of `rigorous` against exact rational arithmetic (python-flint)."""

import ctypes
import ctypes.util
import math
import platform
from contextlib import contextmanager

import flint
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lben.rigorous import (
    TINY,
    Enclosure,
    block,
    down,
    is_denormal,
    largest_eigenvalue_bound,
    norm_bound,
    norms_up,
    power_of_two,
    smallest_eigenvalue_bound,
    solve,
    sum_up,
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


# Note [Modes]: the arithmetic runs in the mode, the comparison in exact rational arithmetic.
ROUNDING = {"nearest": 0x000, "down": 0x400, "up": 0x800, "to zero": 0xC00}  # x86's fenv.h
LIBM = ctypes.CDLL(ctypes.util.find_library("m"))
X86 = platform.machine() in ("x86_64", "AMD64")


@contextmanager
def mode(rounding: str, flush: bool):
    if rounding != "nearest" and not X86:
        pytest.skip("rounding modes are numbered as on x86")
    if flush and not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush denormal numbers")
    LIBM.fesetround(ROUNDING[rounding])
    try:
        yield
    finally:
        LIBM.fesetround(ROUNDING["nearest"])
        torch.set_flush_denormal(False)


modes = pytest.mark.parametrize("rounding", ROUNDING)
flushes = pytest.mark.parametrize("flush", [False, True])


def contains_also_as_zero(enclosure: Enclosure, truth: flint.fmpq_mat) -> bool:
    """Also where a denormal midpoint is read as zero."""
    mid = np.where(np.abs(enclosure.mid) < TINY, 0.0, enclosure.mid)
    flushed = Enclosure._wrap(mid, np.where(enclosure.radius < TINY, 0.0, enclosure.radius))
    return contains(enclosure, truth) and contains(flushed, truth)


@modes
@flushes
@pytest.mark.parametrize("exponent", [-1074, -1030, -1000, -540, -500, 0, 500, 900])
def test_enclosures_hold_in_every_floating_point_mode(rounding, flush, exponent):
    g = np.random.default_rng(exponent % 7)

    def numbers(*shape, centre):
        spread = g.integers(-30, 30, shape)
        return np.ldexp(g.standard_normal(shape), np.clip(centre + spread, -1074, 1000))

    a, b = numbers(4, 6, centre=exponent), numbers(6, 3, centre=-exponent // 2)
    c = numbers(4, 6, centre=exponent)
    with mode(rounding, flush), np.errstate(all="ignore"):
        A, B, C = map(Enclosure, (a, b, c))
        product, total, least, entries = A @ B, A + C, A - C, A * C
        third, nested = A / 3.0, (A - C) @ B + A @ B
        scaled = (A * C).scale(np.full(4, 2.0**-60), np.full(6, 2.0**40))
        rows = norms_up(a, 1)
    exact_a, exact_b, exact_c = map(rational, (a, b, c))
    times = flint.fmpq_mat(
        4, 6, [exact(x) * exact(y) for x, y in zip(a.ravel(), c.ravel(), strict=True)]
    )
    for found, truth in (
        (product, exact_a * exact_b), (total, exact_a + exact_c), (least, exact_a - exact_c),
        (entries, times), (third, exact_a * flint.fmpq(1, 3)),
        (nested, (exact_a * 2 - exact_c) * exact_b), (scaled, times * flint.fmpq(1, 2**20)),
    ):  # fmt: skip
        finite = np.isfinite(found.mid) & np.isfinite(found.radius)
        if finite.all():
            assert contains_also_as_zero(found, truth)
        else:
            assert exponent >= 500
    for row, norm in zip(a, rows, strict=True):
        if math.isfinite(norm):
            assert exact(norm) ** 2 >= sum((exact(x) ** 2 for x in row), flint.fmpq(0))


@modes
@flushes
def test_eigenvalues_and_systems_hold_in_every_floating_point_mode(rounding, flush):
    g = np.random.default_rng(0)
    for scale in (2.0**-1021, 2.0**-700, 1.0, 2.0**900):
        root = g.standard_normal((6, 5))  # singular
        a = scale * (root @ root.T)
        a = np.tril(a) + np.tril(a, -1).T
        with mode(rounding, flush), np.errstate(all="ignore"):
            bound = smallest_eigenvalue_bound(Enclosure(a))
            norm = norm_bound(Enclosure(root))
        if math.isfinite(bound):
            shift = flint.fmpq_mat(
                6, 6, [exact(bound) * (i == j) for i in range(6) for j in range(6)]
            )
            assert is_positive_definite(rational(a) - shift)
        assert not bound > 0 or is_positive_definite(rational(a))
        assert norm >= np.linalg.norm(root, 2) * (1 - 1e-14)
    A, B = hilbert(6), g.standard_normal((6, 2))
    with mode(rounding, flush):
        found = solve(Enclosure(A), Enclosure(B))
    assert contains(found, rational(A).inv() * rational(B))


@flushes
def test_what_is_tiny_is_never_lost(flush):
    tiny = np.array([[5e-324, 2.0**-1022], [0.0, -(2.0**-1023)]])
    with mode("nearest", flush):
        assert Enclosure(tiny).radius.tolist() == [[TINY, 0.0], [0.0, TINY]]
        assert Enclosure(np.eye(2), np.abs(tiny)).radius.tolist() == [[TINY, TINY], [0.0, TINY]]
        assert is_denormal(tiny).tolist() == [[True, False], [False, True]]
        assert up(0.0) == TINY
        assert down(0.0) == -TINY
        assert float(sum_up(np.abs(tiny))) >= 2.0**-1021
        huge = Enclosure(tiny) @ Enclosure(np.full((2, 2), 2.0**1000))
    assert contains(huge, rational(tiny) * rational(np.full((2, 2), 2.0**1000)))


def test_norms_do_not_vanish():
    """The square of the entry does."""
    assert norm_bound(Enclosure(np.array([[1e-250, 0.0]]))) <= 1.0001e-250
    assert norm_bound(Enclosure(np.array([[1e250, 0.0]]))) <= 1.0001e250
    assert power_of_two(0.0) == power_of_two(math.inf) == power_of_two(math.nan) == 1.0

"""What can be proved in floating point? Matrices with entrywise error, and bounds of eigenvalues.

An `Enclosure` is a float64 matrix with a radius per entry; arithmetic on it keeps the exact result
inside, whatever the order of summation and whether or not fused multiply-adds are used. Error
bounds are the standard ones of Higham (2002), section 3.1: |fl(Σ aᵢbᵢ) − Σ aᵢbᵢ| ≤
γ_k Σ|aᵢbᵢ|, γ_k = ku/(1 − ku), plus some multiples of 2⁻¹⁰²² for underflow. They hold for every
classical matrix product (not for Strassen's, which no BLAS uses by default).

Note [Any floating-point mode]
Every thread has its own rounding mode and its own switches that read and write denormal numbers as
zero (`torch.set_flush_denormal`, libraries built with -ffast-math), those of a BLAS included. So
nothing here relies on them: u = 2⁻⁵² covers all four rounding modes, and an operation whose result
lies below 2⁻¹⁰²², the smallest normal number, is charged 2⁻¹⁰²². A denormal operand that is read as
zero is another matter, as the error is multiplied by the other operand: the numbers in an
`Enclosure` are normal or zero, and a denormal one becomes zero with radius 2⁻¹⁰²². The midpoint of
a result may be denormal: its radius has room for it to be read as zero.

Only products, sums and elementary operations are trusted. Eigenvalues and Cholesky factors are
proposals: what they claim is checked afterwards by a product.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

Array = NDArray[np.float64]

UNIT = 2.0**-52
"""u of every rounding mode: half of it would do for rounding to nearest."""
TINY = 2.0**-1022
"""The smallest normal number, see Note [Any floating-point mode]."""
_HUGE = 2.0**1020
"""Numbers from here on count as infinite: rounded towards zero, overflow ends in a finite one."""


def gamma_k(k: int) -> float:
    """Return an upper bound of γ_k = ku/(1 − ku)."""
    return k * UNIT / (1 - k * UNIT) * (1 + 4 * UNIT)


def up(x: float, ulps: int = 1) -> float:
    """Return x moved up by some units in the last place, and past the denormal numbers."""
    for _ in range(ulps):
        x = math.nextafter(x, math.inf)
    return TINY if 0 <= x < TINY else x


def down(x: float, ulps: int = 1) -> float:
    """Return x moved down by some units in the last place, and past the denormal numbers."""
    return -up(-x, ulps)


def sum_up(values: Array, axis: int | None = None) -> Array:
    """Return upper bounds of sums of non-negative numbers."""
    count = values.size if axis is None else values.shape[axis]
    total = np.sum(values, axis=axis) * (1 + 2 * gamma_k(count + 2))
    total = total + 2 * TINY * np.sum(values < TINY, axis=axis)  # read as zero
    return np.asarray(np.where(total < _HUGE, total, math.inf))


def is_denormal(values: Array) -> NDArray[np.bool_]:
    """Say which numbers are denormal, in a mode that reads them as zero too."""
    bits = np.ascontiguousarray(values).view(np.int64)
    return (bits << 1 != 0) & (np.abs(values) < TINY)


def norms_up(values: Array, axis: int) -> Array:
    """Return upper bounds of l2 norms along an axis."""
    count = values.shape[axis]
    largest = np.max(np.abs(values), axis=axis, keepdims=True, initial=0.0)
    # In units of a power of two near each one's largest entry, so that neither rows nor columns of
    # very different scale disturb each other; what squares lose to underflow is added.
    with np.errstate(invalid="ignore", over="ignore"):
        unit = np.ldexp(1.0, np.clip(np.frexp(largest)[1], -1000, 1000))
        norms = np.sqrt(np.sum((values / unit) ** 2, axis=axis)) * (1 + 2 * gamma_k(count + 4))
        norms = (norms + count * 2.0**-500) * unit.squeeze(axis) * (1 + 4 * UNIT) + 4 * TINY
    norms = np.where(norms < _HUGE, norms, math.inf)  # NaN too
    # Where no entry is above the smallest normal number each may have been read as zero.
    return np.asarray(np.where(largest.squeeze(axis) < TINY, count * TINY, norms))


@dataclass(frozen=True, eq=False)
class Enclosure:
    """All real matrices within `radius` of `mid`, entry by entry.

    Args:
        mid: float64 array; a denormal number becomes zero, and its size is added to the radius.
        radius: non-negative float64 array of the same shape; zeros when omitted (exact).
    """

    mid: Array
    radius: Array = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        mid = np.asarray(self.mid, dtype=np.float64)
        radius = np.zeros_like(mid) if self.radius is None else self.radius
        vague = is_denormal(mid)
        if vague.any():
            mid, radius = np.where(vague, 0.0, mid), radius + np.where(vague, TINY, 0.0)
        if self.radius is not None:
            vague = is_denormal(radius)
            radius = np.where(vague, TINY, radius) if vague.any() else radius
        object.__setattr__(self, "mid", mid)
        object.__setattr__(self, "radius", radius)

    @classmethod
    def _made(cls, mid: Array, radius: Array) -> Enclosure:
        """Return an enclosure whose radius has room for a midpoint that is read as zero."""
        sizes = (np.max(np.abs(mid), initial=0.0), np.max(radius, initial=0.0))
        if not (sizes[0] < _HUGE and sizes[1] < _HUGE):
            radius = np.full_like(radius, math.inf)
        result: Enclosure = object.__new__(cls)
        object.__setattr__(result, "mid", mid)
        object.__setattr__(result, "radius", radius)
        return result

    @property
    def T(self) -> Enclosure:
        """Transpose."""
        return Enclosure._made(self.mid.T, self.radius.T)

    @property
    def magnitude(self) -> Array:
        """Upper bound of |entry|, a fresh array."""
        size = np.abs(self.mid)
        size += self.radius
        size *= 1 + 2 * UNIT
        return size

    def _result(self, mid: Array, radius: Array, operations: int) -> Enclosure:
        """Return a result with the radius given, which is overwritten, and its own rounding."""
        # One rounding of the new midpoint, then the roundings of the radius itself; in place, for
        # passes over large matrices are what a proof spends most of its time on.
        rounding = np.abs(mid)
        rounding *= UNIT
        radius += rounding
        # Up to four products that underflowed, and a midpoint that is read as zero.
        radius += 8 * TINY
        radius *= 1 + (operations + 6) * 2 * UNIT
        return Enclosure._made(mid, radius)

    def __add__(self, other: Enclosure) -> Enclosure:
        return self._result(self.mid + other.mid, self.radius + other.radius, 2)

    def __sub__(self, other: Enclosure) -> Enclosure:
        return self._result(self.mid - other.mid, self.radius + other.radius, 2)

    def __neg__(self) -> Enclosure:
        return Enclosure._made(-self.mid, self.radius)

    def __mul__(self, other: Enclosure) -> Enclosure:
        """Entrywise product, with broadcasting."""
        radius = self.magnitude * other.radius
        if self.radius.any():
            radius += self.radius * np.abs(other.mid)
        return self._result(self.mid * other.mid, radius, 4)

    def __truediv__(self, scalar: float) -> Enclosure:
        """Divide by an exact non-zero number."""
        return self._result(self.mid / scalar, self.radius / abs(scalar), 2)

    def __matmul__(self, other: Enclosure) -> Enclosure:
        # Sums of |aᵢₖ||bₖⱼ| by Cauchy and Schwarz: a little wider, and no product of matrices.
        k = self.mid.shape[1]
        rows, columns = norms_up(self.mid, 1), norms_up(other.mid, 0)
        radius = np.multiply.outer(gamma_k(k) * rows + TINY, columns)
        if self.radius.any():
            radius += np.multiply.outer(norms_up(self.radius, 1), columns)
        if other.radius.any():
            radius += np.multiply.outer(norms_up(self.magnitude, 1), norms_up(other.radius, 0))
        if not np.max(rows, initial=0.0) * np.max(columns, initial=0.0) < _HUGE:
            radius[:] = math.inf  # a sum may have overflowed on the way
        # Of each term the product, the sum, and reading either; and the products above.
        radius += (4 * k + 16) * TINY
        radius *= 1 + 16 * UNIT
        return Enclosure._made(self.mid @ other.mid, radius)

    def scale(self, rows: Array | float, columns: Array | float = 1.0) -> Enclosure:
        """Return diag(rows) A diag(columns) for powers of two, exactly where nothing underflows.

        Args:
            rows, columns: as many as A has, or one for all.
        """
        scale = np.multiply.outer(np.atleast_1d(rows), np.atleast_1d(columns))
        if not (scale >= TINY).all():
            scale = np.full_like(scale, math.nan)
        mid, radius = self.mid * scale, self.radius * scale
        if self.radius.any() or ((np.abs(mid) < TINY) & (self.mid != 0)).any():
            radius += 8 * TINY
        return Enclosure._made(mid, radius)

    def sqrt(self) -> Enclosure:
        """Entrywise square root of exact non-negative numbers."""
        if self.radius.any():
            raise ValueError("sqrt is defined here for exact entries only")
        return self._result(np.sqrt(self.mid), np.zeros_like(self.mid), 1)

    def reciprocal(self) -> Enclosure:
        """Entrywise 1/x of entries whose interval excludes zero."""
        low = (np.abs(self.mid) - self.radius) * (1 - 4 * UNIT)
        if not (low > 0).all():
            raise ValueError("reciprocal of an interval that contains zero")
        mid = 1 / self.mid
        relative = self.radius / low + 2 * TINY  # what underflowed is multiplied by the next line
        return self._result(mid, relative * np.abs(mid) * (1 + 8 * UNIT), 6)

    def symmetric_part(self) -> Enclosure:
        """½(A + Aᵀ)."""
        return (self + self.T) / 2.0


def block(rows: list[list[Enclosure]]) -> Enclosure:
    """Assemble a block matrix."""
    return Enclosure(
        np.block([[e.mid for e in row] for row in rows]),
        np.block([[e.radius for e in row] for row in rows]),
    )


def solve(A: Enclosure, B: Enclosure) -> Enclosure:
    """Enclose A⁻¹B.

    With any R near A⁻¹, X near RB and E = I − RA, R(B − AX) = (I − E)(A⁻¹B − X); so where the row
    sums of |E| are at most e < 1, A⁻¹ exists and A⁻¹B − X is within e/(1 − e) times the largest
    entry of its column of R(B − AX) (Rump 2010, section 10).

    Raises:
        ValueError: if that cannot be shown of some matrix in A.
    """
    try:
        R = Enclosure(np.asarray(np.linalg.inv(A.mid), dtype=np.float64))
    except np.linalg.LinAlgError as error:
        raise ValueError(str(error)) from error
    X = R.mid @ B.mid
    E = Enclosure(np.eye(len(A.mid))) - R @ A
    e = float(np.max(sum_up(E.magnitude, axis=1), initial=0.0))
    if not e <= 0.5:
        raise ValueError("the matrix is singular, or close to it")
    step = (R @ (B - A @ Enclosure(X))).magnitude
    radius = (step + 2 * e * np.max(step, axis=0, initial=0.0)) * (1 + 8 * UNIT) + 8 * TINY
    return Enclosure._made(X, radius)


def smallest_eigenvalue_bound(matrix: Enclosure) -> float:
    """Return a proved lower bound of λmin over all symmetric matrices in the enclosure.

    Let A be the symmetrised midpoint, c a number just below its computed smallest eigenvalue and R
    any matrix, proposed by Cholesky of A − cI. As RᵀR ⪰ 0, every symmetric matrix in the enclosure
    has

        λmin ≥ c − ‖A − cI − RᵀR‖_∞ − ‖radius‖_∞,

    where the difference is evaluated as an enclosure. Returns −inf when nothing finite can be
    proved (the entries are not finite, or no factor was found), inf for a matrix without rows.
    """
    n = matrix.mid.shape[0]
    if n == 0:
        return math.inf
    with np.errstate(all="ignore"):  # what overflows is found not to be finite
        matrix = matrix.symmetric_part()
        A = matrix.mid
        if not (np.isfinite(A).all() and np.isfinite(matrix.radius).all()):
            return -math.inf
        return _proved_shift(matrix, np.asarray(np.linalg.eigvalsh(A), dtype=np.float64))


def _proved_shift(matrix: Enclosure, values: Array) -> float:
    """Prove a lower bound near the smallest of the eigenvalues that were computed."""
    A, n = matrix.mid, matrix.mid.shape[0]
    scale = max(abs(values[0]), abs(values[-1]), 2.0**-1000)
    slack = 4 * n * UNIT * scale
    for _ in range(8):
        c = float(values[0]) - slack
        shifted = A - c * np.eye(n)
        R, info = scipy.linalg.lapack.dpotrf(shifted, lower=0, clean=1)
        if info == 0:
            factor = Enclosure(R)
            identity = Enclosure(c * np.eye(n))
            rest = matrix - identity - factor.T @ factor
            norm = float(np.max(sum_up(rest.magnitude, axis=1)))
            bound = down(c - norm, 2)
            return bound if math.isfinite(bound) else -math.inf
        slack *= 8
    return -math.inf


def largest_eigenvalue_bound(matrix: Enclosure) -> float:
    """Return a proved upper bound of λmax over all symmetric matrices in the enclosure."""
    return -smallest_eigenvalue_bound(-matrix)


def norm_bound(matrix: Enclosure) -> float:
    """Return a proved upper bound of ‖A‖₂, from the smaller of AᵀA and AAᵀ, or inf."""
    rows, columns = matrix.mid.shape
    # In units of a power of two near the largest entry: its square neither overflows nor vanishes.
    unit = power_of_two(float(np.max(np.abs(matrix.mid), initial=0.0)))
    with np.errstate(all="ignore"):
        A = matrix.scale(1 / unit)
        gram = A @ A.T if rows <= columns else A.T @ A
    return up(unit * up(math.sqrt(max(largest_eigenvalue_bound(gram), 0.0)), 2))


def power_of_two(size: float) -> float:
    """Return a power of two near a size, within 2^±1000; 1 for 0 and what is not finite."""
    if not TINY <= size < math.inf:
        return 1.0
    return math.ldexp(1.0, max(-1000, min(1000, math.frexp(size)[1] - 1)))

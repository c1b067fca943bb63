"""What can be proved in floating point? Matrices with entrywise error, and bounds of eigenvalues.

An `Enclosure` is a float64 matrix with a radius per entry; arithmetic on it keeps the exact result
inside, whatever the order of summation and whether or not fused multiply-adds are used. Error
bounds are the standard ones of Higham (2002), section 3.1: |fl(Σ aᵢbᵢ) − Σ aᵢbᵢ| ≤
γ_k Σ|aᵢbᵢ|, γ_k = ku/(1 − ku), plus some multiples of 2⁻¹⁰²² for underflow. They hold for every
classical matrix product (not for Strassen's, which no BLAS uses by default).

Note [Any floating-point mode]
Every thread, also one of a BLAS, has its own rounding mode and its own switches that read and write
denormal numbers as zero (`torch.set_flush_denormal`, libraries built with -ffast-math). Nothing
here relies on them. u = 2⁻⁵² covers all four rounding modes. An operation whose result lies below
2⁻¹⁰²², the smallest normal number, has an error of 2⁻¹⁰²² added. A denormal operand that is read as
zero makes an error that the other operand multiplies; so the numbers in an `Enclosure` are normal
or zero, and a denormal one becomes zero with radius 2⁻¹⁰²². The midpoint of a result may be
denormal; its radius then covers zero too.

Only products, sums and elementary operations are trusted. Eigenvalues and Cholesky factors are
proposals, which a product checks afterwards. Symbols: docs/glossary.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

Array = NDArray[np.float64]

UNIT = 2.0**-52
"""u for every rounding mode; for rounding to nearest u is half of it."""
TINY = 2.0**-1022
"""The smallest normal number, see Note [Any floating-point mode]."""
_HUGE = 2.0**1020
"""Larger numbers count as infinite: rounding towards zero turns overflow into a finite number."""


def gamma_k(k: int) -> float:
    """Return an upper bound of γ_k = ku/(1 − ku), the relative error of a sum of k products.

    Reference:
        Higham (2002), "Accuracy and stability of numerical algorithms", section 3.1.

    Example:
        >>> from lben.rigorous import UNIT, gamma_k
        >>> 10 * UNIT < gamma_k(10) < 10.001 * UNIT
        True
    """
    return k * UNIT / (1 - k * UNIT) * (1 + 4 * UNIT)


def up(x: float, ulps: int = 1) -> float:
    """Return x moved up by some units in the last place, and past the denormal numbers.

    Example:
        >>> from lben.rigorous import TINY, up
        >>> up(1.0) - 1.0 == 2.0**-52, up(0.0) == TINY
        (True, True)
    """
    for _ in range(ulps):
        x = math.nextafter(x, math.inf)
    return TINY if 0 <= x < TINY else x


def down(x: float, ulps: int = 1) -> float:
    """Return x moved down by some units in the last place, and past the denormal numbers.

    Example:
        >>> from lben.rigorous import down
        >>> 1.0 - down(1.0) == 2.0**-53
        True
    """
    return -up(-x, ulps)


def sum_up(values: Array, axis: int | None = None) -> Array:
    """Return upper bounds of sums of non-negative numbers.

    Args:
        values: the numbers.
        axis: along which to sum; None for all.

    Returns:
        The bounds; infinite where a sum leaves the range.

    Example:
        >>> import numpy as np
        >>> from lben.rigorous import sum_up
        >>> bool(sum_up(np.full(10, 0.1)) >= 1), sum_up(np.ones((2, 3)), axis=1).round(6).tolist()
        (True, [3.0, 3.0])
    """
    count = values.size if axis is None else values.shape[axis]
    total = np.sum(values, axis=axis) * (1 + 2 * gamma_k(count + 2))
    total = total + 2 * TINY * np.sum(values < TINY, axis=axis)  # read as zero
    return np.asarray(np.where(total < _HUGE, total, math.inf))


def is_denormal(values: Array) -> NDArray[np.bool_]:
    """Return which numbers are denormal, also in a mode that reads denormal numbers as zero.

    Example:
        >>> import numpy as np
        >>> from lben.rigorous import is_denormal
        >>> is_denormal(np.array([1e-310, 0.0, 1.0])).tolist()
        [True, False, False]
    """
    bits = np.ascontiguousarray(values).view(np.int64)
    return (bits << 1 != 0) & (np.abs(values) < TINY)


def norms_up(values: Array, axis: int) -> Array:
    """Return upper bounds of l2 norms along an axis.

    Example:
        >>> import numpy as np
        >>> from lben.rigorous import norms_up
        >>> bool((norms_up(np.array([[3.0, 4.0], [3e200, 4e200]]), 1) >= [5.0, 5e200]).all())
        True
    """
    count = values.shape[axis]
    largest = np.max(np.abs(values), axis=axis, keepdims=True, initial=0.0)
    # In units of a power of two near each one's largest entry, so that neither rows nor columns of
    # very different scale disturb each other; what squares lose to underflow is added.
    with np.errstate(invalid="ignore", over="ignore"):
        unit = np.ldexp(1.0, np.clip(np.frexp(largest)[1], -1000, 1000))
        norms = np.sqrt(np.sum((values / unit) ** 2, axis=axis)) * (1 + 2 * gamma_k(count + 4))
        norms = (norms + count * 2.0**-500) * unit.squeeze(axis) * (1 + 4 * UNIT) + 4 * TINY
    norms = np.where(norms < _HUGE, norms, math.inf)  # NaN too
    # Where all entries are below the smallest normal number, each may have been read as zero.
    return np.asarray(np.where(largest.squeeze(axis) < TINY, count * TINY, norms))


@dataclass(frozen=True, eq=False)
class Enclosure:
    """The set of all real matrices within `radius` of `mid`, entry by entry.

    Sums, products and the other operations return an enclosure of all exact results for matrices in
    their operands.

    Args:
        mid: float64 array; a denormal number becomes zero, and its size is added to the radius.
        radius: non-negative float64 array of the same shape; zeros when omitted (exact).

    Example:
        >>> import numpy as np
        >>> from lben.rigorous import Enclosure
        >>> third = Enclosure(np.array([[1.0]])) / 3.0
        >>> float(third.mid[0, 0]), 0 < float(third.radius[0, 0]) < 1e-15
        (0.3333333333333333, True)
        >>> (third @ third).magnitude.shape
        (1, 1)
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
    def _wrap(cls, mid: Array, radius: Array) -> Enclosure:
        """Return an enclosure as it is; its radius covers a midpoint that is read as zero."""
        sizes = (np.max(np.abs(mid), initial=0.0), np.max(radius, initial=0.0))
        if not (sizes[0] < _HUGE and sizes[1] < _HUGE):
            radius = np.full_like(radius, math.inf)
        result: Enclosure = object.__new__(cls)
        object.__setattr__(result, "mid", mid)
        object.__setattr__(result, "radius", radius)
        return result

    @property
    def T(self) -> Enclosure:
        """The transpose."""
        return Enclosure._wrap(self.mid.T, self.radius.T)

    @property
    def magnitude(self) -> Array:
        """Upper bounds of |entry|, a fresh array."""
        size = np.abs(self.mid)
        size += self.radius
        size *= 1 + 2 * UNIT
        return size

    def _round_result(self, mid: Array, radius: Array, operations: int) -> Enclosure:
        """Return mid with the radius given, which is overwritten, plus the rounding of mid."""
        # One rounding of the new midpoint, then the roundings of the radius itself; in place, since
        # a proof spends most of its time on passes over large matrices.
        rounding = np.abs(mid)
        rounding *= UNIT
        radius += rounding
        # Up to four products that underflowed, and a midpoint that is read as zero.
        radius += 8 * TINY
        radius *= 1 + (operations + 6) * 2 * UNIT
        return Enclosure._wrap(mid, radius)

    def __add__(self, other: Enclosure) -> Enclosure:
        return self._round_result(self.mid + other.mid, self.radius + other.radius, 2)

    def __sub__(self, other: Enclosure) -> Enclosure:
        return self._round_result(self.mid - other.mid, self.radius + other.radius, 2)

    def __neg__(self) -> Enclosure:
        return Enclosure._wrap(-self.mid, self.radius)

    def __mul__(self, other: Enclosure) -> Enclosure:
        """Return the entrywise product, with broadcasting."""
        radius = self.magnitude * other.radius
        if self.radius.any():
            radius += self.radius * np.abs(other.mid)
        return self._round_result(self.mid * other.mid, radius, 4)

    def __truediv__(self, scalar: float) -> Enclosure:
        """Divide by an exact non-zero number."""
        return self._round_result(self.mid / scalar, self.radius / abs(scalar), 2)

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
        return Enclosure._wrap(self.mid @ other.mid, radius)

    def scale(self, rows: Array | float, columns: Array | float = 1.0) -> Enclosure:
        """Return diag(rows) A diag(columns) for powers of two, which is exact without underflow.

        Args:
            rows, columns: powers of two, one per row and column, or one for all.

        Returns:
            The product; NaN where a scale is below the smallest normal number.
        """
        scale = np.multiply.outer(np.atleast_1d(rows), np.atleast_1d(columns))
        if not (scale >= TINY).all():
            scale = np.full_like(scale, math.nan)
        mid, radius = self.mid * scale, self.radius * scale
        if self.radius.any() or ((np.abs(mid) < TINY) & (self.mid != 0)).any():
            radius += 8 * TINY
        return Enclosure._wrap(mid, radius)

    def sqrt(self) -> Enclosure:
        """Return the entrywise square root of exact non-negative numbers.

        Raises:
            ValueError: if an entry is not exact.
        """
        if self.radius.any():
            raise ValueError("sqrt is defined here for exact entries only")
        return self._round_result(np.sqrt(self.mid), np.zeros_like(self.mid), 1)

    def reciprocal(self) -> Enclosure:
        """Return 1/x of every entry.

        Raises:
            ValueError: if the interval of an entry contains zero.
        """
        low = (np.abs(self.mid) - self.radius) * (1 - 4 * UNIT)
        if not (low > 0).all():
            raise ValueError("reciprocal of an interval that contains zero")
        mid = 1 / self.mid
        relative = self.radius / low + 2 * TINY  # what underflowed is multiplied by the next line
        return self._round_result(mid, relative * np.abs(mid) * (1 + 8 * UNIT), 6)

    def symmetric_part(self) -> Enclosure:
        """Return ½(A + Aᵀ)."""
        return (self + self.T) / 2.0


def block(rows: list[list[Enclosure]]) -> Enclosure:
    """Return the block matrix of rows of enclosures.

    Example:
        >>> import numpy as np
        >>> from lben.rigorous import Enclosure, block
        >>> one = Enclosure(np.ones((1, 1)))
        >>> block([[one, one], [one, one]]).mid.shape
        (2, 2)
    """
    return Enclosure(
        np.block([[e.mid for e in row] for row in rows]),
        np.block([[e.radius for e in row] for row in rows]),
    )


def solve(A: Enclosure, B: Enclosure) -> Enclosure:
    """Return an enclosure of A⁻¹B for all matrices in A and B.

    Let R be any matrix near A⁻¹, X any near RB, and E = I − RA. Then R(B − AX) = (I − E)(A⁻¹B − X).
    So if the row sums of |E| are at most e < 1, then A⁻¹ exists, and A⁻¹B − X differs from
    R(B − AX) by at most e/(1 − e) times the largest entry of its column.

    Args:
        A: n × n.
        B: n × k.

    Returns:
        n × k.

    Raises:
        ValueError: if A contains a matrix that is singular or near it.

    Reference:
        Rump (2010), "Verification methods: rigorous results using floating-point arithmetic",
        section 10.

    Example:
        >>> import numpy as np
        >>> from lben.rigorous import Enclosure, solve
        >>> x = solve(Enclosure(np.array([[2.0]])), Enclosure(np.array([[1.0]])))
        >>> float(x.mid[0, 0]), float(x.radius[0, 0]) < 1e-14
        (0.5, True)
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
    return Enclosure._wrap(X, radius)


def smallest_eigenvalue_bound(matrix: Enclosure) -> float:
    """Return a proved lower bound of λmin over all symmetric matrices in the enclosure.

    Let A be the symmetrised midpoint, c a number just below its computed smallest eigenvalue, and R
    any matrix, proposed by Cholesky of A − cI. Since RᵀR ⪰ 0, every symmetric matrix in the
    enclosure has

        λmin ≥ c − ‖A − cI − RᵀR‖_∞ − ‖radius‖_∞,

    where the difference is evaluated as an enclosure.

    Returns:
        The bound; −inf where no finite one can be proved (entries that are not finite, or no
        factor); inf for a matrix without rows.

    Example:
        >>> import numpy as np
        >>> from lben.rigorous import Enclosure, smallest_eigenvalue_bound
        >>> A = np.array([[2.0, 1.0], [1.0, 2.0]])
        >>> 1 - 1e-12 < smallest_eigenvalue_bound(Enclosure(A)) <= 1
        True
    """
    n = matrix.mid.shape[0]
    if n == 0:
        return math.inf
    with np.errstate(all="ignore"):  # what overflows is found not to be finite
        matrix = matrix.symmetric_part()
        A = matrix.mid
        if not (np.isfinite(A).all() and np.isfinite(matrix.radius).all()):
            return -math.inf
        return _prove_shift(matrix, np.asarray(np.linalg.eigvalsh(A), dtype=np.float64))


def _prove_shift(matrix: Enclosure, values: Array) -> float:
    """Return a proved lower bound near the smallest of the computed eigenvalues."""
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
    """Return a proved upper bound of λmax over all symmetric matrices in the enclosure.

    Example:
        >>> import numpy as np
        >>> from lben.rigorous import Enclosure, largest_eigenvalue_bound
        >>> 3 <= largest_eigenvalue_bound(Enclosure(np.array([[2.0, 1.0], [1.0, 2.0]]))) < 3.000001
        True
    """
    return -smallest_eigenvalue_bound(-matrix)


def norm_bound(matrix: Enclosure) -> float:
    """Return a proved upper bound of ‖A‖₂, from the smaller of AᵀA and AAᵀ.

    Returns:
        The bound; inf where none can be proved.

    Example:
        >>> import numpy as np
        >>> from lben.rigorous import Enclosure, norm_bound
        >>> 5 <= norm_bound(Enclosure(np.array([[3.0, 4.0]]))) < 5.000001
        True
    """
    rows, columns = matrix.mid.shape
    # In units of a power of two near the largest entry: its square neither overflows nor vanishes.
    unit = power_of_two(float(np.max(np.abs(matrix.mid), initial=0.0)))
    with np.errstate(all="ignore"):
        A = matrix.scale(1 / unit)
        gram = A @ A.T if rows <= columns else A.T @ A
    return up(unit * up(math.sqrt(max(largest_eigenvalue_bound(gram), 0.0)), 2))


def power_of_two(size: float) -> float:
    """Return a power of two near a size, within 2^±1000; 1 for sizes that are 0 or not finite.

    Example:
        >>> from lben.rigorous import power_of_two
        >>> power_of_two(5.0), power_of_two(0.0)
        (4.0, 1.0)
    """
    if not TINY <= size < math.inf:
        return 1.0
    return math.ldexp(1.0, max(-1000, min(1000, math.frexp(size)[1] - 1)))

"""Numbers m · 2ᵉ with integers m of any size: sums and products of floats without an error."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from torch import Tensor

BITS = 600
"""That `rounded` keeps: 2⁻⁶⁰⁰ is far below what float64 can say of anything near 1."""


@dataclass(frozen=True, eq=False)
class Dyadic:
    """An array of m · 2ᵉ, one exponent for all.

    Attributes:
        m: Python integers, in an array of objects.
        e: the exponent.
    """

    m: np.ndarray[Any, np.dtype[np.object_]]
    e: int

    @classmethod
    def of(cls, tensor: Tensor) -> Dyadic:
        """Return the very numbers of a float32 or float64 tensor."""
        mantissa, exponent = np.frexp(tensor.detach().cpu().numpy().astype(np.float64))
        digits = np.ldexp(mantissa, 53).astype(np.int64).astype(object)
        least = int(exponent.min(initial=0)) - 53
        return cls(digits << (exponent.astype(np.int64) - 53 - least).astype(object), least)

    def __matmul__(self, other: Dyadic) -> Dyadic:
        return Dyadic(np.asarray(self.m @ other.m, dtype=object), self.e + other.e)

    def __mul__(self, other: Dyadic) -> Dyadic:
        return Dyadic(self.m * other.m, self.e + other.e)

    def __add__(self, other: Dyadic) -> Dyadic:
        least = min(self.e, other.e)
        return Dyadic((self.m << (self.e - least)) + (other.m << (other.e - least)), least)

    def __neg__(self) -> Dyadic:
        return Dyadic(-self.m, self.e)

    def __sub__(self, other: Dyadic) -> Dyadic:
        return self + -other

    def positive(self) -> Dyadic:
        """Return max(x, 0)."""
        return Dyadic(np.maximum(self.m, 0), self.e)

    def rounded(self) -> Dyadic:
        """Return the same numbers to 2⁻⁶⁰⁰, so that digits do not grow without end."""
        shift = -BITS - self.e
        return self if shift <= 0 else Dyadic(self.m >> shift, -BITS)

    def divide(self, by: Dyadic) -> Dyadic:
        """Return the quotients to 2⁻⁶⁰⁰."""
        shift = self.e - by.e + BITS
        numerator = self.m << max(shift, 0)
        return Dyadic(numerator // (by.m << max(-shift, 0)), -BITS)

    def nearest(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Return the nearest float64 numbers."""
        scale = _power(self.e)
        flat = [float(scale * int(m)) for m in self.m.flat]
        return np.array(flat, dtype=np.float64).reshape(self.m.shape)

    def square(self) -> Fraction:
        """Return the sum of the squares."""
        digits = sum(int(m) * int(m) for m in self.m.flat)
        return Fraction(digits) * _power(2 * self.e)

    def reshape(self, *shape: int) -> Dyadic:
        """Return the same numbers in another shape."""
        return Dyadic(self.m.reshape(shape), self.e)


def _power(e: int) -> Fraction:
    """Return 2ᵉ."""
    return Fraction(2**e) if e >= 0 else Fraction(1, 2**-e)

"""z = σ(Wz + v) and its norms in rational arithmetic, for tests of what floating point claims."""

from fractions import Fraction

import torch


def rows(tensor):
    """Return the numbers of a matrix as fractions."""
    return [[Fraction(float(x)) for x in row] for row in tensor.detach().double()]


def product(W, z):
    """Return Wz."""
    return [sum((w * x for w, x in zip(row, z, strict=True)), Fraction(0)) for row in W]


def image(W, v, z, slope=Fraction(0)):
    """Return σ(Wz + v) with σ(p) = max(p, slope · p)."""
    return [max(p + b, slope * (p + b)) for p, b in zip(product(W, z), v, strict=True)]


def square(metric, x):
    """Return ‖x‖²_Λ."""
    return sum((m * a * a for m, a in zip(metric, x, strict=True)), Fraction(0))


def at_most(squared, bound):
    """Say whether a square root is at most a float."""
    return bound == float("inf") or squared <= Fraction(bound) ** 2


def dense(operator):
    """Return W of any operator as a float64 matrix whose entries are exact."""
    units = torch.arange(operator.n)
    return operator.to(torch.float64).submatrix(units, units)


def largest_residual(problem, z):
    """Return the largest relative residual, of z as it is returned."""
    W, (metric,) = rows(dense(problem.operator)), rows(problem.operator.metric[None])
    largest = 0.0
    for x, v in zip(rows(z), rows(problem.bias), strict=True):
        y = image(W, v, x)
        gap = square(metric, [a - b for a, b in zip(y, x, strict=True)])
        size = max(square(metric, y), square(metric, x))
        largest = max(largest, float(gap / size) ** 0.5 if size else 0.0)
    return largest

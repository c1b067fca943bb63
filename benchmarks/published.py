"""What did the published Peaceman–Rachford loop cost?

The algorithm of Winston and Kolter (2020), section 3.3 and appendix B, which the LBEN paper uses
too, written from its equations: one constant step α, the inverse of (1 + α)I − αW, and in the
backward pass its transpose with the elementwise resolvent of D. The peer is favoured: α is the
best of the paper's search, found outside the clock; the loop stops at the iteration an oracle
names, so it evaluates no residual; and the inverse is kept wherever lben keeps its factor.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from solvers import Inclusion, LinearSlope

ALPHAS = tuple(2.0**-k for k in range(-1, 9))


class Inverse(ABC):
    """((1 + α)I − αW)⁻¹, as the published code applies it."""

    @abstractmethod
    def apply(self, x: Tensor) -> Tensor:
        """Return the inverse times x."""

    @abstractmethod
    def adjoint(self, x: Tensor) -> Tensor:
        """Return the transposed inverse times x."""


@dataclass(frozen=True)
class DenseInverse(Inverse):
    """A matrix."""

    matrix: Tensor

    @staticmethod
    def of(W: Tensor, alpha: float) -> DenseInverse:
        """Invert (1 + α)I − αW."""
        identity = torch.eye(W.shape[0], dtype=W.dtype)
        return DenseInverse(torch.inverse((1 + alpha) * identity - alpha * W))

    def apply(self, x: Tensor) -> Tensor:
        return x @ self.matrix.T

    def adjoint(self, x: Tensor) -> Tensor:
        return x @ self.matrix


@dataclass(frozen=True, kw_only=True)
class Published:
    """The published loops at one step size.

    Attributes:
        alpha: α.
        forward_steps, backward_steps: where the oracle stops; None where no limit was enough.
    """

    alpha: float
    forward_steps: int | None
    backward_steps: int | None

    def forward(self, problem: Inclusion, inverse: Inverse) -> Tensor:
        """Return z after the oracle's number of iterations."""
        assert self.forward_steps is not None
        return _last(_forward(problem, inverse, self.alpha), self.forward_steps)

    def backward(self, adjoint: Inclusion, inverse: Inverse) -> Tensor:
        """Return u = D(Wᵀu + g) after the oracle's number of iterations."""
        assert self.backward_steps is not None
        return _last(_backward(adjoint, inverse, self.alpha), self.backward_steps)


def _last(iterates: Iterator[Tensor], steps: int) -> Tensor:
    for _ in range(steps - 1):
        next(iterates)
    return next(iterates)


def _forward(problem: Inclusion, inverse: Inverse, alpha: float) -> Iterator[Tensor]:
    bias = problem.bias
    z, u = torch.zeros_like(bias), torch.zeros_like(bias)
    while True:
        u_half = 2 * z - u
        z_half = inverse.apply(u_half + alpha * bias)
        u = 2 * z_half - u_half
        z = problem.activation(u)
        yield z


def _backward(adjoint: Inclusion, inverse: Inverse, alpha: float) -> Iterator[Tensor]:
    # λ solves (I − WᵀD)λ = g; with the elementwise resolvent of D⁻¹ − I the loop finds u = Dλ.
    g = adjoint.bias
    assert isinstance(adjoint.activation, LinearSlope)
    D = adjoint.activation.d
    dropped, inverse_slope = D == 0, (1 - D) / D.clamp_min(torch.finfo(D.dtype).tiny)
    z, u = torch.zeros_like(g), torch.zeros_like(g)
    while True:
        u_half = 2 * z - u
        z_half = inverse.adjoint(u_half + alpha * g)
        u = 2 * z_half - u_half
        z = torch.where(dropped, 0.0, u / (1 + alpha * inverse_slope))
        yield z


def search(
    problem: Inclusion,
    adjoint: Inclusion,
    tol: float,
    limit: int,
    invert: Callable[[float], Inverse] | None = None,
) -> Published:
    """Return the loops at the α that needs the fewest iterations forward.

    A loop has arrived when lben's own criterion, the relative residual in the Λ norm of every
    sample, is met; the oracle knows that iteration.

    Args:
        problem, adjoint: both problems.
        tol: relative tolerance.
        limit: iterations after which an α is given up.
        invert: the inverse for an α; of a dense W when omitted.
    """
    if invert is None:
        (W,) = problem.operator.tensors
        invert = partial(DenseInverse.of, W)
    best = Published(alpha=1.0, forward_steps=None, backward_steps=None)
    for alpha in ALPHAS:
        inverse = invert(alpha)
        most = limit if best.forward_steps is None else best.forward_steps - 1
        steps = _arrival(problem, _forward(problem, inverse, alpha), tol, most)
        if steps is not None:
            best = Published(alpha=alpha, forward_steps=steps, backward_steps=None)
    if best.forward_steps is None:
        return best
    inverse = invert(best.alpha)
    backward = _arrival(adjoint, _backward(adjoint, inverse, best.alpha), tol, limit)
    return replace(best, backward_steps=backward)


def _arrival(problem: Inclusion, iterates: Iterator[Tensor], tol: float, limit: int) -> int | None:
    """Return the first iteration that meets the tolerance, looked for as its decay suggests."""
    done, look = 0, 1
    before: tuple[int, float] | None = None
    while done < limit:
        for _ in range(look):
            z = next(iterates)
        done += look
        worst = float(problem.relative_residual(z).max())
        if worst <= tol:
            return done
        if not math.isfinite(worst):
            return None
        look = 1
        if before is not None and worst < before[1]:
            # Half of what the decay so far leaves to go, so that the first one is not passed.
            rate = math.log(worst / before[1]) / (done - before[0])
            look = max(1, int(0.5 * math.log(tol / worst) / rate))
        before = (done, worst)
        look = min(look, max(1, limit - done), max(1, done))
    return None

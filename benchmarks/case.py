"""What do all cells of one problem, precision and tolerance share?"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from benchmarks.problems import SEED, Problem
from solvers import (
    Auto,
    DenseOperator,
    Inclusion,
    LinearSlope,
    Method,
    PeacemanRachford,
    Solution,
    SolveWarning,
    equilibrium,
    solve,
)  # fmt: skip
from solvers.torchdeq import TorchDEQ

T_ = TypeVar("T_")


@dataclass(frozen=True)
class Case:
    """One problem at one precision and tolerance, with all that its cells share."""

    problem: Problem
    dtype: torch.dtype
    tol: float

    @cached_property
    def forward(self) -> Inclusion:
        """The problem, with factors that are kept."""
        return self.problem.inclusion(self.dtype)

    @cached_property
    def solution(self) -> Solution:
        """lben's solution."""
        return quietly(lambda: solve(self.forward, tol=self.tol))

    @cached_property
    def cotangent(self) -> Tensor:
        """A standard normal cotangent of z."""
        g = torch.Generator().manual_seed(SEED + 1)
        return torch.randn(self.forward.bias.shape, generator=g, dtype=self.dtype)

    @cached_property
    def adjoint(self) -> Inclusion:
        """The adjoint problem at the solution."""
        slope = self.forward.activation.slope(self.solution.value)
        return Inclusion(self.forward.operator.T, self.cotangent, LinearSlope(slope))

    @property
    def adjoint_method(self) -> Method:
        """What `Auto` takes for the adjoint after this forward solve."""
        return Auto().choose_adjoint(float(self.solution.stats.steps.double().mean()), self.adjoint)

    def gradients(self, method: Method, *, new_weights: bool, max_steps: int = 5000) -> Solution:
        """Solve, and pass the cotangent back to W and v."""
        forward = self.forward
        W = forward.operator.tensors[0].detach().clone().requires_grad_()
        v = forward.bias.detach().clone().requires_grad_()
        stored = forward.operator.rebuild((W,))
        operator = DenseOperator(W, forward.metric) if new_weights else stored
        solution = equilibrium(
            Inclusion(operator, v, forward.activation), method, tol=self.tol, max_steps=max_steps,
            require_monotone=not isinstance(method, TorchDEQ), on_failure="raise",
        )  # fmt: skip
        solution.value.backward(self.cotangent)
        return solution

    def cell(
        self, threads: int, direction: str, product: float | None, results: list[dict[str, Any]]
    ) -> dict[str, Any]:
        """Return the record of one cell."""
        problem = self.problem
        return {
            "problem": problem.name, "family": problem.family, "n": problem.n,
            "batch": problem.batch, "m": problem.m, "skew": problem.skew, "threads": threads,
            "tol": self.tol, "dtype": str(self.dtype)[6:], "direction": direction,
            "product_seconds": product, "results": results,
        }  # fmt: skip

    def violations(self) -> int:
        """Count states, forward and adjoint, whose error exceeds the returned bound.

        The errors of the first 128 samples are measured against float64 references to 1e-13, whose
        own bounds are granted; a reference that misses 1e-13 raises.
        """
        adjoint = quietly(lambda: solve(self.adjoint, self.adjoint_method, tol=self.tol))
        return _beyond(self.forward, self.solution) + _beyond(self.adjoint, adjoint)


def _beyond(problem: Inclusion, solution: Solution) -> int:
    few = torch.arange(min(128, problem.bias.shape[0]))
    exact = problem.select(few).to(torch.float64)
    reference = solve(exact, PeacemanRachford(), tol=1e-13, max_steps=20000, on_failure="raise")
    error = exact.operator.norm(solution.value[few].double() - reference.value)
    return int((error - reference.error_bound > solution.error_bound[few]).sum())


def quietly(call: Callable[[], T_]) -> T_:
    """Return what the call returns, without warnings of solves that missed their tolerance."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SolveWarning)
        return call()

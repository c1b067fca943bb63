"""A splitting's loop in one piece, where there is one for the problem: CPU or CUDA device."""

from types import ModuleType

from torch import Tensor

from solvers.backends import cpu, triton
from solvers.backends.pointwise import activate, activates, reflect_sum
from solvers.backends.step import Iteration, Outcome, Request
from solvers.backends.triton_launch import KernelWarning
from solvers.inclusion import Inclusion

__all__ = [
    "Iteration",
    "KernelWarning",
    "activate",
    "activates",
    "reflect_sum",
    "run",
    "run_fixed_steps",
    "supports",
]


def supports(problem: Inclusion) -> str | None:
    """Return why no fused loop can solve this problem, or None when one can."""
    return _backend(problem).supports(problem)


def run(problem: Inclusion, iteration: Iteration, request: Request) -> Outcome | str:
    """Solve a flat problem that `supports` accepts, or say why its kernels cannot run here."""
    return _backend(problem).run(problem, iteration, request)


def run_fixed_steps(
    problem: Inclusion, iteration: Iteration, steps: int
) -> tuple[Tensor, Tensor] | None:
    """Return z and its relative residual after some steps of a flat problem, or at rest.

    The host never waits, so a graph may capture it. None where no kernel does it in one launch.
    """
    backend = _backend(problem)
    return triton.run_fixed_steps(problem, iteration, steps) if backend is triton else None


def _backend(problem: Inclusion) -> ModuleType:
    return triton if problem.bias.device.type == "cuda" else cpu

"""A splitting's loop in one piece, where there is one for the problem: CPU or CUDA device."""

from types import ModuleType

from torch import Tensor

from solvers.fused import device, loop
from solvers.fused.iteration import Iteration
from solvers.fused.launch import KernelWarning
from solvers.fused.pointwise import activated, activates, reflected_sum
from solvers.inclusion import Inclusion
from solvers.method import Outcome, Request

__all__ = [
    "Iteration",
    "KernelWarning",
    "activated",
    "activates",
    "reflected_sum",
    "run",
    "supports",
    "within_budget",
]


def supports(problem: Inclusion) -> str | None:
    """Return why no fused loop can solve this problem, or None when one can."""
    return _backend(problem).supports(problem)


def run(problem: Inclusion, iteration: Iteration, request: Request) -> Outcome | str:
    """Solve a flat problem that `supports` accepts, or say why its kernels cannot run here."""
    return _backend(problem).run(problem, iteration, request)


def within_budget(
    problem: Inclusion, iteration: Iteration, steps: int
) -> tuple[Tensor, Tensor] | None:
    """Return z and its relative residual after some steps of a flat problem, or at rest.

    The host never waits, so a graph may capture it. None where no kernel does it in one launch.
    """
    backend = _backend(problem)
    return device.within_budget(problem, iteration, steps) if backend is device else None


def _backend(problem: Inclusion) -> ModuleType:
    return device if problem.bias.device.type == "cuda" else loop

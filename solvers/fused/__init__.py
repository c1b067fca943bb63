"""A splitting's loop in one piece, where there is one for the problem: CPU or CUDA device."""

from types import ModuleType

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
]


def supports(problem: Inclusion) -> str | None:
    """Return why no fused loop can solve this problem, or None when one can."""
    return _backend(problem).supports(problem)


def run(problem: Inclusion, iteration: Iteration, request: Request) -> Outcome | str:
    """Solve a flat problem that `supports` accepts, or say why its kernels cannot run here."""
    return _backend(problem).run(problem, iteration, request)


def _backend(problem: Inclusion) -> ModuleType:
    return device if problem.bias.device.type == "cuda" else loop

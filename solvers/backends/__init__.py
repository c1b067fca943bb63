"""Where does a splitting run as one fused loop?

Compiled on a CPU (`cpu`) and in Triton on a CUDA device (`triton`), for the problems that
`find_obstacle` accepts.
"""

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
    "find_obstacle",
    "reflect_sum",
    "run",
    "run_fixed_steps",
]


def find_obstacle(problem: Inclusion) -> str | None:
    """Return why no fused loop can solve this problem, or None if one can.

    Example:
        >>> import torch
        >>> from solvers import DenseOperator, Tanh
        >>> problem = Inclusion(DenseOperator(torch.zeros(2, 2)), torch.ones(1, 2), Tanh())
        >>> find_obstacle(problem)
        'Tanh() is not piecewise linear'
    """
    return _backend(problem).find_obstacle(problem)


def run(problem: Inclusion, iteration: Iteration, request: Request) -> Outcome | str:
    """Solve a problem for which `find_obstacle` returned None.

    Args:
        problem: with a bias of shape batch × n, cut from the graph.
        iteration: the splitting.
        request: tolerance in the Λ norm, step limit and start.

    Returns:
        The outcome, or why the kernels cannot run on this device.
    """
    return _backend(problem).run(problem, iteration, request)


def run_fixed_steps(
    problem: Inclusion, iteration: Iteration, steps: int
) -> tuple[Tensor, Tensor] | None:
    """Take a number of steps in one launch, without waiting for the device.

    A CUDA graph may capture it, because the host never waits.

    Args:
        problem: with a bias of shape batch × n, cut from the graph.
        iteration: the splitting.
        steps: how many; the kernel may stop earlier if the iteration is at rest.

    Returns:
        z and its relative residual per sample in the Λ norm, or None if no kernel does all steps in
        one launch.
    """
    backend = _backend(problem)
    return triton.run_fixed_steps(problem, iteration, steps) if backend is triton else None


def _backend(problem: Inclusion) -> ModuleType:
    return triton if problem.bias.device.type == "cuda" else cpu

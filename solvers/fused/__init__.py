"""A splitting's loop in one piece, where there is one for the problem."""

from solvers.fused.loop import Iteration, run, supports

__all__ = ["Iteration", "run", "supports"]

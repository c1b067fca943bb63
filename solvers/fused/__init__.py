"""The splitting loop compiled for this machine's processor."""

from solvers.fused.build import status
from solvers.fused.loop import Iteration, run, supports

__all__ = ["Iteration", "run", "status", "supports"]

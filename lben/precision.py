"""Do float32 products of layers run in float32? The answer is that of the solvers."""

from solvers.precision import full

__all__ = ["full"]

"""Linear maps W with what a splitting asks of them; one file per structure."""

from solvers.operators.base import (
    Constants,
    LinearOperator,
    Map,
    NotMonotoneError,
    Resolvent,
)
from solvers.operators.dense import DenseOperator

__all__ = [
    "Constants",
    "DenseOperator",
    "LinearOperator",
    "Map",
    "NotMonotoneError",
    "Resolvent",
]

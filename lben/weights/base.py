"""What do the weights of every kind of layer have in common?"""

from __future__ import annotations

import hashlib
import math
import numbers
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from solvers.precision import cast


def digest(header: str, tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of a header and of names, shapes, dtypes and bits of tensors."""
    result = hashlib.sha256(header.encode())
    for name, value in sorted(tensors.items()):
        array = value.detach().cpu().resolve_neg().contiguous()
        result.update(f"{name}:{array.dtype}:{tuple(array.shape)};".encode())
        result.update(array.reshape(-1).view(torch.uint8).numpy().tobytes())
    return result.hexdigest()


def convert(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor in another precision, cut from the graph, on the CPU.

    To float64 it is exact, also where the process reads denormal numbers as zero: those of float32
    are an integer times 2⁻¹⁴⁹.
    """
    t = t.detach().to("cpu")
    # bfloat16 and float16 to float32: a matter of bits.
    narrow = t.dtype not in (torch.float32, torch.float64)
    return cast(t.to(torch.float32) if dtype == torch.float64 and narrow else t, dtype)


def check_tensors(values: Mapping[str, Any]) -> None:
    """Raise ValueError unless every value is None or a tensor."""
    for name, value in values.items():
        if value is not None and not isinstance(value, Tensor):
            raise ValueError(
                f"{name} must be a torch.Tensor, got {type(value).__name__}: take "
                "torch.as_tensor(...) of it"
            )


def check_dimensions(name: str, value: Tensor, count: int) -> None:
    """Raise ValueError unless a tensor has this number of dimensions."""
    if value.ndim != count:
        raise ValueError(f"{name} must have {count} dimensions, got shape {tuple(value.shape)}")


def check_gamma(gamma: Any) -> float | None:
    """Return gamma as a float, or None for None.

    Raises:
        ValueError: unless gamma is None or a positive, finite real number.
    """
    number = None if gamma is None else as_number(gamma)
    if gamma is not None and (number is None or not 0 < number < math.inf):
        raise ValueError(
            "gamma must be a positive, finite Lipschitz bound (or None for no bound), "
            f"got {gamma!r}"
        )
    return number


def check_epsilon(epsilon: Any) -> float:
    """Return epsilon as a float.

    Raises:
        ValueError: unless it is a positive, finite real number.
    """
    number = as_number(epsilon)
    if number is None or not 0 < number < math.inf:
        raise ValueError(f"epsilon must be positive and finite, got {epsilon!r}")
    return number


def as_number(value: Any) -> float | None:
    """Return a real number of Python, NumPy or torch as a float; None for all else, and bool."""
    if isinstance(value, Tensor | np.ndarray) and value.ndim:
        return None
    if isinstance(value, Tensor | np.ndarray | np.generic):
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf

"""How is the inequality proved, for one block or for many?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from lben.certificates.records import AnyWeights, Certificate, CertificateError
from lben.convolutional import PooledWeights
from lben.inequality import Inequality


def check_entries(weights: AnyWeights, multiplier: Tensor) -> None:
    """Refuse weights that are not finite, and multipliers that are not positive."""
    if not all(bool(torch.isfinite(t).all()) for t in weights.tensors().values()):
        raise CertificateError("the weights contain NaN or Inf")
    own = weights.state.Lambda if isinstance(weights, PooledWeights) else weights.Lambda
    if not bool((own > 0).all() and (multiplier > 0).all()):
        raise CertificateError("Λ must be positive in every entry")


def prove(
    weights: AnyWeights,
    gamma: float | None,
    claimed: Sequence[Inequality],
    own: Sequence[Inequality],
    method: str,
) -> Certificate:
    """Prove every block of M for the claim; the solver's constants are those of the own Λ."""
    margin = _least(block.margin(gamma) for block in claimed)
    computed = _least(block.smallest_eigenvalue(gamma) for block in claimed)
    require(margin, lambda: computed, gamma)
    return Certificate(
        bound=math.inf if gamma is None else gamma,
        margin=margin,
        smallest_eigenvalue=computed,
        m=_least(block.monotonicity() for block in own),
        L=_largest(block.norm() for block in own),
        output_gain=_largest(block.output_gain() for block in own),
        fingerprint=weights.fingerprint,
        dtype=str(next(iter(weights.tensors().values())).dtype).removeprefix("torch."),
        method=method,
        versions={"torch": torch.__version__, "numpy": np.__version__},
    )


def _least(values: Iterable[float]) -> float:
    """Return the minimum, −inf if one is NaN: `min` would drop it."""
    numbers = list(values)
    return -math.inf if any(map(math.isnan, numbers)) else min(numbers)


def _largest(values: Iterable[float]) -> float:
    """Return the maximum, inf if one is NaN."""
    return -_least(-value for value in values)


def require(margin: float, compute: Callable[[], float], gamma: float | None) -> None:
    """Refuse a margin that is not positive, with the smallest eigenvalue as computed."""
    if not margin > 0:
        computed = compute()
        statement = "well-posedness" if gamma is None else f"the Lipschitz bound γ = {gamma:g}"
        raise CertificateError(
            f"{statement} could not be proved: M has smallest eigenvalue {computed:.3e}, and the "
            f"proved lower bound {margin:.3e} is not positive. Causes: the weights do not satisfy "
            "the condition (a parameterization is broken or was rounded to low precision), or the "
            "slack ε is smaller than rounding. Try float64 or a larger epsilon."
        )

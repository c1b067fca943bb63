"""How is the inequality M(Λ, γ) ⪰ 0 proved, for one block or for many?

Symbols: docs/glossary.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lben.certificates.certificate import CertificateError, LayerCertificate, name_of_dtype
from lben.certificates.claims import Claim
from lben.certificates.inequality import Inequality
from lben.rigorous import TINY, Array
from lben.weights import Weights, convert

W_ = TypeVar("W_", bound=Weights)


def read_exactly(weights: W_) -> W_:
    """Return the stored weights in float64; refuse weights about which nothing can be proved.

    Args:
        weights: of any kind.

    Raises:
        ValueError: for tensors that are neither all float32 nor all float64, not dense, on several
            devices, without values, or inside a transform of torch.func.
        CertificateError: for NaN, infinite numbers, and multipliers that are not positive.
    """
    tensors = weights.tensors()
    for name, t in tensors.items():
        if torch._C._functorch.is_functorch_wrapped_tensor(t):
            raise ValueError(
                f"a proof needs numbers, and {name} is inside a transform of torch.func: prove the "
                "weights outside of it"
            )
        if t.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"proofs are of float32 and float64 weights, {name} is {t.dtype}: convert all of "
                "them (weights.to(torch.float64) is exact for bfloat16 and float16), or the layer "
                "by float()"
            )
        if t.layout != torch.strided:
            raise ValueError(f"a proof needs dense tensors, and {name} is {t.layout}")
        if t.is_meta:
            raise ValueError(f"a proof needs numbers, and {name} is on the meta device")
    for what in ("dtype", "device"):
        kinds = {str(getattr(t, what)): name for name, t in tensors.items()}
        if len(kinds) > 1:
            found = " and ".join(f"{kind} in {name}" for kind, name in sorted(kinds.items()))
            raise ValueError(f"the tensors of the weights must share one {what}, got {found}")
    bad = [name for name, t in tensors.items() if not bool(torch.isfinite(t).all())]
    if bad:
        raise CertificateError(f"the weights contain NaN or Inf, in {', '.join(bad)}")
    weights.check_values()
    exact = weights.to(torch.float64)
    check_multiplier(exact.multiplier)
    return exact


def check_multiplier(multiplier: Tensor) -> None:
    """Refuse multipliers that are not positive normal numbers.

    Args:
        multiplier: Λ, n numbers.
    """
    finite = bool(torch.isfinite(multiplier).all())
    if not (finite and bool((multiplier >= TINY).all())):
        least = float(multiplier.min()) if finite else math.nan
        raise CertificateError(
            f"Λ must be positive in every entry: finite numbers from {TINY:.3g}, its least is "
            f"{least:.3g}"
        )


def numbers_of(name: str, values: object, size: int) -> Array:
    """Return numbers of a claim in float64, or refuse them.

    Args:
        name: in the message.
        values: a tensor or an array of real numbers.
        size: how many there should be.

    Raises:
        ValueError: for another size, or numbers that are not real.
    """
    array = values if isinstance(values, Tensor) else np.asarray(values)
    if tuple(array.shape) != (size,):
        raise ValueError(
            f"a claim needs {size} numbers {name}: {name} must have shape {(size,)}, "
            f"got {tuple(array.shape)}"
        )
    if isinstance(array, Tensor):
        if array.dtype.is_complex or array.dtype == torch.bool:
            raise ValueError(f"the claim's {name} must hold real numbers, got {array.dtype}")
        return np.asarray(convert(array, torch.float64).numpy())
    if array.dtype.kind not in "fiu":
        raise ValueError(f"the claim's {name} must hold real numbers, got {array.dtype}")
    if array.dtype == np.float32:
        return np.asarray(convert(torch.from_numpy(array), torch.float64).numpy())
    return np.asarray(array, dtype=np.float64)


def multiplier_of(weights: Weights, claim: Claim) -> Float[Tensor, " n"]:
    """Return the Λ of a claim about weights, in float64.

    Args:
        weights: that the claim is about.
        claim: with its Λ.

    Raises:
        ValueError: for another size, or numbers that are not real.
        CertificateError: for numbers that are not positive and normal.
    """
    multiplier = torch.from_numpy(numbers_of("Lambda", claim.Lambda, len(weights.multiplier)))
    check_multiplier(multiplier)
    return multiplier


def prove(
    weights: Weights,
    gamma: float | None,
    claimed: Sequence[Inequality],
    own: Sequence[Inequality],
    method: str,
) -> LayerCertificate:
    """Prove that every block of M is positive definite, and return the certificate.

    Args:
        weights: that the certificate is tied to.
        gamma: γ of the claim, or None for well-posedness alone.
        claimed: the blocks with the Λ of the claim.
        own: the blocks with the Λ of the weights, which give m, L and the output gain.
        method: how the proof is done, for the certificate.

    Raises:
        CertificateError: if a block is not proved to be positive definite.
    """
    margin = _find_least(block.margin(gamma) for block in claimed)
    computed = _find_least(block.smallest_eigenvalue(gamma) for block in claimed)
    require(margin, lambda: computed, gamma)
    return LayerCertificate(
        bound=math.inf if gamma is None else gamma,
        margin=margin,
        smallest_eigenvalue=computed,
        m=_find_least(block.monotonicity() for block in own),
        L=_find_largest(block.norm() for block in own),
        output_gain=_find_largest(block.output_gain() for block in own),
        fingerprint=weights.fingerprint,
        dtype=name_of_dtype(weights),
        method=method,
    )


def _find_least(values: Iterable[float]) -> float:
    """Return the minimum, −inf if one is NaN: `min` would drop it."""
    numbers = list(values)
    return -math.inf if any(map(math.isnan, numbers)) else min(numbers)


def _find_largest(values: Iterable[float]) -> float:
    """Return the maximum, inf if one is NaN."""
    return -_find_least(-value for value in values)


def require(margin: float, compute: Callable[[], float], gamma: float | None) -> float:
    """Return a margin, or refuse one that is not positive.

    Args:
        margin: the proved lower bound.
        compute: returns the smallest eigenvalue as computed, for the message.
        gamma: γ, for the message; None for well-posedness.

    Raises:
        CertificateError: with the margin, the smallest eigenvalue as computed, likely causes.
    """
    if not margin > 0:
        computed = compute()
        statement = "well-posedness" if gamma is None else f"the Lipschitz bound γ = {gamma:g}"
        raise CertificateError(
            f"{statement} could not be proved: M has smallest eigenvalue {computed:.3e}, and the "
            f"proved lower bound {margin:.3e} is not positive. Causes: the weights do not satisfy "
            "the condition (a parameterization is broken or was rounded to low precision), the "
            "slack ε is smaller than rounding, or numbers leave the range of float64. Try float64, "
            "a larger epsilon, or weights scaled towards 1."
        )
    return margin

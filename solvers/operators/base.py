"""What must a linear operator W offer so that z = σ(Wz + v) can be split?

Products with W and Wᵀ, the resolvent of the monotone part I − W, and the constants (m, L) of
I − W in the norm ‖z‖_Λ = √(zᵀΛz) that the operator carries.
"""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from solvers.activations import Step
from solvers.dependencies import (
    Sendable,
    Snapshot,
    are_identical,
    leave_modes,
    must_not_cache,
)
from solvers.precision import cast

T_ = TypeVar("T_")


class NotMonotoneError(ValueError):
    """I − W is not strongly monotone in the Λ norm, so the equilibrium need not exist."""


@dataclass(frozen=True)
class Constants:
    """Constants of I − W in the Λ norm, with H = Λ^½ (I − W) Λ^(−½).

    Attributes:
        m: lower bound of the strong monotonicity λmin(sym H).
        L: upper bound of the Lipschitz constant ‖H‖₂.
    """

    m: float
    L: float


class Map(ABC):
    """A linear map M that a splitting applies once per step."""

    is_dear: bool = False
    """Whether a product costs many elementwise passes over its argument."""

    @abstractmethod
    def add(
        self, x: Float[Tensor, "batch n"], shift: Float[Tensor, "batch n"], out: Tensor | None
    ) -> Float[Tensor, "batch n"]:
        """Return shift + Mx, written to `out` (which is neither x nor shift) when given."""


class Resolvent(ABC):
    """R = (I + diag(α)(I − W))⁻¹, factored once per weight change."""

    @abstractmethod
    def solve(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        """Return R x."""

    @property
    @abstractmethod
    def T(self) -> Resolvent:
        """The resolvent of Wᵀ with the same step, from the same factor.

        (I + P(I − Wᵀ))⁻¹ = P (I + P(I − W))⁻ᵀ P⁻¹ with P = diag(α).
        """

    @abstractmethod
    def reflection(self) -> Map:
        """Return 2R − I."""


class LinearOperator(Sendable, ABC):
    """A linear map W on ℝⁿ with the inner product ⟨y, z⟩_Λ = yᵀΛz.

    Laws, each tested: ⟨Wz, y⟩ = ⟨z, Wᵀy⟩; resolvent(α) inverts I + diag(α)(I − W);
    ⟨(I − W)z, z⟩_Λ ≥ m ‖z‖²_Λ and ‖(I − W)z‖_Λ ≤ L ‖z‖_Λ.
    """

    metric: Float[Tensor, " n"]
    """Λ, positive."""
    transposed: bool
    """Whether this is the transpose of the operator whose factors the memo holds."""
    _memo: dict[Hashable, Any]

    # Note [Whose values a memo holds]
    # What the memo keeps belongs to values of W and Λ, of which it has a snapshot. A lookup
    # compares the values now with it (`solvers.dependencies`); where they differ, the operator
    # starts a memo of its own. W, Wᵀ and operators rebuilt on equal tensors share one memo, so the
    # snapshot is of the tensors of W as first given. A solve looks often: it compares once, when it
    # begins, and its lookups trust that nobody writes to W meanwhile (`settled`).
    def __post_init__(self) -> None:
        """Give the operator a memo and an orientation, unless its class has fields for them."""
        for name, value in (("_memo", {}), ("transposed", False)):
            if name not in self.__dict__:
                object.__setattr__(self, name, value)

    def _given(self) -> tuple[Tensor, ...]:
        """Return the tensors of W as first given, whose transpose this may be."""
        return self.tensors

    def _own_metric(self) -> Tensor:
        """Return the tensor that `metric` is made of."""
        return self.metric

    def _parts(self) -> tuple[LinearOperator, ...]:
        """Return the operators that this one is made of, which have memos of their own."""
        return ()

    def _shared(self) -> dict[Hashable, Any]:
        """Return the memo, a new one where the values are no longer those that it belongs to."""
        if id(self._memo) in _trusted.memos:
            return self._memo
        if must_not_cache():
            return {}
        self._settle()
        return self._memo

    def _settle(self) -> None:
        """Compare all values at once; where some changed, find out which memos end."""
        values = self._values()
        tensors: list[Tensor] = []
        copies: list[Tensor] = []
        for memo, key, own in values:
            if key in memo:
                tensors += own
                copies += memo[key].copies
        if len(tensors) != len(copies) or not are_identical(tensors, copies):
            return self._settle_apart()
        for memo, key, own in values:
            if key not in memo:
                memo[key] = Snapshot.take(own)
        return None

    def _values(self) -> list[tuple[dict[Hashable, Any], Hashable, tuple[Tensor, ...]]]:
        """Return the tensors of which memos hold snapshots: memo, key and tensors, of all parts."""
        found: list[tuple[dict[Hashable, Any], Hashable, tuple[Tensor, ...]]] = [
            (self._memo, "values of W", self._given()),
            (self._memo, ("values of Λ", self.transposed), (self._own_metric(),)),
        ]
        for part in self._parts():
            found += part._values()
        return found

    def _settle_apart(self) -> None:
        for part in self._parts():
            part._settle()
        for memo, key, tensors in self._values()[:2]:
            snapshot = memo.get(key)
            if snapshot is not None and not snapshot.fits(tensors):
                object.__setattr__(self, "_memo", {})
                return self._settle()
            if snapshot is None:
                memo[key] = Snapshot.take(tensors)
        return None

    def adopt(self, other: LinearOperator) -> None:
        """Take over the memo of another operator of this structure, as far as the values agree."""
        object.__setattr__(self, "_memo", other._memo)
        for own, theirs in zip(self._parts(), other._parts(), strict=True):
            own.adopt(theirs)

    def _memos(self) -> dict[int, dict[Hashable, Any]]:
        """Return the memos of this operator and of those that it is made of, by identity."""
        found = {id(self._memo): self._memo}
        for part in self._parts():
            found |= part._memos()
        return found

    def settled(self) -> AbstractContextManager[None]:
        """Compare all values with those that the memo is of; within the block trust the result.

        For this operator, those that it is made of, and their transposes, on this thread.
        """
        if id(self._memo) in _trusted.memos or must_not_cache():
            return nullcontext()
        self._settle()
        return _Trusting(self._memos())

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_memo": {}}

    @property
    @abstractmethod
    def n(self) -> int:
        """Number of units."""

    @property
    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that define W: what a gradient with respect to W is taken for."""

    @property
    @abstractmethod
    def T(self) -> LinearOperator:
        """Wᵀ, monotone in Λ⁻¹ where W is monotone in Λ, sharing every factor."""

    @abstractmethod
    def rebuild(self, tensors: tuple[Tensor, ...]) -> LinearOperator:
        """Return this operator on `tensors`, equal in value, keeping all cached factors."""

    @abstractmethod
    def to(self, dtype: torch.dtype) -> LinearOperator:
        """Return the same operator in another precision, detached; built once."""

    @abstractmethod
    def mv(self, z: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        """Return Wz."""

    @abstractmethod
    def pullback(
        self, u: Float[Tensor, "*batch n"], z: Float[Tensor, "*batch n"]
    ) -> tuple[Tensor, ...]:
        """Return the gradient of Σ ⟨u, Wz⟩ with respect to `tensors`."""

    @abstractmethod
    def magnitude(self, z: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        """Return |W| z for non-negative z, or more; rounding errors of Wz are below
        γ_summands · magnitude(|z|)."""

    @property
    def summands(self) -> int:
        """The longest chain of roundings in one entry of Wz."""
        return self.n

    # Note [Rounding of a product]
    # A sum of k products, added in any order and in any number of accumulators, with or without
    # fused multiply-adds, errs by at most γ_k Σ|aᵢbᵢ| with γ_k = ku/(1 − ku), u half an eps (Higham
    # 2002, section 3.1). A further term that some accumulator starts with, as v in addmm, is one
    # more summand: γ_{k+1}(Σ|aᵢbᵢ| + |v|). Strassen's and Winograd's products are not covered; no
    # BLAS uses them by default, nor does oneDNN for the convolutions of PyTorch on a CPU, but cuDNN
    # may for float32 convolutions. What is below the smallest normal number may be flushed to zero:
    # in a product or a sum that is at most 2 of that number for each operation; in an argument it
    # is that number times the other argument, up to |W|1 for z (`losses`) and Σ|z| for W
    # (`unread`). All bounds here take eps for u, twice what is needed, are evaluated in float64,
    # and are infinite where they overflow.
    def rounding(self, z: Float[Tensor, "*batch n"]) -> Float[Tensor, " *batch"]:
        """Return a bound of the rounding error of `mv(z)` in the Λ norm, in float64.

        For the product in the dtype of z; see Note [Rounding of a product] for what it covers.
        """
        exact, finfo = self.to(torch.float64), torch.finfo(z.dtype)
        size = cast(z.detach(), torch.float64).abs()
        unit = (self.summands + 4) * finfo.eps
        lost = finfo.tiny * (exact.losses() + exact.unread(size))
        return exact.norm_above(unit * exact.magnitude(size) + lost)

    def losses(self) -> Float[Tensor, " n"]:
        """Return what Wz may lose to underflow, per unit, in units of the smallest normal number.

        2 for each operation, times what is multiplied by it later, and |W|1.
        """
        ones = torch.ones_like(self.metric.detach())
        return 2.0 * (self.summands + 4) + self.magnitude(ones)

    def unread(self, size: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        """Return what Wz may miss where entries of W are read as zero, in the same units.

        Linear in size = |z|.
        """
        return size.sum(-1, keepdim=True).expand_as(size)

    @property
    def by_kernels(self) -> bool:
        """Whether products are convolutions by kernels, which a device may evaluate by Winograd's
        method."""
        return False

    def rounding_gain(self, dtype: torch.dtype) -> float:
        """Return r with: `rounding(z)` in this dtype is at most r ‖z‖_Λ, `losses` aside."""
        finfo = torch.finfo(dtype)
        return (self.summands + 4) * finfo.eps * self.absolute_gain() + self._unread_gain(dtype)

    def _unread_gain(self, dtype: torch.dtype) -> float:
        exact = self.to(torch.float64)
        missed = exact.norm_above(exact.unread(1 / exact.root_metric))
        return torch.finfo(dtype).tiny * float(missed)

    def absolute_gain(self) -> float:
        """Return at least ‖Λ^½ |W| Λ^(−½)‖₂ ≤ √(‖·‖₁ ‖·‖_∞), from two products with |W|."""
        return self.memo("absolute gain", self._absolute_gain)

    def _absolute_gain(self) -> float:
        exact = self.to(torch.float64)
        root = exact.root_metric
        rows = (root * exact.magnitude(1 / root)).max()
        columns = (exact.T.magnitude(root) / root).max()
        gain = float(rows.sqrt() * columns.sqrt())
        terms = self.summands + 16
        gain = gain * (1 + 2 * terms * torch.finfo(torch.float64).eps)
        return math.inf if math.isnan(gain) else gain

    @abstractmethod
    def diagonal(self) -> Float[Tensor, " n"]:
        """Return the diagonal of W."""

    def preconditioner(self) -> Float[Tensor, " n"]:
        """Return the diagonal of W as far as step sizes per unit can follow it."""
        return self.diagonal()

    @abstractmethod
    def submatrix(self, rows: Tensor, columns: Tensor) -> Float[Tensor, "... r c"]:
        """Return W[rows, columns] for index tensors of shapes (..., r) and (..., c)."""

    @abstractmethod
    def log_determinant(self) -> float:
        """Return log |det(I − W)|."""

    def mean_log_eigenvalue(self) -> float:
        """Return log |det(I − W)| / n, or an approximation that is cheaper: any step converges."""
        return self.log_determinant() / self.n

    @abstractmethod
    def resolvent(self, step: Step) -> Resolvent:
        """Factor I + diag(α)(I − W), once per α for this operator and its transpose.

        Raises:
            NotMonotoneError: if that matrix is singular, which no monotone W allows.
        """

    @abstractmethod
    def relax(self, step: Step) -> Map:
        """Return (1 − α)I + αW."""

    @abstractmethod
    def constants(self) -> Constants:
        """Return (m, L) of I − W in the Λ norm, each rounded to the safe side."""

    @property
    def dtype(self) -> torch.dtype:
        """The type of the numbers."""
        return self.metric.dtype

    @property
    def device(self) -> torch.device:
        """Where the numbers are."""
        return self.metric.device

    def affine(
        self, z: Float[Tensor, "*batch n"], v: Float[Tensor, "*batch n"]
    ) -> Float[Tensor, "*batch n"]:
        """Return Wz + v."""
        return self.mv(z) + v

    def is_monotone(self) -> bool:
        """Say whether m > 0; evaluated once for W and Wᵀ."""
        return self.memo("is monotone", lambda: self.constants().m > 0)

    def memo(self, key: Hashable, build: Callable[[], T_]) -> T_:
        """Return what `build` returned on the first call with `key`, here or on the transpose.

        Everything is built again after W or Λ have changed, however they were changed. Within a
        function transform, a trace or a capture nothing is kept.
        """
        trusts = id(self._memo) in _trusted.memos
        if not trusts:
            if must_not_cache():
                return build()
            self._settle()
        memo = self._memo
        if key not in memo:
            trusting = nullcontext() if trusts else _Trusting(self._memos())
            with trusting, leave_modes(self.device.type):
                value = build()
            # Of several threads that build at once, all return what the first has stored.
            return memo.setdefault(key, value)
        return memo[key]

    def _dual_metric(self) -> Tensor:
        """Return Λ⁻¹, the metric in which Wᵀ is monotone where W is in Λ; of Wᵀ itself, Λ again."""

        def build() -> Tensor:
            other = self._memo.get(("values of Λ", not self.transposed))
            return 1 / self._own_metric().detach() if other is None else other.copies[0]

        return self.memo(("metric of the transpose", self.transposed), build)

    @property
    def root_metric(self) -> Float[Tensor, " n"]:
        """Λ^½."""
        return self.memo(("root metric", self.transposed), lambda: self.metric.detach().sqrt())

    def norm(self, z: Float[Tensor, "*batch n"]) -> Float[Tensor, " *batch"]:
        """Return ‖z‖_Λ per sample."""
        weighted = z * self.root_metric
        # Scaled by the largest entry, so that squares neither overflow nor vanish.
        largest = weighted.abs().amax(-1, keepdim=True)
        largest.clamp_min_(torch.finfo(z.dtype).tiny)
        return torch.linalg.vector_norm(weighted / largest, dim=-1) * largest.squeeze(-1)

    def norm_above(self, z: Float[Tensor, "*batch n"]) -> Float[Tensor, " *batch"]:
        """Return at least ‖z‖_Λ per sample, rounding and underflow included; infinite for NaN."""
        finfo, root = torch.finfo(z.dtype), self.root_metric
        lost = 8 * finfo.tiny * (math.sqrt(self.n) + torch.linalg.vector_norm(root))
        norm = self.norm(z) * (1 + (self.n + 16) * finfo.eps) + lost
        return torch.where(norm.isnan(), torch.inf, norm)


def is_finite(t: Tensor) -> bool:
    """Say whether all numbers are finite."""
    # A sum that is finite has no other summands, and takes one pass.
    return math.isfinite(float(t.detach().sum())) or bool(torch.isfinite(t.detach()).all())


def check_tensors(**tensors: object) -> None:
    """Check that these are tensors of real floating-point numbers.

    Raises:
        TypeError: if one is no tensor, or its numbers are complex, integers or truth values.
    """
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            hint = (
                "torch.from_numpy(...)" if isinstance(tensor, np.ndarray) else "torch.tensor(...)"
            )
            raise TypeError(
                f"{name} must be a torch.Tensor, got {type(tensor).__module__}."
                f"{type(tensor).__qualname__}: convert it by {hint}"
            )
        if not tensor.is_floating_point():
            raise TypeError(
                f"{name} must hold real floating-point numbers, float32 or float64, got "
                f"{tensor.dtype}"
            )


class _Trusted(threading.local):
    """The memos, by identity, whose values were compared when what runs on this thread began."""

    def __init__(self) -> None:
        self.memos: dict[int, dict[Hashable, Any]] = {}


_trusted = _Trusted()


class _Trusting(AbstractContextManager[None]):
    def __init__(self, memos: dict[int, dict[Hashable, Any]]) -> None:
        self.memos = memos

    def __enter__(self) -> None:
        self.before = _trusted.memos
        _trusted.memos = self.before | self.memos

    def __exit__(self, *_: object) -> None:
        _trusted.memos = self.before


def check_metric(metric: Tensor, n: int, like: Tensor) -> None:
    """Check that Λ holds one number per unit, of the type and on the device of `like`.

    Raises:
        TypeError: if it is no tensor of real numbers.
        ValueError: if it does not fit.
    """
    check_tensors(metric=metric)
    if metric.shape != (n,):
        raise ValueError(
            f"metric must hold one number per unit, shape ({n},), got {tuple(metric.shape)}"
        )
    if metric.dtype != like.dtype or metric.device != like.device:
        raise ValueError(
            f"metric is {metric.dtype} on {metric.device}, W is {like.dtype} on {like.device}"
        )


def step_key(step: Step) -> Hashable:
    """Return what names α in a memo: its value."""
    if isinstance(step, float | int):
        return step
    return step.shape, step.dtype, step.device, step.detach().cpu().numpy().tobytes()


def own_step(step: Step) -> Step:
    """Return an α that nobody else can change, for a resolvent that a memo keeps."""
    return step.detach().clone() if isinstance(step, Tensor) else step


def column(step: Step) -> Step:
    """Return α to scale the rows of a matrix: one number, or a column of one per unit."""
    return step[:, None] if isinstance(step, Tensor) and step.ndim else step


def singular(step: Step) -> NotMonotoneError:
    """Return the error for a matrix I + α(I − W) without an inverse."""
    return NotMonotoneError(
        "I + α(I − W) is singular or not finite, so W is not monotone (or not finite) "
        f"at step size {step}: check the weights with their certificate"
    )

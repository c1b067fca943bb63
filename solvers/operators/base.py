"""What must a linear operator W offer so that z = σ(Wz + v) can be split?

Products with W and Wᵀ. Everything else is derived from those, unless a class knows a faster way:
the resolvent of the monotone part I − W, the constants (m, L) of I − W in the norm
‖z‖_Λ = √(zᵀΛz) that the operator carries, and bounds of rounding.
"""

from __future__ import annotations

import dataclasses
import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from solvers.activations import Step
from solvers.operators import matrix, roundoff
from solvers.operators.maps import Map, Resolvent, own_step, step_key
from solvers.operators.matrix import Constants
from solvers.operators.memo import Memoized
from solvers.precision import cast

_LARGEST = 8192
"""Units up to which W is written out as a matrix: 512 MiB in float64."""
_BLOCK = 256
"""Unit vectors in one product while it is."""


class LinearOperator(Memoized):
    """A linear map W on ℝⁿ with the inner product ⟨y, z⟩_Λ = yᵀΛz.

    An operator of your own is a frozen dataclass of its tensors, with `eq=False`, a field or
    property `metric`, and two methods:

    - `mv(z)` returns Wz for any leading batch dimensions,
    - `rmv(z)` returns Wᵀz,

    both by sums and products of z with the tensors of its fields. The floating-point tensors among
    the fields, `metric` aside, are what gradients are taken for. Everything else follows from the
    two, by one of three ways: W is written out as a matrix, once per change of the weights
    (resolvent, constants, determinant, entries); autograd differentiates `mv` (`pullback`); or `mv`
    runs once more on absolute values (`magnitude`, `summands`, `losses`, `unread`: bounds of
    rounding). Override `resolvent` first where a matrix of n × n is too much.

    Laws, each tested by `solvers.testing.OperatorLaws`: ⟨Wz, y⟩ = ⟨z, Wᵀy⟩; resolvent(α) inverts
    I + diag(α)(I − W); ⟨(I − W)z, z⟩_Λ ≥ m ‖z‖²_Λ and ‖(I − W)z‖_Λ ≤ L ‖z‖_Λ.

    Example:
        >>> import torch
        >>> from dataclasses import dataclass
        >>> from solvers import Inclusion, LinearOperator, ReLU, solve
        >>> @dataclass(frozen=True, eq=False)
        ... class Product(LinearOperator):
        ...     A: torch.Tensor
        ...     B: torch.Tensor
        ...     metric: torch.Tensor
        ...     def mv(self, z):
        ...         return (z @ self.B.T) @ self.A.T
        ...     def rmv(self, z):
        ...         return (z @ self.A) @ self.B
        >>> W = Product(-torch.eye(3), torch.eye(3), torch.ones(3))
        >>> solve(Inclusion(W, torch.ones(1, 3), ReLU())).value.tolist()  # z = max(v − z, 0)
        [[0.5, 0.5, 0.5]]
    """

    metric: Float[Tensor, " n"]
    """Λ, positive."""

    @abstractmethod
    def mv(self, z: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        """Return Wz."""

    @abstractmethod
    def rmv(self, z: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        """Return Wᵀz."""

    @property
    def n(self) -> int:
        """Number of units."""
        return self.metric.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """The type of the numbers."""
        return self.metric.dtype

    @property
    def device(self) -> torch.device:
        """Where the numbers are."""
        return self.metric.device

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that define W: what a gradient with respect to W is taken for."""
        return tuple(
            t
            for value in self._fields(metric=False).values()
            for part in _contents(value)
            for t in ((part,) if isinstance(part, Tensor) else part.tensors)
            if t.is_floating_point()
        )

    @property
    def T(self) -> LinearOperator:
        """Wᵀ, monotone in Λ⁻¹ where W is monotone in Λ, sharing every factor."""
        return TransposedOperator(self)

    def rebuild(self, tensors: tuple[Tensor, ...]) -> LinearOperator:
        """Return this operator on `tensors`, equal in value, with all cached factors."""
        left = iter(tensors)
        rebuilt = self._mapped(
            lambda t: next(left) if t.is_floating_point() else t,
            lambda part: part.rebuild(tuple(islice(left, len(part.tensors)))),
            metric=False,
        )
        object.__setattr__(rebuilt, "_memo", self._shared())
        return rebuilt

    def to(self, dtype: torch.dtype) -> LinearOperator:
        """Return the same operator in another precision, detached; built once."""
        if dtype == self.dtype:
            return self

        def convert(t: Tensor) -> Tensor:
            return cast(t.detach(), dtype) if t.is_floating_point() else t

        return self.memo(
            ("to", dtype, self.transposed), lambda: self._mapped(convert, lambda p: p.to(dtype))
        )

    def _mapped(
        self,
        tensor: Callable[[Tensor], Tensor],
        part: Callable[[LinearOperator], LinearOperator],
        *,
        metric: bool = True,
    ) -> Self:
        """Return this operator with its tensors and parts changed, and an empty memo."""
        changed = {k: _map(v, tensor, part) for k, v in self._fields(metric=metric).items()}
        names = {f.name for f in dataclasses.fields(self) if f.init}  # type: ignore[arg-type]
        fresh: dict[str, Any] = {"_memo": {}} if "_memo" in names else {}
        made = dataclasses.replace(self, **changed, **fresh)  # type: ignore[type-var]
        if "transposed" in made.__dict__:
            object.__setattr__(made, "transposed", self.transposed)
        return made

    def _fields(self, *, metric: bool) -> dict[str, Any]:
        """Return what the dataclass is built from, with Λ or without."""
        if not dataclasses.is_dataclass(self):
            raise TypeError(
                f"{type(self).__name__} must be a dataclass of its tensors: put "
                "@dataclass(frozen=True, eq=False) above it, or define tensors, rebuild and to"
            )
        skipped = {"_memo", "transposed"} | (set() if metric else {"metric"})
        return {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.init and f.name not in skipped
        }

    def _given(self) -> tuple[Tensor, ...]:
        return tuple(
            t
            for value in self._fields(metric=False).values()
            for part in _contents(value)
            for t in ((part,) if isinstance(part, Tensor) else part._given())
        )

    def _own_metric(self) -> Tensor:
        return self.metric

    def _parts(self) -> tuple[LinearOperator, ...]:
        if not dataclasses.is_dataclass(self):
            return ()
        found = (_contents(value) for value in self._fields(metric=False).values())
        return tuple(p for parts in found for p in parts if isinstance(p, LinearOperator))

    def affine(
        self, z: Float[Tensor, "*batch n"], v: Float[Tensor, "*batch n"]
    ) -> Float[Tensor, "*batch n"]:
        """Return Wz + v."""
        return self.mv(z) + v

    def pullback(
        self, u: Float[Tensor, "*batch n"], z: Float[Tensor, "*batch n"]
    ) -> tuple[Tensor, ...]:
        """Return the gradient of Σ ⟨u, Wz⟩ with respect to `tensors`; differentiable."""
        if not self.tensors:
            return ()
        _, pull, *_ = torch.func.vjp(lambda *t: self.rebuild(t).mv(z), *self.tensors)
        return pull(u)

    def to_dense(self) -> Float[Tensor, "n n"]:
        """Return W as a matrix without a graph, written out once by products in float64.

        Raises:
            ValueError: if W has so many units that the matrix would take gigabytes.
        """
        W = self.memo("matrix", self._write_out)
        return W.T if self.transposed else W

    def _write_out(self) -> Float[Tensor, "n n"]:
        """Return W as first given."""
        if self.n > _LARGEST:
            raise ValueError(
                f"{type(self).__name__} has {self.n} units, and W is written out as a matrix for "
                f"at most {_LARGEST}: define resolvent, log_determinant, diagonal and constants of "
                "the class, with the structure of W"
            )
        first = self.T if self.transposed else self
        exact = first.to(torch.float64)
        units = torch.eye(self.n, dtype=torch.float64, device=self.device).split(_BLOCK)
        written = torch.cat([exact.mv(block).detach() for block in units]).T
        return cast(written.contiguous(), self.dtype)

    def diagonal(self) -> Float[Tensor, " n"]:
        """Return the diagonal of W."""
        return self.to_dense().diagonal()

    def preconditioner(self) -> Float[Tensor, " n"]:
        """Return the diagonal of W as far as step sizes per unit can follow it."""
        return self.diagonal()

    def submatrix(self, rows: Tensor, columns: Tensor) -> Float[Tensor, "... r c"]:
        """Return W[rows, columns] for index tensors of shapes (..., r) and (..., c)."""
        return self.to_dense()[rows[..., :, None], columns[..., None, :]]

    def log_determinant(self) -> float:
        """Return log |det(I − W)|."""
        return self.memo(
            "log det", lambda: float(torch.linalg.slogdet(matrix.complement(self.to_dense()))[1])
        )

    def mean_log_eigenvalue(self) -> float:
        """Return log |det(I − W)| / n, or an approximation that is cheaper: any step converges."""
        return self.log_determinant() / self.n

    def resolvent(self, step: Step) -> Resolvent:
        """Factor I + diag(α)(I − W), once per α for this operator and its transpose.

        Raises:
            NotMonotoneError: if that matrix is singular, which no monotone W allows.
        """
        key = ("resolvent", step_key(step))
        factor = self.memo(key, lambda: matrix.resolvent(self._first(), own_step(step)))
        return factor.T if self.transposed else factor

    def _first(self) -> Float[Tensor, "n n"]:
        """Return W as first given, whose transpose this may be, as a matrix."""
        W = self.to_dense()
        return W.T if self.transposed else W

    def relax(self, step: Step) -> Map:
        """Return (1 − α)I + αW."""
        return matrix.relaxation(self.to_dense(), step)

    def is_monotone(self) -> bool:
        """Say whether m > 0; evaluated once for W and Wᵀ."""
        return self.memo("is monotone", lambda: self.constants().m > 0)

    def constants(self) -> Constants:
        """Return (m, L) of I − W in the Λ norm, each rounded to the safe side.

        From the matrix in float64, whose rounding while it was written out is taken off m and added
        to L.
        """
        return self.memo("constants", self._constants)

    def _constants(self) -> Constants:
        exact = self.to(torch.float64)
        # A column of the matrix is a product with a unit vector.
        lost = torch.finfo(torch.float64).tiny * float(exact.norm_above(exact.losses()))
        lost *= float(exact.n / exact.root_metric.min())
        error = exact.rounding_gain(torch.float64) + lost
        return matrix.constants(exact.to_dense(), cast(self.metric.detach(), torch.float64), error)

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

    def magnitude(self, z: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        """Return |W| z for non-negative z, or more; rounding errors of Wz are below
        γ_summands · magnitude(|z|)."""
        return self._bounded(z).bound

    @property
    def summands(self) -> int:
        """The longest chain of roundings in one entry of Wz."""
        zero = torch.zeros_like(self.metric.detach())
        return self.memo(("summands", self.transposed), lambda: self._bounded(zero).depth)

    def losses(self) -> Float[Tensor, " n"]:
        """Return what Wz may lose to underflow, per unit, in units of the smallest normal number.

        2 for each operation, times what is multiplied by it later, and |W|1.
        """
        return self._bounded(torch.zeros_like(self.metric.detach())).lost

    def unread(self, size: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        """Return what Wz may miss where entries of W are read as zero, in the same units.

        At most linear in size = |z|, `losses` aside.
        """
        return self._bounded(size).lost

    def _bounded(self, size: Tensor) -> roundoff.Magnitude:
        """Return bounds of |Wz| and of its rounding for |z| ≤ size."""
        return _evaluate(self._readable().mv, size)

    def _readable(self) -> Self:
        """Return this operator with the magnitudes of its tensors."""
        return self._mapped(roundoff.leaf, lambda part: part._readable())

    def _losses_of_sums(self) -> Float[Tensor, " n"]:
        """Return `losses` where every entry of Wz is one sum of products: 2 per operation, |W|1."""
        ones = torch.ones_like(self.metric.detach())
        return 2.0 * (self.summands + 4) + self.magnitude(ones)

    def _unread_of_sums(self, size: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        """Return `unread` where every entry of Wz is one sum of products: Σ|z|."""
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


@dataclass(frozen=True, eq=False)
class TransposedOperator(LinearOperator):
    """Wᵀ of an operator whose class has no transpose of its own; both share one memo.

    Args:
        of: W.
    """

    of: LinearOperator

    @property
    def transposed(self) -> bool:  # type: ignore[override]
        """Whether this is the transpose of the operator whose factors the memo holds."""
        return not self.of.transposed

    @property
    def _memo(self) -> dict[Any, Any]:  # type: ignore[override]
        return self.of._memo

    @property
    def metric(self) -> Float[Tensor, " n"]:  # type: ignore[override]
        """Λ⁻¹."""
        return self.of._dual_metric()

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.of.tensors

    @property
    def T(self) -> LinearOperator:
        return self.of

    def rebuild(self, tensors: tuple[Tensor, ...]) -> LinearOperator:
        return TransposedOperator(self.of.rebuild(tensors))

    def to(self, dtype: torch.dtype) -> LinearOperator:
        if dtype == self.dtype:
            return self
        return self.memo(("to", dtype, self.transposed), lambda: self.of.to(dtype).T)

    def mv(self, z: Tensor) -> Tensor:
        return self.of.rmv(z)

    def rmv(self, z: Tensor) -> Tensor:
        return self.of.mv(z)

    def pullback(self, u: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        return self.of.pullback(z, u)  # ⟨u, Wᵀz⟩ = ⟨z, Wu⟩

    def _bounded(self, size: Tensor) -> roundoff.Magnitude:
        return _evaluate(self.of._readable().rmv, size)

    # What a memo holds belongs to the values of W.
    def _given(self) -> tuple[Tensor, ...]:
        return self.of._given()

    def _parts(self) -> tuple[LinearOperator, ...]:
        return self.of._parts()

    def _values(self) -> Any:
        return self.of._values()

    def _settle_apart(self) -> None:
        self.of._settle_apart()

    def adopt(self, other: Memoized) -> None:
        """Let W take over the memo of another transpose's W, as far as the values agree."""
        assert isinstance(other, TransposedOperator)
        self.of.adopt(other.of)


def _evaluate(product: Callable[[Tensor], Tensor], size: Tensor) -> roundoff.Magnitude:
    """Return the magnitude of a product for |z| ≤ size."""
    rows = size.reshape(-1, size.shape[-1])
    with torch.no_grad():
        found = roundoff.read(product(roundoff.leaf(rows)))
    return roundoff.Magnitude(
        found.bound.reshape(size.shape), found.lost.reshape(size.shape), found.depth
    )


def _contents(value: Any) -> Iterator[Tensor | LinearOperator]:
    """Yield the tensors and operators in a field."""
    if isinstance(value, Tensor | LinearOperator):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _contents(part)
    elif isinstance(value, Mapping):
        yield from _contents(tuple(value.values()))


def _map(value: Any, tensor: Callable[..., Any], operator: Callable[..., Any]) -> Any:
    """Return a field with its tensors and operators changed, in the order of `_contents`."""
    if isinstance(value, Tensor):
        return tensor(value)
    if isinstance(value, LinearOperator):
        return operator(value)
    if isinstance(value, tuple | list):
        return tuple(_map(part, tensor, operator) for part in value)
    if isinstance(value, Mapping):
        return {key: _map(part, tensor, operator) for key, part in value.items()}
    return value


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

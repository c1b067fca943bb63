"""How is W handled when it is a full matrix?"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from solvers.activations import Step
from solvers.operators import matrix
from solvers.operators.base import LinearOperator, check_metric, check_tensors
from solvers.operators.maps import own_step, step_key
from solvers.operators.matrix import Constants, DenseResolvent
from solvers.precision import cast


@dataclass(frozen=True, eq=False)
class DenseOperator(LinearOperator):
    """W stored as an n × n matrix.

    Args:
        W: n × n.
        metric: Λ as a vector of n positive numbers; ones when omitted.

    Raises:
        TypeError: if W or the metric is no tensor of real numbers.
        ValueError: if W is not square, or the metric has another length, dtype or device.

    Example:
        >>> import torch
        >>> from solvers import DenseOperator
        >>> W = DenseOperator(torch.tensor([[0.0, 1.0], [-1.0, 0.0]]))
        >>> W.mv(torch.tensor([1.0, 2.0])).tolist(), W.T.mv(torch.tensor([1.0, 2.0])).tolist()
        ([2.0, -1.0], [-2.0, 1.0])
        >>> W.is_monotone()  # I − W has the symmetric part I
        True
    """

    W: Float[Tensor, "n n"]
    metric: Float[Tensor, " n"] = None  # type: ignore[assignment]
    transposed: bool = field(default=False, repr=False)
    _memo: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        W = self.W
        check_tensors(W=W)
        if W.ndim != 2 or W.shape[0] != W.shape[1] or W.shape[0] == 0:
            raise ValueError(f"W must be a square matrix, got shape {tuple(W.shape)}")
        if self.metric is None:
            object.__setattr__(self, "metric", torch.ones_like(W.detach()[0]))
        check_metric(self.metric, W.shape[0], W)

    @property
    def n(self) -> int:
        return self.W.shape[0]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.W,)

    def _parts(self) -> tuple[LinearOperator, ...]:
        return ()  # its fields are tensors alone

    def _given(self) -> tuple[Tensor, ...]:
        return (self.W.T if self.transposed else self.W,)

    @property
    def T(self) -> DenseOperator:
        # Note [Shared factors]
        # W and Wᵀ share one memo. Resolvents are factored from W as first given and transposed
        # on demand, so one factorization serves forward and backward; step sizes, determinant
        # and constants do not change under transposition. The memo holds no tensor with a graph.
        return DenseOperator(self.W.T, self._dual_metric(), not self.transposed, self._shared())

    def rebuild(self, tensors: tuple[Tensor, ...]) -> DenseOperator:
        (W,) = tensors
        return DenseOperator(W, self.metric, self.transposed, self._shared())

    def to(self, dtype: torch.dtype) -> DenseOperator:
        if dtype == self.W.dtype:
            return self
        return self.memo(
            ("to", dtype, self.transposed),
            lambda: DenseOperator(cast(self.W.detach(), dtype), cast(self.metric.detach(), dtype)),
        )

    def mv(self, z: Tensor) -> Tensor:
        return z @ self.W.T

    def rmv(self, z: Tensor) -> Tensor:
        return z @ self.W

    def affine(self, z: Tensor, v: Tensor) -> Tensor:
        if z.ndim == 2:
            return torch.addmm(v, z, self.W.T)
        return self.mv(z) + v

    def pullback(self, u: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        return (u.reshape(-1, self.n).T @ z.reshape(-1, self.n),)

    def magnitude(self, z: Tensor) -> Tensor:
        return z @ self.W.detach().abs().T

    @property
    def summands(self) -> int:
        return self.n

    def losses(self) -> Tensor:
        return self._losses_of_sums()

    def unread(self, size: Tensor) -> Tensor:
        return self._unread_of_sums(size)

    def to_dense(self) -> Tensor:
        return self.W.detach()

    def resolvent(self, step: Step) -> DenseResolvent:
        key = ("resolvent", step_key(step))
        factor = self.memo(key, lambda: matrix.resolvent(self._first(), own_step(step)))
        return factor.T if self.transposed else factor

    def unchecked_resolvent(self, step: Step) -> tuple[DenseResolvent, Tensor]:
        """Factor anew without waiting for the device; the second is not 0 if it failed.

        The factor is that of the operator whose transpose this may be.
        """
        inverse, info = torch.linalg.inv_ex(self.shifted(step))
        return DenseResolvent(inverse, step), info

    def shifted(self, step: Step) -> Tensor:
        """Return I + α(I − W), what a resolvent inverts, of the operator as it was given."""
        return matrix.shifted(self._first(), step)

    def is_monotone(self) -> bool:
        """Say whether m > 0: by one Cholesky factorization, and where that fails by m itself."""
        return self.memo("is monotone", lambda: self._cholesky() or self.constants().m > 0)

    def _cholesky(self) -> bool:
        A = matrix.complement(self.W.detach()) * self.metric.detach()[:, None]
        _, info = torch.linalg.cholesky_ex(A + A.T)
        return int(info) == 0

    def _constants(self) -> Constants:
        return matrix.constants(self.W.detach(), self.metric.detach())

"""Which diagonal T satisfies T ⪰ UUᵀ, for every U and with every rounding of its evaluation?

U is a matrix n × p, or the kernel n × p × k × k of a convolution. For a kernel, UUᵀ is the
convolution whose kernel is U correlated with itself, n × n × (2k−1) × (2k−1), and T has one entry
per channel. The same code serves both: a convolution on a torus, or one cut out of it by zero
padding, is a matrix whose row sums are sums over columns and taps. Symbols: docs/glossary.md.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from lben import precision
from lben.weights.sizes import flag, integer
from solvers.dependencies import transforms_are_active
from solvers.precision import use_full_precision

# Entries of T below it are raised to it: T⁻¹ stays finite, and rounding below the smallest normal
# number (2⁻¹²⁶ in float32) stays below its rounding.
FLOOR = 2.0**-60


class MultiplierRule(nn.Module, ABC):
    """Base of the rules that map U to a diagonal T(U) ⪰ UUᵀ. A subclass implements `bound`.

    Note [Precision of T]
    The error bounds are those of products in float32 or float64. Modes of torch that round products
    further (TF32 convolutions are its default on CUDA) are switched off while T is computed. T of a
    kernel is computed in float64 where float32 convolutions may use algorithms, such as Winograd's,
    that are not plain sums of products.

    Note [Underflow]
    Let t be the smallest normal number. Smaller results may underflow, and some processors read
    smaller operands as zero. So everything is computed in units that are powers of two, by which
    multiplication is exact. Where one unit serves all of U, what is lost is far below the bound of
    the rounding, which is relative to the norm of U. Where T has an entry of its own size for each
    row of U, each row has its own unit, and a bound of the loss is added (`Gershgorin`).

    Example:
        >>> import torch
        >>> from lben.parameterizations import MultiplierRule
        >>> class Trace(MultiplierRule):
        ...     def bound(self, U):
        ...         return 1.01 * U.square().sum().expand(len(U))
        >>> [round(t, 2) for t in Trace()(torch.eye(2)).tolist()]
        [2.02, 2.02]
    """

    def forward(self, U: Float[Tensor, "n p *taps"]) -> Float[Tensor, " n"]:
        """Return T ⪰ UUᵀ, at least FLOOR, differentiable in U and in the rule's own parameters.

        Args:
            U: float32 or float64; taps are absent or k × k.

        Returns:
            The diagonal of T, in the dtype of U.
        """
        with use_full_precision(U):
            other_sums = U.ndim > 2 and not precision.sums_plainly(U)
            T = self.multiplier(U.double() if other_sums else U).clamp_min(FLOOR)
            return T if T.dtype == U.dtype else T.to(U.dtype) * (1 + 2 * torch.finfo(U.dtype).eps)

    def multiplier(self, U: Float[Tensor, "n p *taps"]) -> Float[Tensor, " n"]:
        """Return T of weights of any scale, in their dtype; NaN or infinite out of its range."""
        unit = power_of_two(U.detach().abs().amax())
        return self.bound(U / unit) * unit * unit

    @abstractmethod
    def bound(self, U: Float[Tensor, "n p *taps"]) -> Float[Tensor, " n"]:
        """Return T of weights that are zero, or whose largest entry has a size in [½, 1)."""


class Gershgorin(MultiplierRule):
    """Tᵢ = (Σⱼ |Gᵢⱼ| qⱼ/qᵢ)^(1/2ˢ) with G = (UUᵀ)^(2ˢ) and q > 0.

    With s = 0 and trained q this is the T of SLL, with q = 1 that of AOL: diag(Σⱼ|G|ᵢⱼqⱼ/qᵢ) − G is
    diagonally dominant in coordinates scaled by q, hence positive semi-definite. For s > 0 the same
    holds for the power, and the root preserves the order: A ⪰ B ⪰ 0 implies A^r ⪰ B^r for
    0 ≤ r ≤ 1 (Löwner–Heinz). As s grows, T approaches ‖U‖₂² I from above.

    Args:
        units: n.
        squarings: s.
        learn_q: whether q is trained; otherwise q = 1.
        device, dtype: as in torch.nn.

    Raises:
        ValueError: if units is not positive or squarings negative.

    Reference:
        Araujo, Havens, Delattre, Allauzen and Hu (2023), "A unified algebraic perspective on
        Lipschitz neural networks", Theorem 3; Prach and Lampert (2022) for q = 1.

    Example:
        UUᵀ = [1 1; 1 2] has the row sums 2 and 3.

        >>> import torch
        >>> from lben.parameterizations import Gershgorin
        >>> rule = Gershgorin(2, learn_q=False)
        >>> [round(t, 3) for t in rule(torch.tensor([[1.0, 0.0], [1.0, 1.0]])).tolist()]
        [2.0, 3.0]
    """

    def __init__(
        self,
        units: int,
        *,
        squarings: int = 0,
        learn_q: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.units = integer("units", units, least=None)
        self.squarings = integer("squarings", squarings, least=None)
        if self.units < 1 or self.squarings < 0:
            raise ValueError(
                f"units must be at least 1 and squarings at least 0, got {units} and {squarings}"
            )
        flag("learn_q", learn_q)
        q = torch.zeros(self.units, device=device, dtype=dtype)
        self.log_q = nn.Parameter(q) if learn_q else None

    def multiplier(self, U: Tensor) -> Tensor:
        """Return T; without squarings, every row of U is measured in a unit of its own.

        Let U = RV with R = diag(r) of powers of two and |V| < 1, and r = max rⱼ. Then
        Tᵢ = (rᵢr/qᵢ) Σⱼ |VVᵀ|ᵢⱼ (rⱼ/r)qⱼ. With t the smallest normal number, underflow costs an
        entry of V at most 2t(1 + 1/rᵢ), and a product or sum at most 3t. So Σ loses at most
        32 t (1 + 1/rᵢ) for each of its products.
        """
        if self.squarings:
            return super().multiplier(U)
        r = power_of_two(U.detach().abs().flatten(1).amax(1))
        top, q = r.amax(), self._q(U)
        V, w = U / r.reshape(-1, *[1] * (U.ndim - 1)), r / top * q
        sums = absolute_row_sums(V, w) * (1 + gamma(_width(V) + 4, V)) + _missed(V, w.detach())
        tiny, products = torch.finfo(U.dtype).tiny, float(_width(V)) * V[0].numel()
        lost = 64 * tiny * products * r.reciprocal().clamp_min(1)
        return (sums + lost) / q * (r * top) * (1 + gamma(8, U))

    def _q(self, U: Tensor) -> Tensor:
        if self.log_q is None:
            return U.new_ones(self.units)
        # T does not change with a factor of q; ratios end at e²⁰.
        relative = self.log_q.to(U.dtype) - self.log_q.detach().to(U.dtype).amax()
        return relative.clamp_min(-20.0).exp()

    def bound(self, U: Tensor) -> Tensor:
        q = self._q(U)
        power, scale, error = _power(U, self.squarings)
        sums = absolute_row_sums_of(power, q) / q * (1 + gamma(_width(power) + 8, U))
        return root(sums + error, self.squarings) * scale

    def extra_repr(self) -> str:
        """Describe the rule in `repr`."""
        return f"{self.units}, squarings={self.squarings}, learn_q={self.log_q is not None}"


class Orthonormal(MultiplierRule):
    """T = (1 + ‖UUᵀ − I‖₂) I, for a matrix that is orthogonal up to rounding. T has no gradient.

    UUᵀ − I (or UᵀU − I, whichever is smaller) is evaluated in float64, and its norm bounded by its
    row sums. T ⪰ UUᵀ holds for every matrix; T is near I for one that a parametrization keeps
    orthogonal.

    Raises:
        ValueError: if U is a kernel.

    Example:
        >>> import torch
        >>> from lben.parameterizations import Orthonormal
        >>> rotation = torch.tensor([[0.6, 0.8], [-0.8, 0.6]])
        >>> [round(t, 3) for t in Orthonormal()(rotation).tolist()]
        [1.0, 1.0]
    """

    def bound(self, U: Tensor) -> Tensor:
        if U.ndim != 2:
            raise ValueError(
                f"Orthonormal takes a matrix, got a weight of shape {tuple(U.shape)}: for kernels "
                "use Gershgorin or Spectral"
            )
        A = U.detach().double()
        A = A.T if A.shape[1] < A.shape[0] else A
        defect = gram(A)
        defect.diagonal().sub_(1)
        missed = _missed(A, A.new_ones(len(A))) + gamma(4, A)
        bound = (1 + 1e-12) * (defect.abs().sum(1) + missed).amax()
        return (1 + bound).to(U.dtype).mul(1 + torch.finfo(U.dtype).eps).expand(len(U))


_CHUNK = 256


def gram(U: Tensor) -> Tensor:
    """Return UUᵀ: a matrix, or the kernel of the convolution that it is.

    A matrix product is summed over chunks of 256 columns, so that the bound of its rounding grows
    with 256 + p/256 and not with p.
    """
    if U.ndim > 2:
        return functional.conv2d(U, U, padding=U.shape[-1] - 1)
    return _product(U, U)


def _product(A: Tensor, B: Tensor) -> Tensor:
    """Return ABᵀ, summed over chunks."""
    parts = zip(A.split(_CHUNK, dim=1), B.split(_CHUNK, dim=1), strict=True)
    first, *rest = parts
    total = first[0] @ first[1].T
    for a, b in rest:
        total = total + a @ b.T
    return total


def power_of_two(size: Tensor) -> Tensor:
    """Return the next power of two above numbers ≥ 0, at least twice the smallest normal number."""
    size = size.clamp_min(torch.finfo(size.dtype).tiny)
    return size / torch.frexp(size).mantissa


def gamma(k: int, like: Tensor) -> float:
    """Return γ_k = ku/(1 − ku) of the dtype: it bounds the relative error of k roundings."""
    unit = k * torch.finfo(like.dtype).eps / 2
    if unit >= 0.5:
        raise ValueError(
            f"the rounding of sums of {k} terms cannot be bounded in {like.dtype}: use float64"
        )
    return unit / (1 - unit) * (1 + 2.0**-20)


def absolute_row_sums(U: Tensor, q: Tensor) -> Tensor:
    """Return Σⱼ |UUᵀ|ᵢⱼ qⱼ for every i; for a matrix, UUᵀ is formed from one triangle."""
    if U.ndim == 2 and not transforms_are_active():
        return _AbsoluteRowSums.apply(U, q)  # type: ignore[no-untyped-call]
    return absolute_row_sums_of(gram(U), q)


def absolute_row_sums_of(G: Tensor, q: Tensor) -> Tensor:
    """Return Σⱼ |G|ᵢⱼ qⱼ for every i, where |G|ᵢⱼ of a kernel is summed over taps."""
    return G.abs().flatten(2).sum(2) @ q if G.ndim > 2 else G.abs() @ q


def depth(U: Tensor) -> int:
    """Return how many roundings an entry of `gram(U)` goes through."""
    terms = U[0].numel()
    return terms if U.ndim > 2 else min(terms, _CHUNK) + -(-terms // _CHUNK)


def _width(U: Tensor) -> int:
    """Return at least the number of entries of UUᵀ, taps included, that a row sum adds."""
    return len(U) * 4 * U[0, 0].numel()


def _missed(U: Tensor, q: Tensor) -> Tensor:
    """Bound Σⱼ |fl(UUᵀ) − UUᵀ|ᵢⱼ qⱼ: γ |U||U|ᵀq, two products with a vector."""
    size = U.detach().abs().flatten(2).sum(2) if U.ndim > 2 else U.detach().abs()
    return (size @ (size.T @ q)) * (1.01 * gamma(depth(U) + 4, U))


def _power(U: Tensor, squarings: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return P, c and e with (UUᵀ)^(2ˢ) = c^(2ˢ)(P + E) and ‖E‖₂ ≤ e.

    P is scaled by powers of two, which is exact. Squaring P + E misses (P + E)² − P² and the
    rounding of P²: at most 2e‖P‖ + e² + γ‖ |P||P| ‖, where norms are bounded by row sums.
    """
    P = gram(U)
    error = _missed(U, U.new_ones(len(U))).amax()
    scale = U.new_ones(())
    for step in range(squarings):
        size = _size(P)
        unit = power_of_two(size)
        P, error, size = P / unit, error / unit, size / unit
        scale = scale * root(unit, step)
        rounding = 1.01 * gamma(depth(P) + 4, P) * size**2
        error = (2 * error * size + error**2 + rounding) * (1 + 2.0**-20)
        P = gram(P)
    return P, scale, error


def _size(P: Tensor) -> Tensor:
    """Bound ‖P‖₂ by the largest row or column sum of |P|."""
    size = P.detach().abs()
    size = size.flatten(2).sum(2) if size.ndim > 2 else size
    return torch.maximum(size.sum(0).amax(), size.sum(1).amax()) * (1 + gamma(_width(P) + 4, P))


def root(x: Tensor, squarings: int) -> Tensor:
    """Return x^(1/2ˢ), rounded upwards."""
    for _ in range(squarings):
        x = x.sqrt() * (1 + torch.finfo(x.dtype).eps)
    return x


class _AbsoluteRowSums(torch.autograd.Function):
    """Σⱼ |UUᵀ|ᵢⱼ qⱼ of a matrix in 9/16 of the work of UUᵀ, and its gradient in one product.

    Note [Half of a symmetric product]
    Rows are taken in eight blocks; each is multiplied with itself and the blocks after it, and the
    part above the diagonal is copied below it. With w the incoming gradient and s the signs of
    G = UUᵀ, the gradient in q is |G|w and that in U is (s ∘ (wqᵀ + qwᵀ))U: as G is symmetric, one
    product where differentiating UUᵀ takes two. On a CPU the products are oneDNN's.
    """

    @staticmethod
    def forward(ctx: Any, U: Tensor, q: Tensor) -> Tensor:
        n = U.shape[0]
        G = U.new_empty(n, n)
        step = max(128, -(-n // 8))
        for start in range(0, n, step):
            end = min(start + step, n)
            chunks = zip(
                U[start:end].split(_CHUNK, dim=1), U[start:].split(_CHUNK, dim=1), strict=True
            )
            rows = _multiply(*next(chunks))
            for a, b in chunks:
                rows += _multiply(a, b)
            G[start:end, start:] = rows
            G[end:, start:end] = rows[:, end - start :].T
        ctx.save_for_backward(U, q, G)
        return G.abs() @ q

    @staticmethod
    def backward(ctx: Any, w: Tensor) -> tuple[Tensor | None, Tensor | None]:
        U, q, G = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: as a plain function, to any order
            sums = absolute_row_sums_of(gram(U), q)
            wanted = [t for t in (U, q) if t.requires_grad]
            found = iter(torch.autograd.grad(sums, wanted, w, create_graph=True))
            return tuple(next(found) if t.requires_grad else None for t in (U, q))  # type: ignore
        weight = torch.addr(torch.outer(w, q), q, w).mul_(G.sign())
        return _multiply(weight, U.T), G.abs() @ w


def _multiply(A: Tensor, B: Tensor) -> Tensor:
    """Return ABᵀ: for large float32 matrices on a CPU by oneDNN.

    The BLAS that torch takes for them is slower on some processors (`benchmarks.sll` shows the
    difference in the dense training step); the bound of the rounding is the same.
    """
    large = A.shape[0] * A.shape[1] * B.shape[0] >= 2**24
    if large and A.dtype == torch.float32 and A.is_cpu and torch.backends.mkldnn.is_available():
        return functional.linear(A.to_mkldnn(), B.to_mkldnn()).to_dense()
    return A @ B.T

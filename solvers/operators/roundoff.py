"""How large may the rounding of a product be that is known only as a function in PyTorch?

The function runs once more on `Magnitude` tensors, which carry absolute values in the place of
numbers, the length of the longest chain of roundings, and what underflow may lose.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

# Note [Running error analysis]
# A function of sums and products is a sum of terms, each a product of numbers that are read. In
# floating point every term carries one factor 1 + δ, |δ| ≤ u, for each operation on its way, so the
# result errs by at most γ_k times the same function of absolute values, with minus read as plus and
# k the longest chain (Higham 2002, section 3.1; Wilkinson's running error analysis). A factor that
# was computed brings its own chain: chains of factors add, those of summands compete.
#
# Underflow: a number that is read loses at most t, the smallest normal number, where a device reads
# denormal numbers as zero, and an operation at most 2t. In units of t, a loses l_a and b loses l_b:
# then ab loses at most |a|l_b + |b|l_a + t l_a l_b + 2. Units of float32, the larger ones, are
# taken for t in the third term.
#
# Constants in the code, such as 0.1 or `torch.tensor(...)`, are rounded to the type of the product.
_TINY = torch.finfo(torch.float32).tiny
_OF_CONSTANTS = 4
"""Roundings that a tensor has seen which is made within the function."""


class Magnitude(Tensor):
    """A bound of the absolute values of a tensor, and of its rounding.

    Attributes:
        bound: at least the absolute values.
        lost: what underflow may have taken, in units of the smallest normal number.
        depth: the longest chain of roundings.
    """

    bound: Tensor
    lost: Tensor
    depth: int

    @staticmethod
    def __new__(cls, bound: Tensor, lost: Tensor, depth: int) -> Magnitude:
        """Return a tensor that a function takes for `bound`."""
        made: Magnitude = Tensor._make_wrapper_subclass(
            cls,
            bound.shape,
            dtype=bound.dtype,
            device=bound.device,
            strides=bound.stride(),
        )
        made.bound, made.lost, made.depth = bound, lost, depth
        return made

    def __init__(self, bound: Tensor, lost: Tensor, depth: int) -> None: ...

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name, kwargs = function.overloadpacket.__name__, kwargs or {}
        if name in _MOVES:
            return _move(function, args, kwargs)
        rule = _RULES.get(name)
        if rule is None or any(isinstance(v, Magnitude) for v in kwargs.values()):
            raise NotImplementedError(
                f"the rounding of this product cannot be derived, because it calls {function}: "
                "sums, differences, products, matrix products and what moves numbers are "
                "understood. Define magnitude(z), summands, losses() and unread(size) of the "
                "operator, or write the product in terms of those"
            )
        return rule(*args, **kwargs)


def leaf(t: Tensor) -> Tensor:
    """Return the magnitude of a tensor that a function reads; what holds no real numbers as is."""
    t = t.detach()
    return Magnitude(t.abs(), torch.ones_like(t), 0) if t.is_floating_point() else t


def read(x: Any) -> Magnitude:
    """Return an argument as a magnitude; a constant of the code is one that is rounded."""
    if isinstance(x, Magnitude):
        return x
    if isinstance(x, Tensor):
        return Magnitude(x.detach().abs(), torch.ones_like(x), _OF_CONSTANTS)
    number = torch.tensor(abs(float(x)), dtype=torch.float64)
    exact = float(np.float32(x)) == float(x)
    return Magnitude(number, number.new_tensor(0.0 if exact else 1.0), 0 if exact else 1)


_MOVES = frozenset({
    "view", "_unsafe_view", "reshape", "expand", "permute", "transpose", "t", "unsqueeze",
    "squeeze", "slice", "select", "index", "index_select", "gather", "flip", "roll", "cat", "stack",
    "clone",
    "detach", "alias", "split", "split_with_sizes", "unbind", "constant_pad_nd", "diagonal",
    "as_strided", "tril", "triu", "diag_embed", "repeat", "unfold", "lift_fresh", "take",
})  # fmt: skip
"""Operations that move numbers, and put zeros beside them."""


def _move(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Apply an operation that moves numbers to sizes and to losses alike."""
    given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Magnitude)]
    depth = max(t.depth for t in given)

    def apply(read: Callable[[Magnitude], Tensor], other: Callable[[Tensor], Tensor]) -> Any:
        def part(x: Any) -> Any:
            if isinstance(x, Magnitude):
                return read(x)
            return other(x) if isinstance(x, Tensor) and x.is_floating_point() else x

        return function(*tree_map(part, args), **tree_map(part, kwargs))

    sizes, lost = apply(lambda t: t.bound, torch.abs), apply(lambda t: t.lost, torch.ones_like)
    constants = any(
        isinstance(t, Tensor) and not isinstance(t, Magnitude) and t.is_floating_point()
        for t in tree_leaves((args, kwargs))
    )
    depth = max(depth, _OF_CONSTANTS) if constants else depth
    if isinstance(sizes, Tensor):
        return Magnitude(sizes, lost, depth)
    return [Magnitude(s, x, depth) for s, x in zip(sizes, lost, strict=True)]


def _add(a: Any, b: Any, *, alpha: float = 1) -> Magnitude:
    a, b = read(a), read(b)
    if alpha not in (1, -1):
        b = _multiply(b, alpha)
    return Magnitude(a.bound + b.bound, a.lost + b.lost + 2, max(a.depth, b.depth) + 1)


def _multiply(a: Any, b: Any) -> Magnitude:
    return _bilinear(torch.mul, a, b, 1)


def _divide(a: Any, b: Any) -> Magnitude:
    a, b = read(a), read(b)
    if b.depth > 1:
        raise NotImplementedError(
            "the rounding of this product cannot be derived, because it divides by a number that "
            "it computed: divide by a tensor of the operator, or multiply by its inverse"
        )
    # Infinite where the divisor may be read as zero.
    safe = torch.where(b.bound < _TINY, 0.0, b.bound)
    return Magnitude(a.bound / safe, a.lost / safe + 2, a.depth + b.depth + 1)


def _bilinear(product: Any, a: Any, b: Any, terms: int) -> Magnitude:
    """Return the magnitude of a bilinear function whose entries are sums of so many terms."""
    a, b = read(a), read(b)
    lost = product(a.bound, b.lost) + product(a.lost, b.bound) + _TINY * product(a.lost, b.lost)
    return Magnitude(product(a.bound, b.bound), lost + 2 * terms, a.depth + b.depth + terms)


def _matrix_product(product: Any) -> Callable[[Any, Any], Magnitude]:
    return lambda a, b: _bilinear(product, a, b, a.shape[-1])


def _sum_of_product(product: Any) -> Callable[..., Magnitude]:
    def apply(c: Any, a: Any, b: Any, *, beta: float = 1, alpha: float = 1) -> Magnitude:
        found = _bilinear(product, a, b, a.shape[-1])
        found = found if alpha in (1, -1) else _multiply(found, alpha)
        return _add(c if beta in (1, -1) else _multiply(c, beta), found)

    return apply


def _sum(a: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Magnitude:
    a = read(a)
    size, lost = (t.sum(dim, keepdim) if dim is not None else t.sum() for t in (a.bound, a.lost))
    terms = a.bound.numel() // max(size.numel(), 1)
    return Magnitude(size, lost + 2 * terms, a.depth + terms)


def _index_add(a: Any, dim: int, index: Tensor, b: Any, *, alpha: float = 1) -> Magnitude:
    a, b = read(a), read(b)
    b = b if alpha in (1, -1) else _multiply(b, alpha)
    terms = len(index)
    size, lost = (
        a.bound.index_add(dim, index, b.bound),
        a.lost.index_add(dim, index, b.lost),
    )
    return Magnitude(size, lost + 2 * terms, max(a.depth, b.depth) + terms)


def _zeros(a: Any, *args: Any, **kwargs: Any) -> Tensor:
    return torch.zeros_like(a.bound)


def _new_zeros(a: Any, shape: Any, **kwargs: Any) -> Tensor:
    return a.bound.new_zeros(shape)


_RULES: dict[str, Callable[..., Any]] = {
    "add": _add,
    "sub": _add,
    "rsub": lambda a, b, *, alpha=1: _add(b, a, alpha=alpha),
    "neg": read,
    "mul": _multiply,
    "div": _divide,
    "mm": _matrix_product(torch.mm),
    "bmm": _matrix_product(torch.bmm),
    "mv": _matrix_product(torch.mv),
    "dot": _matrix_product(torch.dot),
    "addmm": _sum_of_product(torch.mm),
    "addmv": _sum_of_product(torch.mv),
    "baddbmm": _sum_of_product(torch.bmm),
    "sum": _sum,
    "index_add": _index_add,
    "zeros_like": _zeros,
    "new_zeros": _new_zeros,
}
"""What the magnitude of a result is, by operation."""

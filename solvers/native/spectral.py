"""How is a spectrum multiplied by a matrix per frequency, and how are those matrices inverted?

By C++ kernels on a CPU if no gradient is needed and there is a compiler; else by PyTorch, with the
same result to rounding.
"""

from __future__ import annotations

import ctypes

import torch
from jaxtyping import Complex
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from solvers.native.library import build

_KINDS = {torch.complex64: "float", torch.complex128: "double"}
_LEAF = 16
"""Largest size of matrices that PyTorch inverts one by one."""


def product(
    symbols: Complex[Tensor, "f c c"], spectrum: Complex[Tensor, "batch c f"]
) -> Complex[Tensor, "batch c f"]:
    """Return the product of a spectrum with a matrix per frequency: Y[:, ω] = symbols[ω] X[:, ω].

    Args:
        symbols: one c × c matrix per frequency.
        spectrum: X, c channels at f frequencies per sample.

    Returns:
        Y, of the shape of the spectrum.

    Raises:
        ValueError: if the shapes or types do not fit.
        MemoryError: if there is no memory for a few frequencies of all channels.

    Example:
        >>> symbols = 2 * torch.eye(1, dtype=torch.complex64).expand(3, 1, 1)
        >>> product(symbols, torch.ones(1, 1, 3, dtype=torch.complex64)).real
        tensor([[[2., 2., 2.]]])
    """
    c, f = spectrum.shape[-2:]
    if spectrum.ndim != 3 or symbols.shape != (f, c, c) or symbols.dtype != spectrum.dtype:
        raise ValueError(
            f"symbols of shape {tuple(symbols.shape)}, {symbols.dtype}, do not fit a spectrum of "
            f"shape {tuple(spectrum.shape)}, {spectrum.dtype}"
        )
    if not _can_compile(symbols, spectrum):
        return (symbols @ spectrum.permute(2, 1, 0).contiguous()).permute(2, 1, 0)
    A, X = _materialize(symbols), _materialize(spectrum)
    Y = torch.empty_like(X)
    _call("spectral", (A, X), X.shape, Y)
    return Y


def inverses(matrices: Complex[Tensor, "f c c"]) -> Complex[Tensor, "f c c"]:
    """Return the inverses of many small matrices, by elimination without pivoting.

    Resolvents need no pivots: if W is monotone, the leading blocks of I + P(I − Ŵ) and their Schur
    complements have positive definite symmetric parts in the metric ΛP⁻¹. For other matrices the
    result may be wrong or not finite.
    Reference: Golub and Van Loan (1979), Unsymmetric positive definite linear systems.

    Args:
        matrices: one c × c matrix per frequency.

    Returns:
        Their inverses, of the same shape.

    Raises:
        ValueError: if the matrices are not square.
        MemoryError: if there is no memory for a matrix.

    Example:
        >>> inverses(4 * torch.eye(2, dtype=torch.complex64)[None]).real
        tensor([[[0.2500, 0.0000],
                 [0.0000, 0.2500]]])
    """
    if matrices.ndim != 3 or matrices.shape[1] != matrices.shape[2]:
        raise ValueError(f"matrices must be (f, c, c), got {tuple(matrices.shape)}")
    if not _can_compile(matrices):
        return _inverses(matrices)
    A = _materialize(matrices)
    inverse = torch.empty_like(A)
    _call("inverses", (A,), (A.shape[-1], len(A)), inverse)
    return inverse


def _inverses(A: Complex[Tensor, "f c c"]) -> Complex[Tensor, "f c c"]:
    """Invert by 2 × 2 blocks: batched products are faster than LAPACK for each matrix alone."""
    c = A.shape[-1]
    if c <= _LEAF:
        return torch.linalg.inv_ex(A)[0]
    h = c // 2
    a, b, d, e = (t.contiguous() for t in (A[:, :h, :h], A[:, :h, h:], A[:, h:, :h], A[:, h:, h:]))
    first = _inverses(a)
    right, below = first @ b, d @ first
    last = _inverses(torch.baddbmm(e, d, right, alpha=-1))
    inverse = torch.empty_like(A)
    corner = right @ last
    torch.baddbmm(first, corner, below, out=inverse[:, :h, :h])
    torch.neg(corner, out=inverse[:, :h, h:])
    torch.bmm(last, below, out=inverse[:, h:, :h]).neg_()
    inverse[:, h:, h:] = last
    return inverse


def _call(name: str, inputs: tuple[Tensor, ...], sizes: tuple[int, ...], out: Tensor) -> None:
    kernels = build().kernels
    assert kernels is not None
    function = getattr(kernels, f"lben_{name}_{_KINDS[out.dtype]}")
    counts = map(ctypes.c_int64, (*sizes, torch.get_num_threads()))
    addresses = [ctypes.c_void_p(t.data_ptr()) for t in (*inputs, out)]
    if function(*addresses[:-1], *counts, addresses[-1]) != 0:
        raise MemoryError(f"no memory for matrices of shape {tuple(inputs[0].shape)}")


def _can_compile(*tensors: Tensor) -> bool:
    """Say whether C++ kernels serve these tensors: numbers in host memory without a gradient."""
    for tensor in tensors:
        if tensor.device.type != "cpu" or (torch.is_grad_enabled() and tensor.requires_grad):
            return False
        if tensor.dtype not in _KINDS or unpack_dual(tensor).tangent is not None:
            return False
        try:
            tensor.data_ptr()
        except RuntimeError:  # a function transform hides them
            return False
    return build().kernels is not None


def _materialize(tensor: Tensor) -> Tensor:
    """Return the same numbers contiguous in memory, with no conjugation pending."""
    return tensor.resolve_conj().contiguous()

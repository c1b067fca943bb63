"""How is a spectrum multiplied by a matrix per frequency?"""

from __future__ import annotations

import ctypes

import torch
from jaxtyping import Complex
from torch import Tensor

from solvers.compiled.library import build

_KINDS = {torch.complex64: "float", torch.complex128: "double"}


def product(
    symbols: Complex[Tensor, "f c c"], spectrum: Complex[Tensor, "batch c f"]
) -> Complex[Tensor, "batch c f"]:
    """Return the spectrum whose frequency ω is symbols[ω] times that of the given one.

    Compiled on a CPU, where no gradient is asked for and there is a compiler; else by PyTorch, the
    same to rounding.

    Raises:
        MemoryError: if there is no memory for a few frequencies of all channels.
    """
    library = build().library
    if library is None or not _is_plain(symbols) or not _is_plain(spectrum):
        return (symbols @ spectrum.permute(2, 1, 0).contiguous()).permute(2, 1, 0)
    batch, c, f = spectrum.shape
    A, X = (t.resolve_conj().contiguous() for t in (symbols, spectrum))
    Y = torch.empty_like(X)
    sizes = map(ctypes.c_int64, (batch, c, f, torch.get_num_threads()))
    A_, X_, Y_ = (ctypes.c_void_p(t.data_ptr()) for t in (A, X, Y))
    if getattr(library, f"lben_spectral_{_KINDS[X.dtype]}")(A_, X_, *sizes, Y_) != 0:
        raise MemoryError(f"the product of spectra found no memory for {c} channels")
    return Y


def _is_plain(tensor: Tensor) -> bool:
    """Say whether these are numbers in the memory of the processor, and nothing else."""
    if tensor.device.type != "cpu" or (torch.is_grad_enabled() and tensor.requires_grad):
        return False
    try:
        tensor.data_ptr()
    except RuntimeError:  # a function transform hides them
        return False
    return True

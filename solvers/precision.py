"""Do products of float32 numbers run in float32?

torch may run them in TF32 or bfloat16: convolutions on CUDA do so by default. A weight that is
rounded inside a product is another weight than the one that was certified, and a residual that is
evaluated with it is that of another problem.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

FULL = ("none", "ieee")


def _settings() -> tuple[Any, ...]:
    """What decides it, from general to particular; a particular one that is set wins."""
    b: Any = torch.backends
    return b, b.mkldnn, b.mkldnn.matmul, b.mkldnn.conv, b.cuda.matmul, b.cudnn, b.cudnn.conv


_lock = threading.Lock()
_inside = 0
_changed: list[tuple[Any, str]] = []


@contextmanager
def full() -> Iterator[None]:
    """Within the block float32 products, matrices and convolutions, run in float32.

    The settings are those of the process: they come back when the last thread leaves.
    """
    global _inside, _changed
    with _lock:
        if _inside == 0:
            _changed = [(s, s.fp32_precision) for s in _settings()]
            _changed = [(s, before) for s, before in _changed if before not in FULL]
            for setting, _ in _changed:
                setting.fp32_precision = "ieee"
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                for setting, before in _changed:
                    setting.fp32_precision = before


# What torch.backends asks, without its search for attributes: a training step asks thirty times.
_precision_of: Any = torch._C._get_fp32_precision_getter
_BACKENDS = {"cpu": "mkldnn", "cuda": "cuda"}


def lower_precision(device: str, *, convolutions: bool) -> bool:
    """Say whether products of float32 numbers on this kind of device may run in less.

    Also while a thread is within `full`, for what it has set ends with it.
    """
    backend = _BACKENDS.get(device)
    if backend is None:
        return False
    with _lock:
        return (
            _inside > 0
            or _precision_of(backend, "matmul") not in FULL
            or (convolutions and _precision_of(backend, "conv") not in FULL)
        )


def cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor in another precision, differentiably.

    From float32 to float64 it is exact, also where the process reads denormal numbers as zero
    (`torch.set_flush_denormal`): those of float32 are an integer times 2⁻¹⁴⁹.
    """
    if dtype != torch.float64 or t.dtype != torch.float32:
        return t.to(dtype)
    wide, bits = t.double(), t.detach().contiguous().view(torch.int32)
    vanished = (wide.detach() == 0) & ((bits & 0x7FFFFFFF) != 0)
    size = (bits & 0x007FFFFF).double() * 2.0**-149
    return torch.where(vanished, wide + torch.where(bits < 0, -size, size), wide)


def in_autocast(device: str) -> bool:
    """Say whether autocast is on for a type of device; it is not on one that has none (meta)."""
    return _has_autocast(device) and torch.is_autocast_enabled(device)


_has_autocast = lru_cache(torch.amp.is_autocast_available)


def leave_autocast(device: str) -> AbstractContextManager[None]:
    """Leave autocast, which would round products to a precision in which no tolerance is met."""
    if in_autocast(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def full_precision(like: Tensor, *, convolutions: bool = True) -> AbstractContextManager[None]:
    """Leave autocast and shortened products of such numbers: no tolerance is met in them.

    Args:
        like: a tensor of the products.
        convolutions: whether they may be convolutions, which have settings of their own.
    """
    device = like.device.type
    shortened = like.dtype == torch.float32 and lower_precision(device, convolutions=convolutions)
    return _full(device) if shortened else leave_autocast(device)


@contextmanager
def _full(device: str) -> Iterator[None]:
    with leave_autocast(device), full():
        yield

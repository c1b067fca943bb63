"""Do products of float32 numbers run in float32?

torch may run them in TF32 or bfloat16: convolutions on CUDA do so by default. A weight that is
rounded inside a product is another weight than the one that was certified, and a residual that is
evaluated with it is that of another problem.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_FULL = ("none", "ieee")


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
            _changed = [(s, before) for s, before in _changed if before not in _FULL]
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


def lowered(device: str, *, convolutions: bool) -> bool:
    """Say whether products of float32 numbers on this kind of device may run in less."""
    b: Any = torch.backends
    products = {"cpu": (b.mkldnn.matmul,), "cuda": (b.cuda.matmul,)}.get(device, ())
    if convolutions:
        products += {"cpu": (b.mkldnn.conv,), "cuda": (b.cudnn.conv,)}.get(device, ())
    return any(setting.fp32_precision not in _FULL for setting in products)

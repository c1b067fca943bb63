"""In which precision do products of float32 numbers run?

In float32, within `use_full_precision`. torch may run them in TF32 or bfloat16, and does so by
default for convolutions on CUDA. A weight that is rounded inside a product is not the weight that
was certified, and a residual evaluated with it belongs to another problem.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

FULL_SETTINGS = ("none", "ieee")
"""Values of torch's `fp32_precision` under which float32 products run in float32."""


def _settings() -> tuple[Any, ...]:
    """Return torch's settings of precision; a later one, if it is set, overrules those before."""
    b: Any = torch.backends
    return b, b.mkldnn, b.mkldnn.matmul, b.mkldnn.conv, b.cuda.matmul, b.cudnn, b.cudnn.conv


_lock = threading.Lock()
_inside = 0
_changed_settings: list[tuple[Any, str]] = []


@contextmanager
def use_float32_products() -> Iterator[None]:
    """Let float32 products of matrices and convolutions run in float32 within the block.

    torch has one setting per process, so it holds for all threads until the last one leaves; then
    the settings of before come back.

    Example:
        >>> with use_float32_products():
        ...     torch.backends.cudnn.conv.fp32_precision in FULL_SETTINGS
        True
    """
    global _inside, _changed_settings
    with _lock:
        if _inside == 0:
            _changed_settings = [(s, s.fp32_precision) for s in _settings()]
            _changed_settings = [
                (s, before) for s, before in _changed_settings if before not in FULL_SETTINGS
            ]
            for setting, _ in _changed_settings:
                setting.fp32_precision = "ieee"
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                for setting, before in _changed_settings:
                    setting.fp32_precision = before


# The function behind torch.backends' attributes: a training step asks thirty times, and looking an
# attribute up there takes longer than the answer.
_get_precision: Any = torch._C._get_fp32_precision_getter
_BACKENDS = {"cpu": "mkldnn", "cuda": "cuda"}


def may_lower_precision(device: str, *, convolutions: bool) -> bool:
    """Say whether float32 products on this type of device may run in lower precision.

    True also while another thread is within `use_float32_products`, because the settings of before
    come back when that thread leaves.

    Args:
        device: type of the device, such as "cpu".
        convolutions: whether convolutions count, besides products of matrices.
    """
    backend = _BACKENDS.get(device)
    if backend is None:
        return False
    with _lock:
        return (
            _inside > 0
            or _get_precision(backend, "matmul") not in FULL_SETTINGS
            or (convolutions and _get_precision(backend, "conv") not in FULL_SETTINGS)
        )


def cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert a tensor to another precision, differentiably.

    From float32 to float64 the conversion is exact, even if the process reads denormal numbers as
    zero (`torch.set_flush_denormal`): a denormal number of float32 is an integer times 2⁻¹⁴⁹.

    Example:
        >>> cast(torch.tensor([0.5]), torch.float64)
        tensor([0.5000], dtype=torch.float64)
    """
    if dtype != torch.float64 or t.dtype != torch.float32:
        return t.to(dtype)
    wide, bits = t.double(), t.detach().contiguous().view(torch.int32)
    vanished = (wide.detach() == 0) & ((bits & 0x7FFFFFFF) != 0)
    size = (bits & 0x007FFFFF).double() * 2.0**-149
    return torch.where(vanished, wide + torch.where(bits < 0, -size, size), wide)


def in_autocast(device: str) -> bool:
    """Say whether autocast is enabled for a type of device; False where there is none (meta)."""
    return device in _WITH_AUTOCAST and torch.is_autocast_enabled(device)


# Asked once: a compiler cannot look into the question.
_WITH_AUTOCAST = frozenset(
    kind
    for kind in ("cpu", "cuda", "hpu", "maia", "mps", "mtia", "privateuseone", "xla", "xpu")
    if torch.amp.is_autocast_available(kind)
)


def leave_autocast(device: str) -> AbstractContextManager[None]:
    """Leave autocast within the block: it would round products too coarsely for any tolerance."""
    if in_autocast(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def use_full_precision(like: Tensor, *, convolutions: bool = True) -> AbstractContextManager[None]:
    """Let products run in the precision of their factors within the block.

    It leaves autocast and, for float32, TF32 and bfloat16: no tolerance can be met in them.

    Args:
        like: a factor of the products; its dtype and device decide what has to change.
        convolutions: whether the products may be convolutions, which have their own settings.

    Example:
        >>> x = torch.ones(2, 2)
        >>> with torch.autocast("cpu", torch.bfloat16), use_full_precision(x):
        ...     (x @ x).dtype
        torch.float32
    """
    device = like.device.type
    shortened = like.dtype == torch.float32 and may_lower_precision(
        device, convolutions=convolutions
    )
    return _use_full_precision(device) if shortened else leave_autocast(device)


@contextmanager
def _use_full_precision(device: str) -> Iterator[None]:
    with leave_autocast(device), use_float32_products():
        yield

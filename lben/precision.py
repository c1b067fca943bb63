"""Which products of layers run in float32, and what is refused where they do not?

The rule for a single call is `solvers.precision`; here is what compiled graphs, convolutions and
autocast ask for besides.
"""

from __future__ import annotations

from typing import Any

import torch

from solvers.precision import FULL_SETTINGS, use_float32_products

__all__ = ["refuse_autocast", "refuse_reduced", "sums_plainly", "use_float32_products"]


def refuse_reduced(device: str, *, convolution: bool) -> None:
    """Raise ValueError where products of float32 numbers would not run in float32.

    For graphs, whose products are outside of `use_float32_products`.

    Args:
        device: type of the device.
        convolution: whether convolutions count; a compiler may make products of them.
    """
    b: Any = torch.backends
    matmul, conv = (
        (("cuda.matmul", b.cuda.matmul), ("cudnn.conv", b.cudnn.conv))
        if device == "cuda"
        else (("mkldnn.matmul", b.mkldnn.matmul), ("mkldnn.conv", b.mkldnn.conv))
    )
    for name, setting in (matmul, conv) if convolution else (matmul,):
        if setting.fp32_precision not in FULL_SETTINGS:
            raise ValueError(
                f"a compiled or traced graph would run float32 products in {setting.fp32_precision}"
                f", and its weights would not be those that are proved: set torch.backends.{name}"
                '.fp32_precision = "ieee", or call the layer itself'
            )


def sums_plainly(U: torch.Tensor) -> bool:
    """Say whether convolutions with this kernel are sums of products on this device.

    cuDNN and NNPACK have float32 algorithms (Winograd's, FFT) that round otherwise; oneDNN, which
    torch takes for float32 on a CPU unless it is switched off, is asked for direct ones.
    """
    if U.dtype == torch.float64 and not U.is_cuda:
        return True
    if not U.is_cpu:
        return not (U.is_cuda and torch.backends.cudnn.enabled)
    backends: Any = torch.backends
    onednn = backends.mkldnn.is_available() and backends.mkldnn.enabled
    return onednn or not backends.nnpack.is_available()


def refuse_autocast() -> None:
    """Raise ValueError while autocast is enabled, on any device.

    What is proved is about the network in float32 or float64.
    """
    for device in ("cpu", "cuda"):
        if torch.is_autocast_enabled(device):
            raise ValueError(
                "autocast is enabled, and what is proved is about the network in float32 or "
                "float64: leave torch.autocast before you ask for weights, certificates or error "
                "bounds"
            )

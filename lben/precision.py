"""Do the products of a layer run in float32, and is a layer refused if they do not?

`solvers.precision` sets the precision of a single call. This file has the further checks for
compiled graphs, convolutions and autocast.
"""

from __future__ import annotations

from typing import Any

import torch

from solvers.precision import FULL_SETTINGS, use_float32_products

__all__ = ["refuse_autocast", "refuse_reduced", "sums_plainly", "use_float32_products"]


def refuse_reduced(device: str, *, convolution: bool) -> None:
    """Raise ValueError if products of float32 numbers would not run in float32.

    It is for graphs: their products run outside of `use_float32_products`.

    Args:
        device: type of the device, "cpu" or "cuda".
        convolution: whether convolutions are checked too, and not only matrix products.

    Raises:
        ValueError: naming the setting of torch.backends to change.

    Example:
        >>> import torch
        >>> from lben.precision import refuse_reduced
        >>> before = torch.backends.mkldnn.matmul.fp32_precision
        >>> torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        >>> try:
        ...     refuse_reduced("cpu", convolution=False)
        ... except ValueError as error:
        ...     print(str(error)[:65])
        ... finally:
        ...     torch.backends.mkldnn.matmul.fp32_precision = before
        a compiled or traced graph would run float32 products in bf16, an
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
    """Return whether convolutions with this kernel are plain sums of products on its device.

    cuDNN and NNPACK have other float32 algorithms (Winograd's, FFT), whose rounding is different.
    oneDNN runs direct convolutions; torch uses it for float32 on a CPU unless it is switched off.

    Args:
        U: the kernel, on the device that runs.

    Returns:
        True if the rounding model of `lben.layers.roundoff` covers its convolutions.

    Example:
        >>> import torch
        >>> from lben.precision import sums_plainly
        >>> sums_plainly(torch.zeros(1, 1, 3, 3, dtype=torch.float64))
        True
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

    Proofs are about the network in float32 or float64.

    Raises:
        ValueError: saying to leave torch.autocast.

    Example:
        >>> import torch
        >>> from lben.precision import refuse_autocast
        >>> with torch.autocast("cpu"):
        ...     try:
        ...         refuse_autocast()
        ...     except ValueError as error:
        ...         print(str(error)[:19])
        autocast is enabled
    """
    for device in ("cpu", "cuda"):
        if torch.is_autocast_enabled(device):
            raise ValueError(
                "autocast is enabled, and what is proved is about the network in float32 or "
                "float64: leave torch.autocast before you ask for weights, certificates or error "
                "bounds"
            )

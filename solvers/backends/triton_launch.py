"""What happens where a kernel cannot be compiled for a device, or not be launched on it?

PyTorch does the work instead: the first failure is told once, with its reason, and remembered, so
that nobody waits for the compiler again.
"""

from __future__ import annotations

import functools
import importlib.util
import subprocess
import warnings
from collections.abc import Hashable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


class KernelWarning(RuntimeWarning):
    """A kernel does not run on this device; PyTorch takes its place, more slowly."""


@functools.cache
def has_triton() -> bool:
    """Say whether Triton is installed; it is looked for once."""
    return importlib.util.find_spec("triton") is not None


# Note [Failures of a first launch]
# A kernel is compiled at its first launch with some options and dtype. What goes wrong then is the
# compiler's or the device's: a construct that Triton refuses, too much shared memory, no C compiler
# for the launcher, a cache that cannot be written. Later launches run what ran before, and their
# RuntimeErrors are raised; not so Triton's own errors, for another divisibility of an argument is
# compiled anew. Wrong arguments (TypeError, ValueError) are never caught, nor is a lack of memory,
# nor what Triton's interpreter finds.
@dataclass(frozen=True, eq=False)
class _Record:
    """How the launches of one kernel went, by options, dtype and device."""

    kernel: Any
    works: set[Hashable] = field(default_factory=set)
    reasons: dict[Hashable, str] = field(default_factory=dict)


_records: dict[int, _Record] = {}


def launch_or_fall_back(
    kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any
) -> str | None:
    """Launch a kernel of Triton, multiplications and additions fused, on its tensors' device.

    Where this returns a reason nothing was computed and nothing was written: the caller does in
    PyTorch what the kernel would have done.

    Args:
        kernel: a function under `triton.jit`.
        grid: programs per dimension.
        *arguments: of the kernel, by position; the first one is a tensor.
        **options: constexpr arguments by name, and options of Triton such as `num_warps`.

    Returns:
        None if it was launched, or why it cannot be: the error of the first launch with this dtype
        and these options on this device.

    Warns:
        KernelWarning: once per kernel and reason.
    """
    like: Tensor = arguments[0]
    record = _records.get(id(kernel))
    if record is None:
        record = _records[id(kernel)] = _Record(kernel)
    key = (like.device, like.dtype, *options.items())
    reason = record.reasons.get(key)
    if reason is not None:
        return reason
    try:
        with _on(like.device):
            kernel[grid](*arguments, enable_fp_fusion=True, **options)
    except Exception as error:
        if not _is_a_failure(error, first=key not in record.works):
            raise
        reason = f"{type(error).__name__}: {_line(error)}"
    else:
        record.works.add(key)
        return None
    told = reason in record.reasons.values()
    record.reasons[key] = reason
    if not told:
        warnings.warn(
            f"the kernel {_name(kernel)} does not run on {like.device} ({reason}): PyTorch takes "
            "its place from now on",
            KernelWarning,
            stacklevel=3,
        )
    return reason


def forget_failures() -> None:
    """Forget how launches went: every kernel is tried again, and failures are told again."""
    _records.clear()


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be that of the tensors."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def _is_a_failure(error: Exception, *, first: bool) -> bool:
    """Say whether the compiler or the device failed, see Note [Failures of a first launch]."""
    kind = type(error)
    if any(base.__name__ == "TritonError" for base in kind.__mro__):
        return kind.__name__ != "InterpreterError"
    if not first or isinstance(error, torch.OutOfMemoryError):
        return False
    return isinstance(error, (RuntimeError, OSError, subprocess.SubprocessError))


def _line(error: BaseException) -> str:
    """Return the line of the cause that says something: Triton shows source and a caret before."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" ^")]
    return lines[-1][:200] if lines else "no message"


def _name(kernel: Any) -> str:
    return getattr(kernel, "__name__", None) or type(kernel).__name__

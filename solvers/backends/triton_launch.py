"""What happens if a kernel cannot be compiled for a device or cannot be launched on it?

PyTorch does the work instead. The first failure is warned of once, with its reason, and remembered,
so that the compiler is not tried again.
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
    """Tell that a kernel does not run on this device; PyTorch does its work, more slowly."""


@functools.cache
def has_triton() -> bool:
    """Say whether Triton is installed; it is searched for once."""
    return importlib.util.find_spec("triton") is not None


# Note [Failures of a first launch]
# A kernel is compiled at its first launch with given options and dtype. An error then comes from
# the compiler or the device: a construct that Triton refuses, too much shared memory, no C compiler
# for the launcher, a cache that cannot be written. A RuntimeError of a later launch is raised,
# because the same code ran before. Triton's own errors count as failures at any launch, because it
# compiles anew if the divisibility of an argument changes. Three kinds of errors are always raised:
# wrong arguments (TypeError, ValueError), lack of memory, and errors of Triton's interpreter.
@dataclass(frozen=True, eq=False)
class _Record:
    """Record how the launches of one kernel went, by options, dtype and device."""

    kernel: Any
    works: set[Hashable] = field(default_factory=set)
    reasons: dict[Hashable, str] = field(default_factory=dict)


_records: dict[int, _Record] = {}


def try_launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> str | None:
    """Launch a Triton kernel on the device of its tensors, with fused multiply-adds.

    If it returns a reason, the kernel wrote nothing, and the caller does its work in PyTorch.

    Args:
        kernel: a function under `triton.jit`.
        grid: programs per dimension.
        *arguments: of the kernel, by position; the first one is a tensor.
        **options: constexpr arguments by name, and options of Triton such as `num_warps`.

    Returns:
        None if the kernel was launched; else the error of its first launch with this dtype and
        these options on this device.

    Raises:
        TypeError, ValueError: of wrong arguments.
        torch.OutOfMemoryError: if the device has no memory left.

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
        with _use_device(like.device):
            kernel[grid](*arguments, enable_fp_fusion=True, **options)
    except Exception as error:
        if not _is_a_failure(error, first=key not in record.works):
            raise
        reason = f"{type(error).__name__}: {_last_line(error)}"
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
    """Forget how launches went: every kernel is tried again, and failures are warned of again."""
    _records.clear()


def _use_device(device: torch.device) -> AbstractContextManager[Any]:
    """Make a device current within the block, because Triton launches on the current one."""
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


def _last_line(error: BaseException) -> str:
    """Return the last line of the cause that has words; Triton shows source and a caret before."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" ^")]
    return lines[-1][:200] if lines else "no message"


def _name(kernel: Any) -> str:
    return getattr(kernel, "__name__", None) or type(kernel).__name__

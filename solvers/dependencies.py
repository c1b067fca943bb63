"""What does a cached value depend on, and has it changed?

It depends on the values of the tensors and settings that it was computed from. A `Snapshot` copies
them, and they are compared bit by bit at every use. Where values cannot be compared, nothing is
cached.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import functools
import os
import types
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from solvers.precision import in_autocast, leave_autocast, may_lower_precision, use_float32_products

# Note [Values decide]
# torch's version counter misses changes: fused optimizers, writes through `.data`, writes through
# numpy or another process, and another tensor in the same place. Addresses are used again. So a
# snapshot holds copies, and every use compares all of them with the values now. That is one pass
# over memory: below a hundredth of a solve, and for the largest matrices of layers without a solve
# about a tenth of their product. The copies double the memory of the tensors.
#
# Autocast, inference mode and grad mode are left while a cached value is computed (`leave_modes`),
# so it does not depend on them.


def transforms_are_active() -> bool:
    """Say whether a function transform (torch.func) or forward-mode differentiation is active."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def must_not_cache() -> bool:
    """Say whether tensors computed now would be wrong after the current trace or transform ends.

    In a function transform or forward-mode differentiation tensors carry its level; in a trace or a
    compilation they stand for symbols. In the capture of a CUDA graph they have no values yet: the
    graph computes them at every replay, from the weights of that time.
    """
    return (
        transforms_are_active()
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        or (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())
    )


def leave_modes(device: str) -> contextlib.AbstractContextManager[None]:
    """Leave grad mode, inference mode, autocast and reduced precision within the block.

    A cached value outlives them, so it must not depend on them.

    Args:
        device: type of the device that computes, such as "cpu".
    """
    in_mode = torch.is_grad_enabled() or torch.is_inference_mode_enabled()
    if in_mode or in_autocast(device) or may_lower_precision(device, convolutions=True):
        return _leave_all_modes(device)
    return contextlib.nullcontext()


@contextlib.contextmanager
def _leave_all_modes(device: str) -> Iterator[None]:
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        leave_autocast(device),
        use_float32_products(),
    ):
        yield


@dataclass(frozen=True, eq=False)
class Snapshot:
    """Hold the values that some tensors and settings had.

    Attributes:
        copies: of the tensors, without a graph.
        settings: as `collect_dependencies` returns them.

    Example:
        >>> W = torch.zeros(2)
        >>> snapshot = Snapshot.take([W])
        >>> snapshot.fits((W,))
        True
        >>> W[0] = -0.0  # another bit, though == says that nothing changed
        >>> snapshot.fits((W,))
        False
    """

    copies: tuple[Tensor, ...]
    settings: Any = ()

    @classmethod
    def take(cls, tensors: Iterable[Tensor], settings: Any = ()) -> Snapshot:
        """Copy tensors and settings as they are now."""
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False):
                return cls.take(tensors, settings)
        return cls(tuple(t.detach().clone() for t in tensors), settings)

    def fits(self, tensors: tuple[Tensor, ...], settings: Any = ()) -> bool:
        """Say whether these tensors and settings are, bit by bit, those of the snapshot."""
        return (
            len(self.copies) == len(tensors)
            and self.settings == settings
            and are_identical(tensors, self.copies)
        )


_memcmp = (ctypes.cdll.msvcrt if os.name == "nt" else ctypes.CDLL(None)).memcmp
_memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_ORDINARY = (Tensor, nn.Parameter)


def are_identical(tensors: Iterable[Tensor], others: Iterable[Tensor]) -> bool:
    """Say whether tensors agree pair by pair in dtype, device, shape and every bit (0 is not −0).

    Shapes and tensors in host memory are compared first. For all others each device is asked once,
    for one flag, so the host waits once per device.
    """
    waiting: dict[torch.device, list[Tensor]] = {}
    for a, b in zip(tensors, others, strict=True):
        found = _compare_on_host(a, b)
        if found is False:
            return False
        if found is None:
            waiting.setdefault(a.device, []).append((_view_bits(a) != _view_bits(b)).any())
    if not waiting:
        return True
    flags = [fs[0] if len(fs) == 1 else torch.stack(fs).any() for fs in waiting.values()]
    return not any(map(bool, flags))


def _compare_on_host(a: Tensor, b: Tensor) -> bool | None:
    """Say whether two tensors are identical, or None if only their device can tell."""
    if a.dtype != b.dtype or a.shape != b.shape or a.device != b.device or a.is_meta:
        return False
    if torch._C._functorch.is_functorch_wrapped_tensor(a):
        return False  # left over from a transform that has ended
    if type(a) not in _ORDINARY or a.layout is not torch.strided:
        return torch.equal(a, b)
    if not _is_on_host(a):
        return None
    if a.is_contiguous() and b.is_contiguous() and not (a.is_neg() or a.is_conj()):
        # Five times as fast as torch.equal, which compares number by number.
        return _memcmp(a.data_ptr(), b.data_ptr(), a.nbytes) == 0
    return torch.equal(_view_bits(a), _view_bits(b))


def _is_on_host(t: Tensor) -> bool:
    return t.is_cpu


def _view_bits(t: Tensor) -> Tensor:
    """Return a tensor's bits as integers of the same width."""
    t = t.detach().resolve_conj().resolve_neg()
    t = torch.view_as_real(t) if t.is_complex() else t
    return t.view(_INTEGERS[t.element_size()])


def collect_dependencies(module: nn.Module) -> tuple[tuple[Tensor, ...], Any]:
    """Return all that a module's output depends on: its tensors and its settings.

    They are the parameters, buffers and attributes of the module and of the modules below it, with
    the types of all objects on the way. So a parametrization that is registered later counts, and
    so do the settings in the objects that it holds.

    Args:
        module: any module.

    Returns:
        All tensors, and a description of everything else that compares by ==.

    Example:
        >>> layer = nn.Linear(2, 3)
        >>> tensors, settings = collect_dependencies(layer)
        >>> [tuple(t.shape) for t in tensors]
        [(3, 2), (3,)]
        >>> settings == collect_dependencies(layer.eval())[1]
        False
    """
    collector = _Collector([], {})
    settings = collector.describe(module)
    return tuple(collector.tensors), settings


# Attributes that every module has for torch's own use, except those that take part in a call.
_BOOKKEEPING = frozenset(vars(nn.Module())) - {
    "training", "_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks"
}  # fmt: skip
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, type)
_FIXED = (
    types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType,
    types.ModuleType, types.CodeType, weakref.ReferenceType, torch.layout, torch.memory_format,
    enum.Enum, np.dtype, np.generic, range, slice,
)  # fmt: skip
"""Kinds of objects that do not change, or whose changes decide no output."""


@dataclass(frozen=True)
class _Collector:
    """Collect tensors, and describe everything else by values that compare by ==.

    An object that was seen before is described by the number at which it was first seen. An object
    that can neither be described nor be known not to change is described as different from
    everything, itself included: then nothing is cached.
    """

    tensors: list[Tensor]
    seen: dict[int, int]

    def describe(self, value: Any) -> Any:
        if isinstance(value, (*_PLAIN, _Identity)):
            return value
        if isinstance(value, Tensor):
            self.tensors.append(value)
            return Tensor
        if isinstance(value, tuple | list):
            return tuple(map(self.describe, value))
        if isinstance(value, Mapping):
            return tuple((self.describe(key), self.describe(v)) for key, v in value.items())
        if isinstance(value, np.ndarray):
            return value.shape, value.dtype.str, value.tobytes()
        if id(value) in self.seen:
            return type(value), self.seen[id(value)]
        self.seen[id(value)] = len(self.seen)
        if isinstance(value, nn.Module):
            own = ((k, self.describe(v)) for k, v in vars(value).items() if k not in _BOOKKEEPING)
            return (type(value), *own)
        if isinstance(value, _FIXED):
            return _Identity(value)
        return (type(value), *self._object(value))

    def _object(self, value: Any) -> Iterator[Any]:
        """Yield what an object holds."""
        if isinstance(value, set | frozenset):
            yield frozenset(map(self.describe, value))
        elif isinstance(value, functools.partial):
            yield from map(self.describe, (value.func, value.args, value.keywords))
        elif isinstance(value, types.MethodType):
            yield from map(self.describe, (value.__func__, value.__self__))
        elif isinstance(value, types.FunctionType):
            yield from map(self.describe, self._function(value))
        else:
            names = [n for k in type(value).__mro__ for n in _list_slots(k) if hasattr(value, n)]
            held = {name: getattr(value, name) for name in names} | getattr(value, "__dict__", {})
            if not names and not hasattr(value, "__dict__"):
                yield _EqualToNothing()
            yield from ((name, self.describe(v)) for name, v in held.items())

    def _function(self, function: types.FunctionType) -> Iterator[Any]:
        """Yield what a function computes with: code, defaults, closure, numbers among globals.

        A list in its closure counts by identity alone: hooks append their records to such lists.
        """
        yield function.__code__
        yield from (function.__defaults__, function.__kwdefaults__, vars(function))
        for cell in function.__closure__ or ():
            with contextlib.suppress(ValueError):  # an empty one
                held = cell.cell_contents
                yield _Identity(held) if isinstance(held, list) else held
        for name in function.__code__.co_names:
            value = function.__globals__.get(name)
            if isinstance(value, (*_PLAIN, Tensor, np.ndarray, tuple, dict)):
                yield value


def _list_slots(kind: type) -> tuple[str, ...]:
    names = vars(kind).get("__slots__", ())
    names = (names,) if isinstance(names, str) else tuple(names)
    hidden = (f"_{kind.__name__.lstrip('_')}{n}" if n[:2] == "__" else n for n in names)
    return tuple(name for name in hidden if name not in ("__dict__", "__weakref__"))


class _EqualToNothing:
    """Equal nothing, not even itself."""

    def __eq__(self, other: object) -> bool:
        return False

    __hash__ = object.__hash__


@dataclass(frozen=True, eq=False)
class _Identity:
    """Compare an object by its identity."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


class Sendable:
    """Make objects with tensors fit to be copied, pickled and sent to other processes.

    torch refuses to copy or send a tensor that belongs to a graph, so copies are cut from it.
    """

    def __getstate__(self) -> dict[str, Any]:
        return {name: _detach(value) for name, value in self.__dict__.items()}


def _detach(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _detach(v) for key, v in value.items()}
    return value.detach() if isinstance(value, Tensor) and not value.is_leaf else value

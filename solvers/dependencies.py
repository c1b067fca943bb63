"""What does a cached value depend on, and has it changed?

On the values of the tensors and settings that it was computed from, and on nothing else. Values are
compared, bit by bit; where they cannot be, nothing is kept.
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

from solvers.precision import full, in_autocast, leave_autocast, lower_precision

# Note [Values decide]
# A version counter misses fused optimizers, writes through `.data`, through numpy's or another
# process's view of the memory and tensors put in the place of others; an address comes again. So a
# snapshot holds copies, and every use compares all of them with the values now: one pass over
# memory, which is below a hundredth of a solve, and for the largest matrices of layers without a
# solve about a tenth of their product. The copies cost the memory of the tensors once more.
#
# Autocast, inference mode and grad mode are left while a cached value is computed
# (`outside_transforms`), so it does not depend on them.


def transforms_are_active() -> bool:
    """Say whether tensors may be those of a function transform or of forward-mode derivatives."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def must_not_cache() -> bool:
    """Say whether tensors belong to a trace, a transform or a capture, and must end with it.

    Tensors of a function transform or of forward-mode differentiation carry its level, those of a
    trace or of a compilation its symbols. In the capture of a CUDA graph they have no values yet:
    all is computed within the graph, at every replay, from what the weights are then.
    """
    return (
        transforms_are_active()
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        or (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())
    )


def outside_transforms(device: str) -> contextlib.AbstractContextManager[None]:
    """Leave grad and inference mode, autocast, shortened products: what is kept outlives them."""
    disturbed = torch.is_grad_enabled() or torch.is_inference_mode_enabled()
    if disturbed or in_autocast(device) or lower_precision(device, convolutions=True):
        return _undisturbed(device)
    return contextlib.nullcontext()


@contextlib.contextmanager
def _undisturbed(device: str) -> Iterator[None]:
    with torch.inference_mode(False), torch.no_grad(), leave_autocast(device), full():
        yield


@dataclass(frozen=True, eq=False)
class Snapshot:
    """What some tensors and settings were.

    Attributes:
        copies: of the tensors, without a graph.
        settings: as `read` returns them.
    """

    copies: tuple[Tensor, ...]
    settings: Any = ()

    @classmethod
    def of(cls, tensors: Iterable[Tensor], settings: Any = ()) -> Snapshot:
        """Return the snapshot of tensors and settings as they are now."""
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False):
                return cls.of(tensors, settings)
        return cls(tuple(t.detach().clone() for t in tensors), settings)

    def fits(self, tensors: tuple[Tensor, ...], settings: Any = ()) -> bool:
        """Say whether tensors and settings are what they were."""
        return (
            len(self.copies) == len(tensors)
            and self.settings == settings
            and all_same(tensors, self.copies)
        )


_memcmp = (ctypes.cdll.msvcrt if os.name == "nt" else ctypes.CDLL(None)).memcmp
_memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_ORDINARY = (Tensor, nn.Parameter)


def all_same(tensors: Iterable[Tensor], others: Iterable[Tensor]) -> bool:
    """Say whether every tensor agrees with the other in its place, with one wait per device.

    In type, device, shape and every bit (0 is not −0). What the host can tell is told first:
    shapes, and tensors in its memory. For the rest the device is asked once, for one flag.
    """
    waiting: dict[torch.device, list[Tensor]] = {}
    for a, b in zip(tensors, others, strict=True):
        found = _told_by_host(a, b)
        if found is False:
            return False
        if found is None:
            waiting.setdefault(a.device, []).append((_bits(a) != _bits(b)).any())
    if not waiting:
        return True
    flags = [fs[0] if len(fs) == 1 else torch.stack(fs).any() for fs in waiting.values()]
    return not any(map(bool, flags))


def _told_by_host(a: Tensor, b: Tensor) -> bool | None:
    """Say whether two tensors are the same, or None if only their device knows."""
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
    return torch.equal(_bits(a), _bits(b))


def _is_on_host(t: Tensor) -> bool:
    return t.is_cpu


def _bits(t: Tensor) -> Tensor:
    """Return integers of the same bits; the integers that a tensor has are its bits."""
    t = t.detach().resolve_conj().resolve_neg()
    t = torch.view_as_real(t) if t.is_complex() else t
    return t.view(_INTEGERS[t.element_size()])


def read(module: nn.Module) -> tuple[tuple[Tensor, ...], Any]:
    """Return all tensors of a module and, to be compared by ==, all else that decides its output.

    Parameters, buffers and attributes of the module and of the modules below it, with their types,
    so that a parametrization counts that is registered later, and its own settings too, in whatever
    objects it holds them.
    """
    reader = _Reader([], {})
    settings = reader.read(module)
    return tuple(reader.tensors), settings


# What every module has for the use of torch, except what takes part in a call.
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
class _Reader:
    """Collects tensors, and describes everything else by values that compare by ==.

    An object that was read before is described by its turn. One that can be neither read nor known
    not to change is different from everything, itself included: then nothing is kept.
    """

    tensors: list[Tensor]
    seen: dict[int, int]

    def read(self, value: Any) -> Any:
        if isinstance(value, (*_PLAIN, _Same)):
            return value
        if isinstance(value, Tensor):
            self.tensors.append(value)
            return Tensor
        if isinstance(value, tuple | list):
            return tuple(map(self.read, value))
        if isinstance(value, Mapping):
            return tuple((self.read(key), self.read(v)) for key, v in value.items())
        if isinstance(value, np.ndarray):
            return value.shape, value.dtype.str, value.tobytes()
        if id(value) in self.seen:
            return type(value), self.seen[id(value)]
        self.seen[id(value)] = len(self.seen)
        if isinstance(value, nn.Module):
            own = ((k, self.read(v)) for k, v in vars(value).items() if k not in _BOOKKEEPING)
            return (type(value), *own)
        if isinstance(value, _FIXED):
            return _Same(value)
        return (type(value), *self._object(value))

    def _object(self, value: Any) -> Iterator[Any]:
        """Yield what an object holds."""
        if isinstance(value, set | frozenset):
            yield frozenset(map(self.read, value))
        elif isinstance(value, functools.partial):
            yield from map(self.read, (value.func, value.args, value.keywords))
        elif isinstance(value, types.MethodType):
            yield from map(self.read, (value.__func__, value.__self__))
        elif isinstance(value, types.FunctionType):
            yield from map(self.read, self._function(value))
        else:
            names = [n for k in type(value).__mro__ for n in _slots(k) if hasattr(value, n)]
            held = {name: getattr(value, name) for name in names} | getattr(value, "__dict__", {})
            if not names and not hasattr(value, "__dict__"):
                yield _Unlike()
            yield from ((name, self.read(v)) for name, v in held.items())

    def _function(self, function: types.FunctionType) -> Iterator[Any]:
        """Yield what a function computes with: code, defaults, closure, numbers among globals.

        A list that it has from where it was made is what hooks write down their calls in: it is
        known by identity.
        """
        yield function.__code__
        yield from (function.__defaults__, function.__kwdefaults__, vars(function))
        for cell in function.__closure__ or ():
            with contextlib.suppress(ValueError):  # an empty one
                held = cell.cell_contents
                yield _Same(held) if isinstance(held, list) else held
        for name in function.__code__.co_names:
            value = function.__globals__.get(name)
            if isinstance(value, (*_PLAIN, Tensor, np.ndarray, tuple, dict)):
                yield value


def _slots(kind: type) -> tuple[str, ...]:
    names = vars(kind).get("__slots__", ())
    names = (names,) if isinstance(names, str) else tuple(names)
    hidden = (f"_{kind.__name__.lstrip('_')}{n}" if n[:2] == "__" else n for n in names)
    return tuple(name for name in hidden if name not in ("__dict__", "__weakref__"))


class _Unlike:
    """Something that equals nothing."""

    def __eq__(self, other: object) -> bool:
        return False

    __hash__ = object.__hash__


@dataclass(frozen=True, eq=False)
class _Same:
    """An object that is itself alone."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


class Sendable:
    """Something that can be copied, pickled and sent to other processes: copies have no graph.

    torch copies and sends no tensor that belongs to a graph.
    """

    def __getstate__(self) -> dict[str, Any]:
        return {name: _without_graph(value) for name, value in self.__dict__.items()}


def _without_graph(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_graph(v) for key, v in value.items()}
    return value.detach() if isinstance(value, Tensor) and not value.is_leaf else value

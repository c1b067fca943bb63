"""How does a Triton kernel get as far as its launch where there is no GPU?

A driver that only names its target makes `kernel[grid](...)` bind and specialise its arguments as
on the device (1, multiples of 16, wide integers). What comes next, compilation and launch, is
handed to whoever asked. No kernel has to be known by name or by its arguments.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

# A device of its own per use: specialisations are cached by device, those of a real one too.
_DEVICES = itertools.count(1000)


@dataclass(frozen=True, kw_only=True, eq=False)
class Specialisation:
    """What the JIT compiles for one kind of arguments.

    Attributes:
        function: the kernel.
        signature: type of every argument, by name.
        constexprs: constants of the compilation, by position.
        attributes: divisibility of arguments, by position.
        options: warps, stages, and what else the backend knows.
        target: for what is compiled.
        backend: Triton's backend for the target.
    """

    function: Any
    signature: dict[str, Any]
    constexprs: dict[Any, Any]
    attributes: dict[Any, Any]
    options: Any
    target: Any
    backend: Any

    @property
    def kernel(self) -> str:
        """Name of the kernel."""
        return self.function.__name__

    @property
    def constants(self) -> dict[str, Any]:
        """Constants of the compilation, by name."""
        return {self.function.arg_names[path[0]]: v for path, v in self.constexprs.items()}

    @cached_property
    def key(self) -> str:
        """A key that is the same in every process."""
        parts = (
            self.function.module, self.kernel, self.signature, self.constants, self.attributes,
            self.options, self.target,
        )  # fmt: skip
        return hashlib.sha256("\n".join(map(repr, parts)).encode()).hexdigest()[:16]

    def source(self) -> Any:
        """Return what Triton compiles."""
        return self.function.ASTSource(
            self.function, self.signature, self.constexprs, self.attributes
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Launch:
    """One launch that did not take place.

    Attributes:
        specialisation: which compilation of which kernel.
        grid: programs along the three axes.
        arguments: what was handed over, by name.
    """

    specialisation: Specialisation
    grid: tuple[int, int, int]
    arguments: dict[str, Any]


@dataclass(eq=False)
class _Compiled:
    """Stands for a compiled kernel."""

    specialisation: Specialisation
    launched: Callable[[Launch], None]
    metadata: Any
    asm: dict[str, Any] = field(default_factory=dict)
    function: int = 0
    packed_metadata: tuple[()] = ()

    def launch_metadata(self, grid: object, stream: object, *arguments: object) -> None:
        """Return nothing: no hook is told of a launch."""

    def run(self, x: int, y: int, z: int, *rest: Any) -> None:
        """Report a launch; the arguments of the kernel come last."""
        names = self.specialisation.function.arg_names
        values = rest[len(rest) - len(names) :]
        self.launched(
            Launch(
                specialisation=self.specialisation,
                grid=(x, y, z),
                arguments=dict(zip(names, values, strict=True)),
            )
        )


class _Driver:
    """A driver that names its target."""

    def __init__(self, target: GPUTarget) -> None:
        self.target, self.device = target, next(_DEVICES)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: object = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextmanager
def pretended(
    target: GPUTarget,
    compile: Callable[[Specialisation], Any],
    launched: Callable[[Launch], None] = lambda launch: None,
) -> Iterator[None]:
    """Make launches of any Triton kernel specialise for a target, compile as told, and end there.

    Kernels that were imported for Triton's interpreter are specialised like the others.

    Args:
        target: the device that is pretended.
        compile: called once per specialisation; returns the metadata of what it compiled, or None.
        launched: called in place of every launch.
    """
    specialised: dict[Any, Any] = {}

    def do_compile(
        self: Any, key: Any, signature: Any, device: Any, constexprs: Any, options: Any,
        attrs: Any, warmup: bool,
    ) -> _Compiled:  # fmt: skip
        cache, _, target, backend, _ = self.device_caches[device]
        specialisation = Specialisation(
            function=self, signature=signature, constexprs=constexprs, attributes=attrs,
            options=options, target=target, backend=backend,
        )  # fmt: skip
        metadata = compile(specialisation)
        cache[key] = _Compiled(specialisation, launched, metadata or SimpleNamespace(shared=0))
        return cache[key]

    def run(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        if self not in specialised:
            specialised[self] = JITFunction(self.fn, **self.kwargs)
        return specialised[self].run(*arguments, grid=grid, warmup=warmup, **options)

    before = driver._active, JITFunction._do_compile, InterpretedFunction.run
    driver.set_active(_Driver(target))
    JITFunction._do_compile, InterpretedFunction.run = do_compile, run
    try:
        yield
    finally:
        driver._active, JITFunction._do_compile, InterpretedFunction.run = before


VERSION: str = triton.__version__

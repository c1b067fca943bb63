"""What does the launcher hand to which kernel, and what does it do when that fails?

The fixture `launches` sends problems in the memory of the processor to the launcher of the device
and records its launches in place of running them. Nothing is compiled.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest

pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget

from benchmarks.fake_driver import Launch, Specialisation, pretended
from benchmarks.gpu_cases import on_the_device


@dataclass(eq=False)
class Launches:
    """What was asked for, in order.

    Attributes:
        compiled: specialisations that were not known yet.
        launched: launches, of known and of new specialisations.
        at_compilation: an error that every compilation raises.
        at_launch: an error that every launch raises.
    """

    compiled: list[Specialisation] = field(default_factory=list)
    launched: list[Launch] = field(default_factory=list)
    at_compilation: Exception | None = None
    at_launch: Exception | None = None

    def compile(self, specialisation: Specialisation) -> None:
        self.compiled.append(specialisation)
        if self.at_compilation is not None:
            raise self.at_compilation

    def launch(self, launch: Launch) -> None:
        self.launched.append(launch)
        if self.at_launch is not None:
            raise self.at_launch

    def keys(self) -> dict[tuple[str, tuple[tuple[str, str], ...]], set[str]]:
        """Return distinct specialisations by kernel and constants."""
        found: dict[tuple[str, tuple[tuple[str, str], ...]], set[str]] = {}
        for one in self.compiled:
            constants = tuple((name, str(value)) for name, value in one.constants.items())
            found.setdefault((one.kernel, constants), set()).add(one.key)
        return found


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launches]:
    record = Launches()
    target = GPUTarget("cuda", 90, 32)
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 warns once where it is unset
    with forgotten(), pretended(target, record.compile, record.launch), on_the_device():
        yield record


@contextmanager
def forgotten() -> Iterator[None]:
    """Keep failures of these launches from other tests, and those of others from these."""
    modules = [
        module for name, module in sys.modules.items() if name.startswith("solvers.backends")
    ]
    forget = [module.forget_failures for module in modules if hasattr(module, "forget_failures")]
    for call in forget:
        call()
    try:
        yield
    finally:
        for call in forget:
            call()

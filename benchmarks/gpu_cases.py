"""Which solves and layers show every compilation that the launcher can ask for?

A case is a function that launches; its name says of which problem. Tensors lie in the memory of
the processor and the launches do not take place (`benchmarks.fake_driver`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from unittest import mock

import torch

from solvers import (
    DenseOperator,
    DouglasRachford,
    ForwardBackward,
    Inclusion,
    LeakyReLU,
    LinearSlope,
    PeacemanRachford,
    ReLU,
    backends,
)
from solvers.backends import triton as device
from solvers.backends.step import Request
from solvers.backends.triton_steps import Steps
from solvers.backends.triton_tiles import Loop

METHODS = {
    "PeacemanRachford": PeacemanRachford(step_size=1.0),
    "DouglasRachford": DouglasRachford(step_size=1.0),
    "ForwardBackward": ForwardBackward(step_size=0.5),
}


class Refused(Exception):
    """The launcher says why it does not take a problem."""


@dataclass(frozen=True, kw_only=True)
class Solve:
    """A solve as the launcher is asked for it.

    Attributes:
        n: units.
        dtype: of the problem.
        method: a key of `METHODS`.
        activation: "ReLU", "LeakyReLU" or "LinearSlope".
        adjoint: whether W is the transpose of the operator's matrix.
        warm: whether there is a start.
        samples: rows of the batch.
        max_steps: limit of steps.
    """

    n: int
    dtype: torch.dtype = torch.float32
    method: str = "PeacemanRachford"
    activation: str = "ReLU"
    adjoint: bool = False
    warm: bool = False
    samples: int = 64
    max_steps: int = 1000

    def __str__(self) -> str:
        words = [f"n={self.n}", str(self.dtype).removeprefix("torch."), self.method]
        words += [self.activation, f"samples={self.samples}", f"max_steps={self.max_steps}"]
        words += [name for name in ("adjoint", "warm") if getattr(self, name)]
        return " ".join(words)

    def __call__(self) -> None:
        """Ask the launcher for it."""
        generator = torch.Generator().manual_seed(0)
        W = torch.randn(self.n, self.n, generator=generator, dtype=self.dtype)
        operator = DenseOperator(0.2 * W / self.n**0.5)
        v = torch.randn(self.samples, self.n, generator=generator, dtype=self.dtype)
        sigma = {
            "ReLU": ReLU(), "LeakyReLU": LeakyReLU(0.1), "LinearSlope": LinearSlope((v > 0).to(v)),
        }[self.activation]  # fmt: skip
        problem = Inclusion(operator.T if self.adjoint else operator, v, sigma)
        # One launch per step where W is large: a few show them all.
        steps = self.max_steps if self.n <= 256 else min(self.max_steps, 3)
        z0 = torch.zeros_like(v) if self.warm else None
        with on_the_device():
            reason = backends.find_obstacle(problem)
            if reason is not None:
                raise Refused(reason)
            METHODS[self.method].run(problem, Request(tol=1e-4, max_steps=steps, z0=z0))


@contextmanager
def on_the_device() -> Iterator[None]:
    """Send problems in the memory of the processor to the launcher of the device."""
    find_obstacle = device.find_obstacle

    def here(problem: Inclusion) -> str | None:
        before = vars(device)["is_interpreted"]
        vars(device)["is_interpreted"] = lambda: True
        try:
            return find_obstacle(problem)
        finally:
            vars(device)["is_interpreted"] = before

    def backend(problem: Inclusion) -> ModuleType:
        return device

    def serves(tensor: torch.Tensor) -> bool:
        return tensor.dtype in (torch.float32, torch.float64)

    # Whether a pointwise kernel serves a tensor is asked where such kernels are launched.
    modules = [
        module for name, module in sys.modules.items() if name.startswith("solvers.backends")
    ]
    asked = [(m, name) for m in modules for name in ("serves", "_serves") if hasattr(m, name)]
    assert asked, "nobody asks whether kernels serve a tensor"
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(backends, "_backend", backend))
        stack.enter_context(mock.patch.object(device, "find_obstacle", here))
        for module, name in asked:
            stack.enter_context(mock.patch.object(module, name, serves))
        yield


def _increment(activation: str) -> None:
    n, v = 600, torch.zeros(64, 600)
    sigma = LinearSlope(torch.ones_like(v)) if activation == "LinearSlope" else ReLU()
    problem = Inclusion(DenseOperator(torch.zeros(n, n)), v, sigma)
    with on_the_device():
        iteration = PeacemanRachford(step_size=1.0).iteration(problem)
        steps = Steps(Loop.prepare(problem, iteration))
        steps.increment(v.clone(), steps.new_change(v), steps.new_change(v))


def _budget(n: int, dtype: torch.dtype, linear: bool) -> None:
    v = torch.ones(64, n, dtype=dtype)
    sigma = LinearSlope(torch.ones_like(v)) if linear else ReLU()
    problem = Inclusion(DenseOperator(torch.zeros(n, n, dtype=dtype)), v, sigma)
    with on_the_device():
        iteration = PeacemanRachford(step_size=1.0).iteration(problem)
        if backends.run_fixed_steps(problem, iteration, 40) is None:
            raise Refused("no budget is solved in one launch")


def _run_reflect_sum(dtype: torch.dtype, linear: bool) -> None:
    v = torch.ones(48, 80, dtype=dtype)
    problem = Inclusion(
        DenseOperator(torch.zeros(80, 80, dtype=dtype)), v,
        LinearSlope(torch.ones_like(v)) if linear else LeakyReLU(0.1),
    )  # fmt: skip
    with on_the_device():
        apply = backends.reflect_sum(problem, 1.0, v)
        if apply is None:
            raise Refused("reflect_sum does not take it")
        apply(v)


def _activated(shape: tuple[int, ...], dtype: torch.dtype, last: bool, gradient: bool) -> None:
    u = torch.ones(shape, dtype=dtype)
    u = u.to(memory_format=torch.channels_last) if last else u
    bias, scale = (torch.ones(shape[1], dtype=dtype, requires_grad=gradient) for _ in range(2))
    with on_the_device():
        y = backends.activate(u.requires_grad_(gradient), bias, scale, ReLU())
        if gradient:
            y.sum().backward()


def _pointwise() -> dict[str, Callable[[], None]]:
    cases: dict[str, Callable[[], None]] = {}
    for dtype in (torch.float32, torch.float64):
        name = str(dtype).removeprefix("torch.")
        for linear in (False, True):
            sigma = "LinearSlope" if linear else "LeakyReLU"
            cases[f"reflect_sum {name} {sigma}"] = partial(_run_reflect_sum, dtype, linear)
        for n in (80, 128):
            for linear in (False, True):
                sigma = "LinearSlope" if linear else "ReLU"
                cases[f"budget n={n} {name} {sigma}"] = partial(_budget, n, dtype, linear)
    for sigma in ("ReLU", "LinearSlope"):
        cases[f"increment n=600 float32 {sigma}"] = partial(_increment, sigma)
    shapes: dict[str, tuple[int, ...]] = {
        "rows": (33, 80),
        "images": (3, 5, 7, 7),
        "images channels_last": (3, 16, 8, 8),
    }
    for words, shape in shapes.items():
        last = words.endswith("last")
        for gradient in (False, True):
            name = f"activated float32 {words}" + gradient * " with gradient"
            cases[name] = partial(_activated, shape, torch.float32, last, gradient)
    return cases


def cases(full: bool) -> Mapping[str, Callable[[], None]]:
    """Return the cases: about forty for the front end, fewer sizes in all depth."""
    float32, float64 = torch.float32, torch.float64
    sizes = (16, 64, 80, 81, 128, 129, 144, 256, 512, 600, 1024) if full else (
        1, 7, 16, 33, 64, 80, 128, 129, 256, 512, 600,
    )  # fmt: skip
    solves = [Solve(n=n, dtype=dtype) for n in sizes for dtype in (float32, float64)]
    for n in (80, 256, 600):
        for dtype in (float32, float64):
            solves.append(
                Solve(n=n, dtype=dtype, activation="LinearSlope", adjoint=True, samples=7)
            )
            if not full:
                solves.append(Solve(n=n, dtype=dtype, method="ForwardBackward", warm=True))
    if full:
        solves.append(Solve(n=80, method="ForwardBackward", activation="LeakyReLU", warm=True))
    else:
        for n in (80, 256):
            solves += [
                Solve(n=n, max_steps=2**31), Solve(n=n, samples=1), Solve(n=n, warm=True),
                Solve(n=n, activation="LeakyReLU", method="DouglasRachford", max_steps=1024),
            ]  # fmt: skip
    return {**{str(solve): solve for solve in solves}, **_pointwise()}

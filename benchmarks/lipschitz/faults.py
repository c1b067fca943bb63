"""Are mistakes in a converter caught? Fourteen of them, planted one at a time in `from_torch`.

`from_torch` compares the outputs of what it has made with those of the module, and refuses more
than proved rounding.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

from lben.interop import ConversionError, from_torch, operations, pytorch
from lben.weights import activation

Function = Callable[..., Any]
Plant = Callable[[Function], Function]

SHAPE = (2, 9, 9)


class Model(nn.Module):
    """All that the faults below break: strides, groups, residuals, windows and slopes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2)
        self.norm = nn.BatchNorm2d(4)
        self.inner = nn.Conv2d(4, 4, 3, padding=1)
        self.last = nn.Linear(36, 3)
        self.prelu = nn.PReLU(4)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.leaky_relu(self.norm(self.conv(x)), 0.1)
        x = x + torch.tanh(self.inner(x))
        x = self.prelu(nn.functional.avg_pool2d(x, 2, 1, 0))
        y: Tensor = self.last(nn.functional.max_pool2d(x, 2, 1, 1).flatten(1)[:, :36])
        return y


def build_model() -> Model:
    """Return the model with drawn slopes and statistics, in evaluation mode."""
    made = Model()
    with torch.no_grad():
        made.prelu.weight.uniform_(-0.5, 0.5)
        for name, low, high in (("running_mean", -1.0, 1.0), ("running_var", 0.5, 2.0)):
            made.norm.get_buffer(name).uniform_(low, high)
    return made.eval()


def _wrap(change: Function) -> Plant:
    """Return a fault: a function with its arguments changed."""
    return lambda function: lambda x, *args, **options: function(x, *change(*args), **options)


def _pad_on_one_side(function: Function) -> Function:
    def slide(size: int, kernel: int, padding: Any = (0, 0), **options: Any) -> Any:
        padding = (0, sum(padding)) if kernel == 3 else padding
        return function(size, kernel, padding=padding, **options)

    return slide


def _move_the_last_window(function: Function) -> Function:
    def slide(size: int, kernel: int, **options: Any) -> Any:
        places = function(size, kernel, **options)
        if options.get("stride") == 2:
            places[-1] = places[-2]
        return places

    return slide


def _flatten_channels_last(function: Function) -> Function:
    def read(places: Any, total: Any, batch: Any) -> Any:
        found = function(places, total, batch)
        return found.reshape(4, -1).T.ravel() if found.ndim == 1 and found.size == 100 else found

    return read


CONVOLUTION, LINEAR = (operations, "convolve"), (operations, "apply_linear")
FAULTS: dict[str, tuple[tuple[Any, str], Plant]] = {
    "transposed kernel": (
        CONVOLUTION, _wrap(lambda w, b, axes, g: (np.swapaxes(w, 2, 3), b, axes, g)),
    ),
    "flipped kernel": (CONVOLUTION, _wrap(lambda w, b, axes, g: (w[:, :, ::-1, ::-1], b, axes, g))),
    "dropped bias": (LINEAR, _wrap(lambda w, b: (w, None))),
    "wrong padding": ((pytorch, "slide"), _pad_on_one_side),
    "normalised twice": (
        (operations, "normalize"), lambda f: lambda x, *a: f(f(x, *a), *a),
    ),
    "wrong sector": (
        (activation, "make_leaky_relu"), lambda f: lambda slope: f(-slope),
    ),
    "wrong slope": (
        (activation, "make_leaky_relu"), lambda f: lambda slope: f(slope + 1e-6),
    ),
    "wrong flatten order": ((pytorch, "read_places"), _flatten_channels_last),
    "wrong stride": ((pytorch, "slide"), _move_the_last_window),
    "dropped residual": ((operations, "add"), lambda f: lambda x, y: y),
    "wrong groups": (
        CONVOLUTION,
        _wrap(lambda w, b, axes, g: (w if g == 1 else w[[1, 0, 2, 3]], b, axes, g)),
    ),
    "wrong eps": (
        (operations, "normalize"), _wrap(lambda m, v, w, b, eps: (m, v, w, b, 10 * eps)),
    ),
    "mean of a window of another size": (
        (operations, "average"), _wrap(lambda axes, divisors: (axes, divisors + 1)),
    ),
    "slopes of other channels": (
        (operations, "apply_prelu"), _wrap(lambda slopes: (slopes[::-1],)),
    ),
}  # fmt: skip


@contextmanager
def planted(fault: str) -> Iterator[None]:
    """Run a block with one of the faults."""
    (place, name), plant = FAULTS[fault]
    with patch.object(place, name, plant(getattr(place, name))):
        yield


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Plant every fault, and print those that are not caught."""
    model = build_model()
    from_torch(model, SHAPE)
    missed = []
    for fault in FAULTS:
        try:
            with planted(fault):
                from_torch(model, SHAPE)
        except ConversionError:
            continue
        missed.append(fault)
    print(f"{len(FAULTS)} faults planted in the converter, {len(missed)} missed: {missed}")
    return {"planted": len(FAULTS), "missed": missed}

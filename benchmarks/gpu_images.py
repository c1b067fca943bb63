"""What do networks of images cost beside their bare products, and how soon is MNIST learnt?"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.common import find_root
from benchmarks.gpu_timing import timed
from benchmarks.mnist import RECIPE
from lben.data import DataError, Dataset
from lben.models import (
    Architecture,
    ConvolutionalEquilibriumArchitecture,
    published_architecture,
)
from lben.training import checkpoints
from lben.training.loop import train

BATCH = 256
ERROR = 2.3
"""Per cent of test images of MNIST that may be wrong."""
EPOCHS = 6
_PRODUCTS = {
    f"aten::{name}"
    for name in (
        "convolution", "convolution_backward", "mm", "addmm", "bmm", "baddbmm", "_fft_r2c",
        "_fft_c2r", "_fft_c2c",
    )
}  # fmt: skip


class Products(TorchDispatchMode):
    """Keeps every convolution, matrix product and transform that runs within it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[Callable[[], object]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name().partition(".")[0] in _PRODUCTS:
            self.calls.append(partial(func, *args, **(kwargs or {})))
        return func(*args, **(kwargs or {}))

    @torch.no_grad()
    def replay(self) -> None:
        """Run them again, one after the other, and nothing else."""
        for call in self.calls:
            call()


NETWORKS: dict[str, Architecture] = {
    "SLL Small": published_architecture("small"),
    "convolutional equilibrium, γ = 1": ConvolutionalEquilibriumArchitecture(gamma=1.0),
}


def convolutions(name: str, device: str, batch: int = BATCH) -> list[dict[str, Any]]:
    """Time training steps and evaluation of one of `NETWORKS`."""
    empty = torch.empty(0, 3, 32, 32, dtype=torch.uint8)
    labels = torch.empty(0, dtype=torch.int64)
    data = Dataset(
        name="cifar10", train_images=empty, train_labels=labels, test_images=empty,
        test_labels=labels, mean=(0.5,) * 3, std=(0.25,) * 3, classes=10,
    )  # fmt: skip
    model = NETWORKS[name].for_data(data).build().to(device)
    return _against_products(name, model, device, batch)


def _against_products(name: str, model: nn.Module, device: str, batch: int) -> list[dict[str, Any]]:
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.rand(batch, 3, 32, 32, device=device).to(memory_format=torch.channels_last)
    labels = torch.randint(10, (batch,), device=device)

    def training() -> None:
        model.train()
        nn.functional.cross_entropy(model(x), labels).backward()

    @torch.no_grad()
    def evaluation() -> Tensor:
        model.eval()
        return model(x)

    rows = []
    for what, call in (("training", training), ("evaluation", evaluation)):
        call()
        with Products() as products:
            call()
        found = timed({"network": call, "products": products.replay}, device)
        own, bare = found["network"], found["products"]
        rows.append(
            {
                "network": name, "what": what, **own.row(), "images/s": batch / own.wall,
                "bare products, images/s": batch / bare.wall,
                "network ÷ bare, device": own.device / bare.device,
                "network ÷ bare, wall": own.wall / bare.wall,
            }
        )  # fmt: skip
    return rows


def mnist(root: str | None, device: str) -> dict[str, Any]:
    """Train 80 units at γ = 1 until 2.3 % of the test images are wrong.

    The recipe is that of `benchmarks.mnist` in few epochs; where it is stopped early, what it has
    reached is returned.
    """
    try:
        folder = find_root(root)
    except DataError as error:
        return {"not trained": str(error)}
    recipe = replace(RECIPE, root=folder, device=device, epochs=EPOCHS)
    stopped = None
    with tempfile.TemporaryDirectory() as out:
        try:
            train(replace(recipe, out=out))
        except TimeoutError as error:
            stopped = str(error)
        path = Path(out) / checkpoints.METRICS
        lines = path.read_text().splitlines() if path.exists() else []
    seconds, best = 0.0, 100.0
    for line in map(json.loads, lines):
        seconds += line["seconds"]
        best = min(best, line["test_error_percent"])
        if best <= ERROR:
            return {"seconds": seconds, "epochs": line["epoch"], "error, %": best}
    return {"seconds": None, "epochs": len(lines), "error, %": best, "stopped": stopped}

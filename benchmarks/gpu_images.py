"""What do networks of images cost beside their bare products, and how soon is MNIST learnt?"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.cifar import PUBLISHED
from benchmarks.common import find_root, interleaved
from benchmarks.conv_cifar import SINGLE
from benchmarks.gpu_speed import finished
from benchmarks.mnist import RECIPE
from lben import checkpoints
from lben.data import DataError, Dataset
from lben.recipes import TrainingConfig
from lben.training import train

BATCH = 256
ERROR = 2.3
"""Per cent of test images of MNIST that may be wrong."""
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


def convolutions(device: str, batch: int = BATCH) -> list[dict[str, Any]]:
    """Time training steps and evaluation of SLL Small and of the convolutional equilibrium."""
    recipes: dict[str, TrainingConfig] = {
        "SLL Small": PUBLISHED.published("small"),
        "convolutional equilibrium, γ = 1": replace(SINGLE, gamma=1.0),
    }
    empty = torch.empty(0, 3, 32, 32, dtype=torch.uint8)
    labels = torch.empty(0, dtype=torch.int64)
    data = Dataset(
        name="cifar10", train_images=empty, train_labels=labels, test_images=empty,
        test_labels=labels, mean=(0.5,) * 3, std=(0.25,) * 3, classes=10,
    )  # fmt: skip
    return [
        row
        for name, recipe in recipes.items()
        for row in _against_products(name, recipe.model(data).build().to(device), device, batch)
    ]


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
        found = interleaved(
            {"network": partial(finished, call), "products": partial(finished, products.replay)}, 7
        )
        own, bare = (statistics.median(found[key]) for key in ("network", "products"))
        rows.append(
            {
                "network": name, "what": what, "images/s": batch / own,
                "bare products, images/s": batch / bare, "network ÷ bare": own / bare,
            }
        )  # fmt: skip
    return rows


def mnist(root: str | None, device: str) -> dict[str, Any]:
    """Train 80 units at γ = 1 until 2.3 % of the test images are wrong.

    Raises:
        DataError: if MNIST is not there.
    """
    try:
        folder = find_root(root)
    except DataError as error:
        return {"not trained": str(error)}
    with tempfile.TemporaryDirectory() as out:
        train(replace(RECIPE, root=folder, out=out, device=device, gamma=1.0))
        lines = (Path(out) / checkpoints.METRICS).read_text().splitlines()
    seconds = 0.0
    for line in map(json.loads, lines):
        seconds += line["seconds"]
        if line["test_error_percent"] <= ERROR:
            return {"seconds": seconds, "epochs": line["epoch"], "error": ERROR}
    return {"seconds": None, "epochs": len(lines), "best": min(
        json.loads(line)["test_error_percent"] for line in lines)}  # fmt: skip

"""What do published programs bound? eclipse-nn 0.1.7, where it is installed (extra `benchmarks`).

auto_LiRPA 0.3, the one on the package index, needs torch < 1.13, and imports functions of
torch.onnx that later versions do not have. So CROWN is our back-substitution without the box: the
same bound, with its rounding proved.
"""

from __future__ import annotations

import contextlib
import io
import time
from typing import Any

import torch
from torch import Tensor, nn


def _estimator(model: nn.Sequential) -> Any:
    """Return eclipse-nn's estimator of a dense network, or None where it is not installed."""
    try:
        from eclipse_nn.LipConstEstimator import LipConstEstimator
    except ImportError:
        return None
    layers = [m for m in model if isinstance(m, nn.Linear)]
    return LipConstEstimator(
        weights=[m.weight.detach().double() for m in layers],
        biases=[m.bias.detach().double().numpy()[:, None] for m in layers],
    )


def bound_by_eclipse(model: nn.Sequential) -> dict[str, Any] | str:
    """Return eclipse-nn's global estimate of all outputs by its fast method, and its seconds."""
    estimator = _estimator(model)
    if estimator is None:
        return "eclipse-nn is not installed"
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        found = float(estimator.estimate("ECLipsE_Fast"))
    return {"bound": found, "seconds": time.perf_counter() - start}


def certify_by_eclipse(
    model: nn.Sequential, x: Tensor, margins: Tensor, radius: float
) -> dict[str, Any] | str:
    """Return how many images eclipse-nn's local estimate certifies in l2, and its seconds.

    Args:
        model: dense, with ReLU.
        x: images.
        margins: of the label's logit to the next one, for each image.
        radius: of the ball.
    """
    estimator = _estimator(model)
    if estimator is None:
        return "eclipse-nn is not installed"
    start, certified, failed = time.perf_counter(), 0, 0
    for image, margin in zip(x.flatten(1).double(), margins.tolist(), strict=True):
        with contextlib.redirect_stdout(io.StringIO()):
            bound, _, status = estimator.estimate_gen_local(
                image.numpy()[:, None], radius, "relu", "Fast"
            )
        failed += int(status != 0)
        certified += int(status == 0 and margin > 2**0.5 * float(bound) * radius)
    return {"certified": certified, "failed": failed, "seconds": time.perf_counter() - start}


def measure_margins(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    """Return how far the label's logit is above the largest other one."""
    with torch.no_grad():
        logits = model(x)
    own = logits.gather(1, labels[:, None])
    rest = logits.scatter(1, labels[:, None], -torch.inf)
    return (own - rest.amax(1, keepdim=True))[:, 0]

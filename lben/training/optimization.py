"""How are the weights updated? Optimizers, learning rates over time, a moving average."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lben.values import conform

# --- optimizers: the training loop sets their rate at every step -----------------------------


@dataclass(frozen=True, kw_only=True)
class _Adaptive:
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        conform(self)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must lie in [0, 1), got {self.betas}")
        _check_decay(self.weight_decay)


@dataclass(frozen=True, kw_only=True)
class AdamW(_Adaptive):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019).

    Attributes:
        betas: decay of the averages of the gradient and of its square.
        weight_decay: share of the rate by which matrices and kernels shrink per step.
    """

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return the optimizer of a model's parameters."""
        return torch.optim.AdamW(_groups(model, self.weight_decay), betas=self.betas)


@dataclass(frozen=True, kw_only=True)
class Adam(_Adaptive):
    """Adam (Kingma and Ba 2015); SLL was published with betas 0.5 and 0.9.

    Attributes:
        betas: decay of the averages of the gradient and of its square.
        weight_decay: factor of ½‖·‖² of matrices and kernels, added to the loss.
    """

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return the optimizer of a model's parameters."""
        return torch.optim.Adam(_groups(model, self.weight_decay), betas=self.betas)


@dataclass(frozen=True, kw_only=True)
class SGD:
    """Stochastic gradient descent with momentum.

    Attributes:
        momentum: share of the last step that is kept.
        nesterov: look ahead by the momentum (Sutskever et al. 2013).
        weight_decay: factor of ½‖·‖² of matrices and kernels, added to the loss.
    """

    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        conform(self)
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must lie in [0, 1), got {self.momentum}")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov looks ahead by the momentum: it needs momentum above 0")
        _check_decay(self.weight_decay)

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return the optimizer of a model's parameters."""
        groups = _groups(model, self.weight_decay)
        return torch.optim.SGD(groups, momentum=self.momentum, nesterov=self.nesterov)


OptimizerConfig = AdamW | Adam | SGD


def _groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return parameter groups: matrices and kernels decay; biases, metrics and vectors do not."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def _check_decay(weight_decay: float) -> None:
    if not 0 <= weight_decay < math.inf:
        raise ValueError(f"weight_decay must be at least 0, got {weight_decay}")


# --- schedules: the share of the peak rate at a step -----------------------------------------


@dataclass(frozen=True, kw_only=True)
class WarmupCosine:
    """From a tenth linearly to 1, then along a cosine to 0.

    Attributes:
        warmup: share of all steps before the peak.
    """

    warmup: float = 0.15

    def __post_init__(self) -> None:
        conform(self)
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"warmup must lie in [0, 1], got {self.warmup}")

    def __call__(self, step: int, total: int) -> float:
        """Return the share of the peak rate at a step of `total`."""
        warmup = max(1, round(self.warmup * total))
        if step < warmup:
            return 0.1 + 0.9 * step / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


@dataclass(frozen=True, kw_only=True)
class PiecewiseLinear:
    """0 at the start, 1 after two fifths, 1/20 after four fifths, 0 at the end.

    The schedule of CPL and SLL (Meunier et al. 2022; Araujo et al. 2023).
    """

    def __call__(self, step: int, total: int) -> float:
        """Return the share of the peak rate at a step of `total`."""
        fifths = 5 * step / total
        if fifths < 2:
            return fifths / 2
        if fifths < 4:
            return 1 - 0.95 * (fifths - 2) / 2
        return 0.05 * (5 - fifths)


@dataclass(frozen=True, kw_only=True)
class Constant:
    """1 throughout."""

    def __call__(self, step: int, total: int) -> float:
        """Return the share of the peak rate at a step of `total`."""
        return 1.0


Schedule = WarmupCosine | PiecewiseLinear | Constant


# --- average ---------------------------------------------------------------------------------


class EMA:
    """w̄ ← d·w̄ + (1 − d)·w after every step: often better than the last weights, and steadier.

    It averages parameters and persistent buffers. Buffers that hold no floats are copied. At step k
    the decay is at most (1 + k)/(10 + k), so that a short run forgets the initial weights too (as
    in TensorFlow's ExponentialMovingAverage with num_updates).

    Args:
        model: its present weights are the first average.
        decay: d, in (0, 1).

    Raises:
        ValueError: for a decay outside (0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"decay of the moving average must lie in (0, 1), got {decay}")
        self.decay, self.steps = decay, 0
        self._average = {k: v.detach().clone() for k, v in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Update the average with the weights after a step."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                self._average[name].lerp_(value, 1 - decay)
            else:
                self._average[name].copy_(value)

    def copy_to(self, model: nn.Module) -> None:
        """Give a model the averaged weights."""
        model.load_state_dict(self._average)

    @contextmanager
    def swap(self, model: nn.Module) -> Iterator[None]:
        """Give the model the averaged weights within the block, and its own weights after it."""
        own = {k: v.detach().clone() for k, v in model.state_dict().items()}
        self.copy_to(model)
        try:
            yield
        finally:
            model.load_state_dict(own)

    def state_dict(self) -> dict[str, Tensor]:
        """Return average and count of steps, for a checkpoint."""
        average = {f"average.{k}": v for k, v in self._average.items()}
        return {"steps": torch.tensor(self.steps, device="cpu"), **average}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load average and count of steps from a `state_dict`.

        Raises:
            KeyError: if it lacks a tensor.
        """
        self.steps = int(state["steps"])
        for name, value in self._average.items():
            value.copy_(state[f"average.{name}"])

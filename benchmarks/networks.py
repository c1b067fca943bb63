"""Which networks are attacked? Small ones of every kind, random or trained."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch

from benchmarks.common import trained
from lben.models import (
    ActivationName,
    Architecture,
    Block,
    Bound,
    Classifier,
    ConvolutionalEquilibriumArchitecture,
    ConvolutionalEquilibriumClassifierConfig,
    EquilibriumArchitecture,
    EquilibriumClassifierConfig,
    FeedforwardArchitecture,
    FeedforwardClassifierConfig,
)
from lben.training.loop import train
from lben.training.recipes import TrainingConfig

_GRAY: dict[str, Any] = {"shape": (1, 6, 6), "classes": 4, "mean": (0.3,), "std": (0.25,)}
_COLOURS: dict[str, Any] = {
    "shape": (3, 6, 6),
    "classes": 4,
    "mean": (0.4, 0.5, 0.6),
    "std": (0.2, 0.25, 0.3),
}


def _residual(block: str, **options: Any) -> FeedforwardClassifierConfig:
    sizes: dict[str, Any] = {
        "channels": (4,), "depths": (1,), "conv_hidden": 4, "pool": 2, "dense_depth": 1,
        "dense_hidden": 8,
    }  # fmt: skip
    return FeedforwardClassifierConfig(**{**_COLOURS, **sizes, "block": block, **options})


KINDS: dict[str, Any] = {
    "dense": EquilibriumClassifierConfig(**_GRAY, hidden=10, gamma=2.0),
    "dense, leaky": EquilibriumClassifierConfig(
        **_GRAY, hidden=10, gamma=1.0, activation="leaky_relu"
    ),
    "dense, tanh": EquilibriumClassifierConfig(**_GRAY, hidden=10, gamma=5.0, activation="tanh"),
    "dense, feed-through": EquilibriumClassifierConfig(
        **_GRAY, hidden=8, gamma=1.0, feedthrough=True
    ),
    "dense, no promise": EquilibriumClassifierConfig(**_GRAY, hidden=8, gamma=None, epsilon=0.1),
    "convolution": ConvolutionalEquilibriumClassifierConfig(
        **_COLOURS, channels=(4,), pool=2, gamma=1.0
    ),
    "convolution, circular": ConvolutionalEquilibriumClassifierConfig(
        **_COLOURS, channels=(4,), pool=3, gamma=3.0, circular=True
    ),
    "convolution, two scales": ConvolutionalEquilibriumClassifierConfig(
        **_COLOURS, channels=(3, 4), pool=2, gamma=2.0
    ),
    "SLL": _residual("sll"),
    "CPL": _residual("cpl"),
    "AOL": _residual("aol"),
    "spectral": _residual("spectral"),
    "sandwich": _residual("sandwich"),
    "SLL and equilibrium": _residual("sll", core=4),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Network:
    """A network and the bound that it is attacked against."""

    kind: str
    model: Classifier

    @property
    def bound(self) -> Bound:
        """The tightest cheap bound of all logits that the model has."""
        return "scaled" if "scaled" in self.model.bounds else "promised"


def random_networks(count: int, seed: int = 0) -> Iterator[Network]:
    """Yield networks of all kinds in turn, every parameter moved away from its first value."""
    generator = torch.Generator().manual_seed(seed)
    names = list(KINDS)
    for index in range(count):
        kind = names[index % len(names)]
        torch.manual_seed(seed + index)
        model = KINDS[kind].build()
        size = 10.0 ** float(torch.empty(1).uniform_(-2, 0, generator=generator))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=size)
        yield Network(kind=kind, model=model.eval())


def trained_networks(quick: bool) -> Iterator[Network]:
    """Yield the MNIST models of `benchmarks.mnist`, and models of the digits trained here."""
    for name in ("1",) if quick else ("0.2", "0.5", "1", "5", "monotone"):
        yield Network(kind=f"MNIST, γ = {name}", model=trained(name))
    kinds = list(_architectures())
    for kind in kinds[:2] if quick else kinds:
        yield Network(kind=f"digits, {kind}", model=trained_on_digits(kind))


def trained_on_digits(kind: str) -> Classifier:
    """Train one of the small models of the digits."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = TrainingConfig(
            model=_architectures()[kind], data="digits", epochs=4, batch_size=64, out=folder
        )
        return train(recipe).eval()


def _architectures() -> dict[str, Architecture]:
    found: dict[str, Architecture] = {
        f"γ = {gamma:g}, {activation}": EquilibriumArchitecture(
            gamma=gamma, hidden=20, activation=activation
        )
        for gamma, activation in _PAIRS
    }
    found["feed-through"] = EquilibriumArchitecture(gamma=2.0, hidden=20, feedthrough=True)
    found["no promise"] = EquilibriumArchitecture(gamma=None, hidden=20)
    for gamma in (1.0, 4.0):
        found[f"convolution, γ = {gamma:g}"] = ConvolutionalEquilibriumArchitecture(
            gamma=gamma, channels=(6,), pool=2
        )
    small = FeedforwardArchitecture(
        channels=(4,), depths=(1,), conv_hidden=4, pool=2, dense_depth=1, dense_hidden=16
    )
    for block in get_args(Block):
        found[block] = replace(small, block=block)
    found["sll, equilibrium core"] = replace(small, core=4)
    return found


_PAIRS: tuple[tuple[float, ActivationName], ...] = (
    (0.5, "relu"), (2.0, "relu"), (10.0, "relu"), (1.0, "leaky_relu"), (2.0, "tanh"),
)  # fmt: skip

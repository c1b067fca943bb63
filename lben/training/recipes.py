"""What is trained, and by which recipe? Frozen configurations of a run, one class per model."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any, ClassVar

from lben.data import Dataset, DatasetName
from lben.models import (
    ActivationName,
    Block,
    ClassifierConfig,
    ConvolutionalEquilibriumClassifierConfig,
    EquilibriumClassifierConfig,
    FeedforwardClassifierConfig,
    Head,
    Size,
    published_architecture,
)
from lben.models.checks import check_channels
from lben.records import by_name, decode
from lben.training.augmentation import Augmentation
from lben.training.losses import CrossEntropy, Loss
from lben.training.optimization import AdamW, OptimizerConfig, Schedule, WarmupCosine
from lben.values import check_positive, check_tol, conform
from lben.weights import check_gamma


def _without_prefix() -> object:
    """Return tyro's mark of a field whose options have no prefix; None where tyro is not loaded.

    Annotations are evaluated when they are asked for, so recipes serve without the command line.
    """
    tyro = sys.modules.get("tyro")
    return None if tyro is None else tyro.conf.arg(name="")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(ABC):
    """What every training run has, whatever its model; also the options of `lben train`.

    A model's own recipe subclasses it, adds its fields and `model`, and says in `supports` which
    of channels_last and autocast its model can take.

    Attributes:
        data: data set: digits (embedded), mnist or cifar10.
        root: folder with the data files (not for digits).
        download: fetch missing data files into root, checked by MD5.
        out: folder of the run.
        epochs: passes over the training images.
        batch_size: samples per step, of all processes together.
        accumulate: parts that a batch is processed in, one after the other, to save memory.
        lr: peak of the learning rate.
        loss: what is minimised.
        augmentation: what is done to the training images.
        optimizer: how a gradient moves the weights.
        schedule: the learning rate over time, as a share of its peak.
        ema: decay of a moving average of the weights, which is then evaluated and saved.
        channels_last: keep images and kernels in channels-last order, where the model supports it.
        autocast: run the model in bfloat16 where torch.autocast does, and the loss in float32,
            where the model supports it.
        seed: of initialisation, order and augmentation.
        device: cpu or cuda.
    """

    supports: ClassVar[frozenset[str]] = frozenset()

    data: DatasetName = "digits"
    root: str | None = None
    download: bool = False
    out: str = "runs/train"
    epochs: int = 40
    batch_size: int = 128
    accumulate: int = 1
    lr: float = 4e-3
    loss: Loss = field(default_factory=CrossEntropy)
    augmentation: Annotated[Augmentation, _without_prefix()] = field(default_factory=Augmentation)
    optimizer: OptimizerConfig = field(default_factory=AdamW)
    schedule: Schedule = field(default_factory=WarmupCosine)
    ema: float | None = None
    channels_last: bool = False
    autocast: bool = False
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        conform(self)
        if not self.out:
            raise ValueError("out must name the folder of the run, got empty text")
        check_positive(self, "epochs", "batch_size", "accumulate", "lr")
        if not abs(self.seed) < 2**40:
            raise ValueError(f"seed must be an integer below 2^40, got {self.seed}")
        if self.accumulate > self.batch_size:
            raise ValueError(
                f"accumulate must be at most batch_size {self.batch_size}, got {self.accumulate}"
            )
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"ema must be a decay in (0, 1) or None, got {self.ema}")
        for name in ("channels_last", "autocast"):
            if getattr(self, name) and name not in self.supports:
                raise ValueError(f"{type(self).__name__} does not support {name}: leave it off")

    def check(self, data: Dataset) -> None:
        """Refuse data that the augmentation has no meaning for.

        Raises:
            ValueError: as `Augmentation.check` does, or if a shift would leave nothing of an image.
        """
        self.augmentation.check(data.shape)
        _, height, width = data.shape
        if self.augmentation.shift >= min(height, width):
            raise ValueError(
                f"shift must be below the size of the images, {height} × {width} pixels, "
                f"got {self.augmentation.shift}"
            )

    def _shared(self, config: type[Any], data: Dataset) -> dict[str, Any]:
        """Return the fields of a model's configuration that the data or this run decide."""
        own = {f.name for f in fields(self)} & {f.name for f in fields(config)}
        return {
            "shape": data.shape,
            "classes": data.classes,
            "mean": data.mean,
            "std": data.std,
            **{name: getattr(self, name) for name in own},
        }

    @abstractmethod
    def model(self, data: Dataset) -> ClassifierConfig:
        """Return the configuration of the model for this data."""


@dataclass(frozen=True, kw_only=True)
class EquilibriumTraining(TrainingConfig):
    """Configuration of one training run of an equilibrium classifier.

    Attributes:
        gamma: l2 Lipschitz bound on the normalised input; None for no bound.
        learn_metric: train Λ (with gamma None and this off: monDEQ).
        feedthrough: give the output a direct term Dx.
        hidden: equilibrium units.
        activation: relu, leaky_relu or tanh.
        epsilon: slack of the certificate.
        tol: relative tolerance of forward and backward solves.
    """

    gamma: float | None = 1.0
    learn_metric: bool = True
    feedthrough: bool = False
    hidden: int = 80
    activation: ActivationName = "relu"
    epsilon: float = 1e-3
    tol: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "hidden", "epsilon", "tol")
        check_tol(self.tol)
        check_gamma(self.gamma)

    def model(self, data: Dataset) -> EquilibriumClassifierConfig:
        """Return the configuration of the model for this data."""
        return EquilibriumClassifierConfig(**self._shared(EquilibriumClassifierConfig, data))


@dataclass(frozen=True, kw_only=True)
class ConvolutionalEquilibriumTraining(TrainingConfig):
    """Configuration of one training run of a convolutional equilibrium classifier.

    The defaults are the single convolution of the papers, --channels 16 32 64 the multi-tier one.

    Attributes:
        gamma: l2 Lipschitz bound on the normalised input; None for no bound.
        learn_metric: train Λ (with gamma None and this off: monDEQ).
        channels: hidden channels of every scale, finest first, each of half the resolution.
        stem: invertible down-sampling of the image before all else.
        kernel_size: of all convolutions, odd.
        pool: size of the pooling windows in pixels after the stem.
        circular: the image is a torus; otherwise it is surrounded by zeros.
        activation: relu, leaky_relu or tanh.
        epsilon: slack of the certificate.
        tol: relative tolerance of forward and backward solves.
    """

    gamma: float | None = 1.0
    learn_metric: bool = True
    channels: tuple[int, ...] = (81,)
    stem: int = 1
    kernel_size: int = 3
    pool: int = 4
    circular: bool = False
    activation: ActivationName = "relu"
    epsilon: float = 0.1
    tol: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "stem", "kernel_size", "pool", "epsilon", "tol")
        check_tol(self.tol)
        check_gamma(self.gamma)
        check_channels(self.channels)

    def model(self, data: Dataset) -> ConvolutionalEquilibriumClassifierConfig:
        """Return the configuration of the model for this data."""
        return ConvolutionalEquilibriumClassifierConfig(
            **self._shared(ConvolutionalEquilibriumClassifierConfig, data)
        )


@dataclass(frozen=True, kw_only=True)
class FeedforwardTraining(TrainingConfig):
    """Configuration of one training run of an explicit 1-Lipschitz network.

    Attributes:
        block: family of all layers: sll, cpl, aol, spectral or sandwich.
        stem: invertible down-sampling of the image before the first stage.
        channels: of each stage of convolutions.
        depths: convolutions of each stage.
        kernel_size: of the convolutions.
        conv_hidden: hidden channels of residual and sandwich convolutions.
        pool: size of the pooling after the last stage.
        dense_depth: dense layers.
        dense_hidden: hidden units of residual and sandwich dense layers.
        head: rows of the last layer, each normalised or orthonormal.
        core: hidden channels of a residual equilibrium convolution after the last stage, or 0.
    """

    supports: ClassVar[frozenset[str]] = frozenset({"channels_last", "autocast"})

    block: Block = "sll"
    stem: int = 1
    channels: tuple[int, ...] = (45,)
    depths: tuple[int, ...] = (20,)
    kernel_size: int = 3
    conv_hidden: int = 5
    pool: int = 4
    dense_depth: int = 7
    dense_hidden: int = 2048
    head: Head = "rows"
    core: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.core and self.autocast:
            raise ValueError("equilibrium layers do not support autocast: leave it or core off")

    def model(self, data: Dataset) -> FeedforwardClassifierConfig:
        """Return the configuration of the model for this data: shifted by its mean only."""
        shared = self._shared(FeedforwardClassifierConfig, data)
        return FeedforwardClassifierConfig(**{**shared, "std": (1.0,) * len(data.mean)})

    def published_architecture(self, size: Size) -> FeedforwardTraining:
        """Return the same recipe for SLL Small, Medium, Large or X-Large."""
        return replace(self, **published_architecture(size))


RECIPES = by_name(  # what config.json may ask for
    EquilibriumTraining, ConvolutionalEquilibriumTraining, FeedforwardTraining
)


def read(record: Mapping[str, Any]) -> TrainingConfig:
    """Return the configuration of a run from its part of config.json.

    Raises:
        ValueError, TypeError: as `lben.records.decode` does.
    """
    return decode(record if "kind" in record else _upgraded(record), RECIPES)


def _upgraded(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record from before there were other models, losses and optimizers than the default."""
    content = dict(record)
    moved = {
        "loss": ("CrossEntropy", {"temperature": "scale"}),  # it multiplied the logits
        "augmentation": ("Augmentation", {"shift": "shift"}),
        "optimizer": ("AdamW", {"weight_decay": "weight_decay"}),
    }
    for name, (kind, renamed) in moved.items():
        own = {new: content.pop(old) for old, new in renamed.items() if old in content}
        content[name] = {"kind": kind, **own}
    return {"kind": "EquilibriumTraining", **content}

"""Which choices make up a training run? A frozen configuration that contains the architecture."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Generic, TypeVar

from lben.data import Dataset, DatasetName
from lben.models import Architecture, ClassifierConfig
from lben.records import by_name, decode
from lben.training.augmentation import Augmentation
from lben.training.losses import CrossEntropy, Loss
from lben.training.optimization import AdamW, OptimizerConfig, Schedule, WarmupCosine
from lben.values import check_positive, conform

Model = TypeVar("Model", bound=Architecture, covariant=True)


def _omit_prefix() -> object:
    """Return tyro's marker for a field whose options have no prefix; None if tyro is not loaded.

    Annotations are evaluated only on request, so configurations work without the command line.
    """
    tyro = sys.modules.get("tyro")
    return None if tyro is None else tyro.conf.arg(name="")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(Generic[Model]):
    """The configuration of one training run; its fields are the options of `lben train`.

    Every option is a field of this class or of the architecture, and is declared only there.

    Attributes:
        model: architecture of the model. The data fix size, classes, mean and deviation.
        data: data set: digits (embedded), mnist or cifar10. A `Dataset` given to `train` takes
            precedence.
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

    Raises:
        ValueError: naming the field, what it must be, and what was given.

    Example:
        >>> from lben.models import EquilibriumArchitecture
        >>> config = TrainingConfig(model=EquilibriumArchitecture(gamma=2.0), epochs=3)
        >>> config.data, config.epochs, config.model.gamma
        ('digits', 3, 2.0)
    """

    model: Annotated[Model, _omit_prefix()]
    data: DatasetName = "digits"
    root: str | None = None
    download: bool = False
    out: str = "runs/train"
    epochs: int = 40
    batch_size: int = 128
    accumulate: int = 1
    lr: float = 4e-3
    loss: Loss = field(default_factory=CrossEntropy)
    augmentation: Annotated[Augmentation, _omit_prefix()] = field(default_factory=Augmentation)
    optimizer: OptimizerConfig = field(default_factory=AdamW)
    schedule: Schedule = field(default_factory=WarmupCosine)
    ema: float | None = None
    channels_last: bool = False
    autocast: bool = False
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        conform(self)
        if not isinstance(self.model, Architecture):
            raise ValueError(
                "model must be the architecture of a model, such as EquilibriumArchitecture(), got "
                f"{type(self.model).__name__}"
            )
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
            if getattr(self, name) and name not in self.model.supports:
                raise ValueError(
                    f"{type(self.model).__name__} does not support {name} (equilibrium layers do "
                    "not): leave it off"
                )

    def check(self, data: Dataset) -> None:
        """Refuse data that cannot be trained on, or that the augmentation cannot change.

        Args:
            data: of the run.

        Raises:
            ValueError: as `Augmentation.check` does, or if there are no training or no test images,
                or if a shift would leave nothing of an image.
        """
        for part, count in (("train", len(data.train_labels)), ("test", len(data.test_labels))):
            if not count:
                raise ValueError(
                    f"{data.name} has no {part} images: training needs one at least of both parts"
                )
        self.augmentation.check(data.shape)
        _, height, width = data.shape
        if self.augmentation.shift >= min(height, width):
            raise ValueError(
                f"shift must be below the size of the images, {height} × {width} pixels, "
                f"got {self.augmentation.shift}"
            )


def read(record: Mapping[str, Any], model: ClassifierConfig) -> TrainingConfig[Architecture]:
    """Return the configuration of a run from its two parts in config.json.

    Args:
        record: the training configuration.
        model: the configuration of the model.

    Raises:
        ValueError, TypeError: as `lben.records.decode` does.
    """
    return decode({**record, "model": model.architecture}, by_name(TrainingConfig))

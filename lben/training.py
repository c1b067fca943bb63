"""How is a model trained? One seeded loop: interruptible, and resumable to the same weights."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from lben import checkpoints
from lben.data import Dataset, DatasetName, load, pixels
from lben.models import ActivationName, EquilibriumClassifier, EquilibriumClassifierConfig
from lben.radii import check_labels


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Configuration of one training run; also the options of `lben train`.

    Attributes:
        data: data set: digits (embedded), mnist or cifar10.
        root: folder with the data files (not for digits).
        download: fetch missing data files into root, checked by MD5.
        out: folder of the run.
        gamma: l2 Lipschitz bound on the normalised input; None for no bound.
        learn_metric: train Λ (with gamma None and this off: monDEQ).
        feedthrough: give the output a direct term Dx.
        hidden: equilibrium units.
        activation: relu, leaky_relu or tanh.
        epsilon: slack of the certificate.
        tol: relative tolerance of forward and backward solves.
        epochs: passes over the training images.
        batch_size: samples per step.
        lr: peak learning rate of AdamW.
        weight_decay: of AdamW, on matrices.
        shift: augmentation: shift each image by up to this many pixels, zero-filled.
        temperature: factor on the logits inside the cross-entropy; larger favours clean accuracy,
            smaller favours margins.
        seed: of initialisation, order and augmentation.
        device: cpu or cuda.
    """

    data: DatasetName = "digits"
    root: str | None = None
    download: bool = False
    out: str = "runs/train"
    gamma: float | None = 1.0
    learn_metric: bool = True
    feedthrough: bool = False
    hidden: int = 80
    activation: ActivationName = "relu"
    epsilon: float = 1e-3
    tol: float = 1e-4
    epochs: int = 40
    batch_size: int = 128
    lr: float = 4e-3
    weight_decay: float = 0.0
    shift: int = 0
    temperature: float = 1.0
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "hidden", "lr", "temperature", "epsilon", "tol"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {value}")
        for name in ("weight_decay", "shift"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")

    def model(self, data: Dataset) -> EquilibriumClassifierConfig:
        """Return the configuration of the model for this data."""
        shared = {f.name for f in fields(self)} & {
            f.name for f in fields(EquilibriumClassifierConfig)
        }
        return EquilibriumClassifierConfig(
            shape=data.shape,
            classes=data.classes,
            mean=data.mean,
            std=data.std,
            **{name: getattr(self, name) for name in shared},
        )


class Interrupted(Exception):
    """Training was stopped by Ctrl-C; the last checkpoint is whole."""


def train(config: TrainingConfig, *, resume: bool = False) -> EquilibriumClassifier:
    """Train a model into the folder `config.out`, or continue there.

    Resuming after the k-th epoch gives bit for bit the weights of an uninterrupted run on the
    same machine: order and augmentation are drawn from (seed, epoch).

    Raises:
        CheckpointError: if the folder already holds a run and resume is False, or holds none and
            resume is True, or its files are damaged.
        DataError: if the data cannot be read.
        Interrupted: on Ctrl-C, after which `resume` continues from the last whole checkpoint.
    """
    folder = Path(config.out)
    data = load(config.data, config.root, download=config.download)
    torch.manual_seed(config.seed)
    model = config.model(data).build().to(config.device)
    optimizer = _optimizer(model, config)
    done = 0
    if resume:
        done = checkpoints.load_training(folder, model, optimizer)
    elif (folder / checkpoints.TRAINING).exists():
        raise checkpoints.CheckpointError(
            f"{folder} already holds a run: continue it with `lben resume {folder}`, "
            "or choose another --out"
        )
    else:
        checkpoints.save_config(folder, model.config, asdict(config))
        (folder / checkpoints.METRICS).unlink(missing_ok=True)
        checkpoints.save_training(folder, model, optimizer, 0)
    _trim_metrics(folder, done)
    try:
        _fit(model, optimizer, data, config, folder, done)
    except KeyboardInterrupt:
        raise Interrupted(
            f"interrupted; the last checkpoint is whole, continue with `lben resume {folder}`"
        ) from None
    checkpoints.save_model(folder, model)
    certificate = model.eval().certificate()
    checkpoints.write_atomically(
        folder / checkpoints.CERTIFICATE, (certificate.to_json() + "\n").encode()
    )
    return model


def resume(folder: Path | str, *, root: str | None = None) -> EquilibriumClassifier:
    """Continue the run in a folder with the configuration stored there.

    Args:
        folder: of the run.
        root: another place of the data files, if they have moved.
    """
    _, training = checkpoints.load_config(folder)
    training["out"] = str(folder)
    if root is not None:
        training["root"] = root
    try:
        config = TrainingConfig(**training)
    except (TypeError, ValueError) as error:
        raise checkpoints.CheckpointError(
            f"{Path(folder) / checkpoints.CONFIG} lacks a field or has one too many: {error}"
        ) from error
    return train(config, resume=True)


def _fit(
    model: EquilibriumClassifier,
    optimizer: torch.optim.Optimizer,
    data: Dataset,
    config: TrainingConfig,
    folder: Path,
    done: int,
) -> None:
    images = data.train_images.to(config.device)
    labels = data.train_labels.to(config.device)
    check_labels(torch.empty(len(labels), data.classes, device="meta"), labels)
    per_epoch = math.ceil(len(images) / config.batch_size)
    total = config.epochs * per_epoch
    writer = _tensorboard(folder)
    progress = tqdm(
        total=total, initial=done * per_epoch, desc=f"train {config.data}", unit="step",
        disable=None, dynamic_ncols=True,
    )  # fmt: skip
    with progress:
        for epoch in range(done, config.epochs):
            started = time.perf_counter()
            model.train()
            loss_sum = torch.zeros((), device=config.device)
            correct = torch.zeros((), dtype=torch.long, device=config.device)
            for step, (x, y) in enumerate(_batches(images, labels, config, epoch)):
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(epoch * per_epoch + step, total, config.lr)
                logits = model(x)
                loss = functional.cross_entropy(logits * config.temperature, y)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                loss_sum += loss.detach() * len(y)
                correct += (logits.detach().argmax(1) == y).sum()
                progress.update()
            metrics = {
                "epoch": epoch + 1,
                "loss": float(loss_sum) / len(images),
                "train_error_percent": 100 * (1 - int(correct) / len(images)),
                "test_error_percent": 100 * error_rate(model, data),
                "seconds": round(time.perf_counter() - started, 2),
            }
            progress.set_postfix(test_error=f"{metrics['test_error_percent']:.2f}%")
            with (folder / checkpoints.METRICS).open("a") as file:
                file.write(json.dumps(metrics) + "\n")
            if writer is not None:
                for name, value in metrics.items():
                    writer.add_scalar(name, value, epoch + 1)
            checkpoints.save_training(folder, model, optimizer, epoch + 1)
    if writer is not None:
        writer.close()


@torch.no_grad()
def error_rate(model: EquilibriumClassifier, data: Dataset, batch: int = 2000) -> float:
    """Return the share of test images that the model misclassifies."""
    model.eval()
    parameter = next(model.parameters())
    wrong = 0
    for x, y in zip(data.test_images.split(batch), data.test_labels.split(batch), strict=True):
        logits = model(pixels(x.to(parameter.device), parameter.dtype))
        wrong += int((logits.argmax(1).cpu() != y).sum())
    return wrong / len(data.test_labels)


def learning_rate(step: int, total: int, peak: float) -> float:
    """Return the rate at a step: linear warm-up over 15 %, then a cosine to 0."""
    warmup = max(1, round(0.15 * total))
    if step < warmup:
        return peak * (0.1 + 0.9 * step / warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def random_shift(images: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Shift each image by up to `most` pixels in each direction, filling with zeros."""
    if most == 0:
        return images
    n, _, height, width = images.shape
    padded = functional.pad(images, (most, most, most, most))
    offset = torch.randint(0, 2 * most + 1, (2, n), generator=generator).to(images.device)
    rows = offset[0][:, None] + torch.arange(height, device=images.device)
    columns = offset[1][:, None] + torch.arange(width, device=images.device)
    sample = torch.arange(n, device=images.device)[:, None, None]
    shifted = padded.permute(0, 2, 3, 1)[sample, rows[:, :, None], columns[:, None, :]]
    return shifted.permute(0, 3, 1, 2)


def _batches(
    images: Tensor, labels: Tensor, config: TrainingConfig, epoch: int
) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
    order = torch.randperm(len(images), generator=generator).to(images.device)
    for index in order.split(config.batch_size):
        batch = random_shift(images[index], config.shift, generator)
        yield pixels(batch), labels[index]


def _optimizer(model: EquilibriumClassifier, config: TrainingConfig) -> torch.optim.Optimizer:
    parameters = list(model.parameters())
    matrices: dict[str, Any] = {"params": [p for p in parameters if p.ndim == 2]}
    vectors: dict[str, Any] = {
        "params": [p for p in parameters if p.ndim != 2],
        "weight_decay": 0.0,
    }
    return torch.optim.AdamW(
        [matrices, vectors],
        lr=config.lr,
        weight_decay=config.weight_decay,
    )


def _trim_metrics(folder: Path, done: int) -> None:
    """Drop metrics of epochs that the checkpoint does not hold."""
    path = folder / checkpoints.METRICS
    if path.exists():
        lines = path.read_text().splitlines(keepends=True)[:done]
        checkpoints.write_atomically(path, "".join(lines).encode())


def _tensorboard(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder / "tensorboard"))

"""How is a model trained? One seeded loop: interruptible, and resumable to the same weights.

The loop calls `model(x)` and `model.certificate()`. Everything else is in the configuration.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lben.data import Dataset, load, pixels
from lben.models import Architecture, Classifier
from lben.parallel import Processes, processes, without_synchronisation
from lben.progress import Progress
from lben.radii.margin import check_labels
from lben.records import encode
from lben.training import checkpoints
from lben.training.optimization import EMA
from lben.training.recipes import TrainingConfig, read


class Interrupted(Exception):
    """Training was stopped by Ctrl-C; the last checkpoint is whole.

    Example:
        >>> issubclass(Interrupted, Exception)  # other than KeyboardInterrupt
        True
    """


def train(
    config: TrainingConfig[Architecture],
    data: Dataset | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
) -> Classifier:
    """Train a model into the folder `config.out`, or continue there.

    A resumed run reaches, bit for bit, the weights of an uninterrupted run on the same machine: the
    order of samples and their augmentation are drawn from (seed, epoch). With a moving average, the
    model that is returned, saved and certified has the averaged weights. Processes that torchrun
    started share every batch, and the first of them writes. Data, device, model and loss are tried
    before anything is written, so a refused run leaves the folder as it was.

    Args:
        config: of the run.
        data: your own data set, in place of the one that config.data names. `Dataset.from_tensors`
            makes it of images and labels. The folder records its fingerprint.
        resume: continue the run in the folder.
        overwrite: start afresh where the folder already holds a run.

    Returns:
        The trained model, in eval mode on the device of the run.

    Raises:
        CheckpointError: if the folder already holds a run or a file of its name and neither resume
            nor overwrite is asked for, or holds none and resume is True, or its files are damaged,
            or it cannot be made or written to, or something else is in the place of a file, or the
            run that is resumed was trained on other data.
        DataError: if the data cannot be read.
        Interrupted: on Ctrl-C, after which `resume` continues from the last whole checkpoint.
        ValueError: if data is no `Dataset`, or augmentation, batches or labels do not suit it.

    Example:
        >>> import tempfile
        >>> from lben.data import Dataset
        >>> from lben.models import EquilibriumArchitecture
        >>> from lben.training import TrainingConfig
        >>> images = torch.arange(160, dtype=torch.uint8).reshape(10, 1, 4, 4)
        >>> labels = torch.arange(10) % 2
        >>> data = Dataset.from_tensors(images, labels, images, labels)
        >>> config = TrainingConfig(
        ...     model=EquilibriumArchitecture(hidden=4), epochs=2, out=tempfile.mkdtemp()
        ... )
        >>> train(config, data)(torch.rand(3, 1, 4, 4)).shape
        torch.Size([3, 2])
    """
    if not isinstance(data, Dataset | None):
        raise ValueError(
            f"data of your own must be a Dataset, got a {type(data).__name__}: make one with "
            "lben.data.Dataset.from_tensors"
        )
    with processes(config.device) as team:
        folder = Path(config.out)
        checkpoints.check_folder(folder, checkpoints.RUN, fresh=not (resume or overwrite))
        if resume:
            _check_same_data(folder, data)
        run = _start(config, team, data)
        done = _open(run, resume)
        try:
            _fit(run, done)
        except KeyboardInterrupt:
            raise Interrupted(
                f"interrupted; the last checkpoint is whole, continue with `lben resume "
                f"{run.folder}`"
            ) from None
        if run.ema is not None:
            run.ema.copy_to(run.model)
        if team.first:
            checkpoints.save_model(run.folder, run.model)
            certificate = run.model.eval().certificate()
            checkpoints.write_json(run.folder / checkpoints.CERTIFICATE, certificate)
        team.wait()
        return run.model.eval()


def resume(
    folder: Path | str, data: Dataset | None = None, *, root: str | None = None
) -> Classifier:
    """Continue the run in a folder with the configuration stored there.

    Args:
        folder: of the run.
        data: those of your own that the run was started with; None if it was started without.
        root: another place of the data files, if they have moved.

    Returns:
        The trained model, as `train` returns it.

    Raises:
        CheckpointError: if the folder holds no run, or none of these data, or is damaged.
        DataError, Interrupted: as `train` does.

    Example:
        >>> import tempfile
        >>> from lben.models import EquilibriumArchitecture
        >>> from lben.training import TrainingConfig
        >>> folder = tempfile.mkdtemp()
        >>> model = EquilibriumArchitecture(hidden=4)
        >>> config = TrainingConfig(model=model, epochs=1, batch_size=500, out=folder)
        >>> trained, again = train(config), resume(folder)  # is done: the same weights
        >>> torch.equal(trained.layer.parameterization.C, again.layer.parameterization.C)
        True
    """
    model, record = checkpoints.load_config(folder)
    record.pop(OWN_DATA, None)
    try:
        config = read(record, model)
    except (TypeError, ValueError) as error:
        raise checkpoints.CheckpointError(
            f"{Path(folder) / checkpoints.CONFIG} lacks a field or has one too many: {error}"
        ) from error
    moved = replace(config, out=str(folder), root=root or config.root)
    return train(moved, data, resume=True)


OWN_DATA = "own_data"
"""Key in config.json of the name and fingerprint of a data set that was given to `train`."""


def _record(config: TrainingConfig[Architecture], own: Dataset | None) -> dict[str, Any]:
    """Return the training configuration of a run, without its model, for config.json."""
    record = encode(config)
    del record["model"]
    if own is not None:
        for name in ("data", "root", "download"):
            del record[name]
        record[OWN_DATA] = {"name": own.name, "fingerprint": own.fingerprint}
    return record


def _check_same_data(folder: Path, own: Dataset | None) -> None:
    """Refuse to continue a run on other data than it was started with.

    Raises:
        CheckpointError: saying which data are expected.
    """
    _, record = checkpoints.load_config(folder)
    stored = record.get(OWN_DATA)
    if stored is None and own is not None:
        raise checkpoints.CheckpointError(
            f"{folder} holds a run on {record.get('data')}, which it reads itself: continue it "
            "without data of your own"
        )
    if stored is None:
        return
    wanted = f"{stored['name']!r}, fingerprint {stored['fingerprint'][:12]}…"
    if own is None:
        raise checkpoints.CheckpointError(
            f"{folder} holds a run on data of your own ({wanted}), which it does not keep: "
            "continue it in Python with lben.training.resume(folder, data)"
        )
    if own.fingerprint != stored["fingerprint"]:
        raise checkpoints.CheckpointError(
            f"{folder} holds a run on other data: expected {wanted}, got {own.name!r}, fingerprint "
            f"{own.fingerprint[:12]}…. Give the very tensors and statistics that it was started "
            "with, in the same order, or train anew"
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Run:
    """The model, data, optimizer and processes of one run."""

    config: TrainingConfig[Architecture]
    team: Processes
    data: Dataset
    own_data: bool
    model: Classifier
    replica: nn.Module
    optimizer: torch.optim.Optimizer
    ema: EMA | None

    @property
    def folder(self) -> Path:
        return Path(self.config.out)

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.data.train_labels) / self.config.batch_size)

    def save(self, epoch: int) -> None:
        checkpoints.save_training(self.folder, self.model, self.optimizer, epoch, self.ema)


def _start(config: TrainingConfig[Architecture], team: Processes, own: Dataset | None) -> _Run:
    data = own
    if data is None:
        with team.in_turn():  # the first process downloads
            data = load(config.data, config.root, download=config.download)
    config.check(data)
    team.check_batches(len(data.train_labels), config.batch_size)
    torch.manual_seed(config.seed)
    model = config.model.for_data(data).build().to(team.device)
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return _Run(
        config=config,
        team=team,
        data=data,
        own_data=own is not None,
        model=model,
        replica=team.replicate(model),
        optimizer=config.optimizer.build(model),
        ema=None if config.ema is None else EMA(model, config.ema),
    )


def _open(run: _Run, resume: bool) -> int:
    """Prepare the folder and return the number of epochs that it holds."""
    folder, done = run.folder, 0
    if resume:
        done = checkpoints.load_training(folder, run.model, run.optimizer, run.ema)
    _try(run)
    run.team.wait()  # no process writes before all processes have read the folder
    if run.team.first:
        if not resume:
            with checkpoints.open_folder(folder):
                own = run.data if run.own_data else None
                checkpoints.save_config(folder, run.model.config, _record(run.config, own))
                run.save(0)
            for name in (checkpoints.METRICS, checkpoints.MODEL, checkpoints.CERTIFICATE):
                (folder / name).unlink(missing_ok=True)  # of the former run in this folder
        _trim_metrics(folder, done)
    return done


@torch.no_grad()
def _try(run: _Run) -> None:
    """Evaluate the loss of one image, so that misfits are refused before anything is written."""
    run.model.eval()
    x, y = pixels(run.data.train_images[:1]), run.data.train_labels[:1]
    run.config.loss(run.model(x.to(run.team.device)).float(), y.to(run.team.device))


def _fit(run: _Run, done: int) -> None:
    config, team, device = run.config, run.team, run.team.device
    images, labels = run.data.train_images.to(device), run.data.train_labels.to(device)
    labels = check_labels(torch.empty(len(labels), run.data.classes, device="meta"), labels)
    total = config.epochs * run.steps_per_epoch
    writer = _tensorboard(run.folder) if team.first else None
    progress = Progress(
        total, f"train {run.data.name}", "steps", team.quiet, initial=done * run.steps_per_epoch
    )
    with progress:
        for epoch in range(done, config.epochs):
            started = time.perf_counter()
            run.model.train()
            loss_sum = torch.zeros((), device=device)
            correct = torch.zeros((), dtype=torch.long, device=device)
            for step, (x, y) in enumerate(_batches(images, labels, config, epoch)):
                share = config.schedule(epoch * run.steps_per_epoch + step, total)
                for group in run.optimizer.param_groups:
                    group["lr"] = config.lr * share
                for loss, hits in _step(run, x, y):
                    loss_sum += loss
                    correct += hits
                progress.update()
            loss_sum, correct = team.total(loss_sum), team.total(correct)
            if not team.first:
                continue
            metrics = {
                "epoch": epoch + 1,
                "loss": float(loss_sum) / len(images),
                "train_error_percent": 100 * (1 - int(correct) / len(images)),
                "test_error_percent": 100 * _test_error(run),
                "seconds": round(time.perf_counter() - started, 2),
            }
            progress.note(test_error=f"{metrics['test_error_percent']:.2f}%")
            checkpoints.append_json(run.folder / checkpoints.METRICS, metrics)
            if writer is not None:
                for name, value in metrics.items():
                    writer.add_scalar(name, value, epoch + 1)
            run.save(epoch + 1)
    if writer is not None:
        writer.close()


def _step(run: _Run, x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Move the weights once; return the sum of losses and the number of hits of every part.

    Every process takes its share of the batch, and splits the share into parts. Each part gets a
    forward and a backward pass. The factor of its loss makes the sum over all parts and processes
    the gradient of the mean loss of the batch.
    """
    config, team = run.config, run.team
    parts = list(zip(*(team.share(t).chunk(config.accumulate) for t in (x, y)), strict=True))
    seen = []
    run.optimizer.zero_grad(set_to_none=True)
    for index, (x_part, y_part) in enumerate(parts):
        last = index == len(parts) - 1
        with nullcontext() if last else without_synchronisation(run.replica):
            with torch.autocast(x.device.type, torch.bfloat16, enabled=config.autocast):
                logits = run.replica(x_part)
            loss = config.loss(logits.float(), y_part)
            (loss * (len(y_part) * team.count / len(y))).backward()
        hits = (logits.detach().argmax(1) == y_part).sum()
        seen.append((loss.detach() * len(y_part), hits))
    run.optimizer.step()
    if run.ema is not None:
        run.ema.update(run.model)
    return seen


def _batches(
    images: Tensor, labels: Tensor, config: TrainingConfig[Architecture], epoch: int
) -> Iterator[tuple[Tensor, Tensor]]:
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    generator = torch.Generator("cpu").manual_seed(config.seed * 1_000_003 + epoch)
    order = torch.randperm(len(images), generator=generator, device="cpu").to(images.device)
    for index in order.split(config.batch_size):
        batch = config.augmentation(images[index], generator)
        yield batch.contiguous(memory_format=layout), labels[index]


def _test_error(run: _Run) -> float:
    with nullcontext() if run.ema is None else run.ema.swap(run.model):
        return error_rate(run.model, run.data)


@torch.no_grad()
def error_rate(model: nn.Module, data: Dataset, batch: int = 2000) -> float:
    """Return the share of test images that the model misclassifies.

    Args:
        model: images in [0, 1] to logits; it is put into eval mode.
        data: the data set of the test images.
        batch: images at once.

    Returns:
        A share in [0, 1].

    Example:
        >>> class Zero(nn.Linear):
        ...     def forward(self, x):
        ...         return torch.eye(2)[torch.zeros(len(x), dtype=torch.long)]
        >>> images, labels = torch.arange(64, dtype=torch.uint8).reshape(4, 1, 4, 4), [0, 1, 1, 1]
        >>> data = Dataset.from_tensors(images, torch.tensor(labels), images, torch.tensor(labels))
        >>> error_rate(Zero(1, 1), data)
        0.75
    """
    model.eval()
    parameter = next(model.parameters())
    wrong = 0
    for x, y in zip(data.test_images.split(batch), data.test_labels.split(batch), strict=True):
        logits = model(pixels(x.to(parameter.device), parameter.dtype))
        wrong += int((logits.argmax(1).cpu() != y).sum())
    return wrong / len(data.test_labels)


def _trim_metrics(folder: Path, done: int) -> None:
    """Drop metrics of epochs that the checkpoint does not hold."""
    path = folder / checkpoints.METRICS
    if path.exists():
        lines = path.read_bytes().splitlines(keepends=True)[:done]
        checkpoints.write_atomically(path, b"".join(lines))


def _tensorboard(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder / checkpoints.TENSORBOARD))

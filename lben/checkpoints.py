"""What is on disk? A folder that survives interruption: every file is whole or absent.

    config.json            model and training configuration, format version
    model.safetensors      parameters of the model
    certificate.json       what was proved about them
    training.safetensors   parameters, their average, optimiser state and position, for resuming
    metrics.jsonl          one JSON object per epoch

Every file is written beside its place and moved there in one step. Nothing is pickled.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lben.models import (
    Classifier,
    ClassifierConfig,
    ConvolutionalEquilibriumClassifierConfig,
    EquilibriumClassifierConfig,
    ResidualClassifierConfig,
)
from lben.optimization import EMA
from lben.records import decode, encode

FORMAT = 1
CONFIG, MODEL, CERTIFICATE = "config.json", "model.safetensors", "certificate.json"
TRAINING, METRICS = "training.safetensors", "metrics.jsonl"
MODELS: dict[str, type[ClassifierConfig]] = {  # what config.json calls them
    "convolutional_equilibrium_classifier": ConvolutionalEquilibriumClassifierConfig,
    "equilibrium_classifier": EquilibriumClassifierConfig,
    "residual_classifier": ResidualClassifierConfig,
}


class CheckpointError(Exception):
    """A checkpoint is missing, truncated, inconsistent or of another version."""


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader finds the old content or the new, never a part."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def save_config(folder: Path, model: ClassifierConfig, training: Mapping[str, Any]) -> None:
    """Write config.json.

    Raises:
        CheckpointError: if no kind of model in `MODELS` is configured like this.
    """
    kind = next((k for k, cls in MODELS.items() if type(model) is cls), None)
    if kind is None:
        raise CheckpointError(f"{type(model).__name__} has no name in lben.checkpoints.MODELS")
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "format": FORMAT,
        "library": "lben",
        "model": {**encode(model), "kind": kind},
        "training": dict(training),
    }
    write_atomically(folder / CONFIG, (json.dumps(config, indent=2) + "\n").encode())


def load_config(folder: Path | str) -> tuple[ClassifierConfig, dict[str, Any]]:
    """Read config.json: the model's configuration and the training's as a dictionary.

    Raises:
        CheckpointError: if it is missing, not JSON, or of another format.
    """
    path = Path(folder) / CONFIG
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(f"no checkpoint in {folder}: {CONFIG} is missing") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is truncated or corrupt: {error}") from error
    _check_format(path, config.get("format") if isinstance(config, dict) else None)
    try:
        kind = config["model"]["kind"]
        if kind not in MODELS:
            raise CheckpointError(f"{path}: unknown kind of model {kind!r}")
        return decode(config["model"], MODELS), dict(config["training"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} lacks a field or has one too many: {error}") from error


def save_model(folder: Path, model: Classifier) -> None:
    """Write model.safetensors."""
    tensors = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    write_atomically(folder / MODEL, save(tensors, metadata={"format": "pt"}))


def load_model(folder: Path | str) -> Classifier:
    """Build the model of a checkpoint and load its parameters, on the CPU, in eval mode.

    Raises:
        CheckpointError: if a file is missing, truncated, of another format, or does not fit.
    """
    folder = Path(folder)
    config, _ = load_config(folder)
    model = config.build()
    tensors, _ = _read(folder / MODEL)
    _load_state(folder / MODEL, model, tensors)
    return model.eval()


def save_training(
    folder: Path,
    model: Classifier,
    optimizer: torch.optim.Optimizer,
    epoch: int,
    ema: EMA | None = None,
) -> None:
    """Write training.safetensors: all that resuming needs, in one file."""
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{k}": torch.as_tensor(v) for k, v in state.items()}
    if ema is not None:
        tensors |= {f"ema.{k}": v for k, v in ema.state_dict().items()}
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    metadata = {"format": str(FORMAT), "epoch": str(epoch)}
    write_atomically(folder / TRAINING, save(tensors, metadata=metadata))


def load_training(
    folder: Path,
    model: Classifier,
    optimizer: torch.optim.Optimizer,
    ema: EMA | None = None,
) -> int:
    """Load model, average and optimiser state in place and return the number of finished epochs.

    Raises:
        CheckpointError: if the file is missing, truncated, of another format, or does not fit.
    """
    path = folder / TRAINING
    tensors, metadata = _read(path)
    _check_format(path, int(metadata.get("format", "0")))
    states: dict[int, dict[str, Tensor]] = {}
    average: dict[str, Tensor] = {}
    for name, value in tensors.items():
        part, _, rest = name.partition(".")
        if part == "ema":
            average[rest] = value
        if part == "optimizer":
            index, _, key = rest.partition(".")
            states.setdefault(int(index), {})[key] = value
    _load_state(path, model, {k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": states, "param_groups": groups})
    if ema is not None:
        try:
            ema.load_state_dict(average)
        except (KeyError, RuntimeError) as error:
            raise CheckpointError(f"{path} holds no average of this model: {error}") from error
    return int(metadata["epoch"])


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or corrupt: {error}") from error


def _load_state(path: Path, model: Classifier, tensors: dict[str, Tensor]) -> None:
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path} does not fit its {CONFIG}: {reason}") from error


def _check_format(path: Path, found: object) -> None:
    if found != FORMAT:
        raise CheckpointError(
            f"{path} has checkpoint format {found}, this version of lben reads format {FORMAT}: "
            "use the version of lben that wrote it, or train again"
        )

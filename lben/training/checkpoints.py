"""Which files does a run write? A folder that survives interruption: every file is whole or absent.

    config.json            model and training configuration, format version
    model.safetensors      parameters of the model
    certificate.json       what was proved about them
    training.safetensors   parameters, their average, optimiser state and position, for resuming
    metrics.jsonl          one JSON object per epoch

Every file is written beside its place and moved there in one step. Text is UTF-8, JSON is strict
(null where a number is not finite), and nothing is pickled.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lben.certificates import CertificateError, ChainCertificate
from lben.models import (
    Classifier,
    ClassifierConfig,
    ConvolutionalEquilibriumClassifierConfig,
    EquilibriumClassifierConfig,
    FeedforwardClassifierConfig,
)
from lben.records import decode, encode, to_json
from lben.training.optimization import EMA

FORMAT = 3
CONFIG, MODEL, CERTIFICATE = "config.json", "model.safetensors", "certificate.json"
TRAINING, METRICS = "training.safetensors", "metrics.jsonl"
TENSORBOARD = "tensorboard"  # a folder
RUN = (TRAINING, MODEL, CONFIG, CERTIFICATE, METRICS, TENSORBOARD)
"""All files that a run writes."""
MODELS: dict[str, type[ClassifierConfig]] = {  # their names in config.json
    "convolutional_equilibrium_classifier": ConvolutionalEquilibriumClassifierConfig,
    "equilibrium_classifier": EquilibriumClassifierConfig,
    "residual_classifier": FeedforwardClassifierConfig,
}


class CheckpointError(Exception):
    """A checkpoint is missing, truncated, inconsistent or of another version."""


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader finds the old content or the new, never a part.

    Args:
        path: of the file.
        content: all of it.

    Raises:
        OSError: if it cannot be written; the old content is then as it was.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)  # a full disk does not say where
        raise
    finally:
        with suppress(OSError):
            partial.unlink()


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON by `lben.records.to_json`; the file is whole or absent.

    Args:
        path: of the file.
        value: a dataclass, or plain values.
    """
    write_atomically(path, (to_json(value) + "\n").encode("utf-8"))


def append_json(path: Path, value: Any) -> None:
    """Add one line of JSON to a file of such lines.

    Args:
        path: of the file.
        value: a dataclass, or plain values.
    """
    with path.open("a", encoding="utf-8") as file:
        file.write(to_json(value, indent=None) + "\n")


def check_folder(folder: Path, names: Sequence[str] = (), *, fresh: bool = False) -> None:
    """Refuse a folder that cannot be made or written to, without touching anything.

    Args:
        folder: the folder to write into.
        names: names of the files to write there.
        fresh: refuse a folder that holds one of these files already.

    Raises:
        CheckpointError: naming the path that is in the way.
    """
    advice = "choose another --out"
    try:
        there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
        if not there.is_dir():
            raise CheckpointError(
                f"cannot write into {folder}: {there} is a file, not a folder; {advice}"
            )
        if not os.access(there, os.W_OK | os.X_OK):
            raise CheckpointError(
                f"cannot write into {folder}: no permission to write in {there}; {advice}"
            )
    except (OSError, ValueError) as error:  # below a file, a name too long, a null character
        if getattr(error, "errno", None) == errno.ENOTDIR:
            raise CheckpointError(
                f"cannot write into {folder}: a part of its path is a file, not a folder; {advice}"
            ) from error
        raise CheckpointError(f"cannot write into {folder}: {error}; {advice}") from error
    for name in names:
        _check_place(folder / name)
        if name != TENSORBOARD:
            _check_place(folder / f"{name}.partial")
    for name in names if fresh else ():
        if os.path.lexists(folder / name):
            what = _OCCUPIED.get(name, _ELSE).format(name=name, folder=folder)
            raise CheckpointError(f"{folder} already holds {what}")


_ELSE = "{name}, which this run would replace: move it away, or choose another --out"
_OCCUPIED = {
    TRAINING: "a run: continue it with `lben resume {folder}`, or choose another --out",
    MODEL: "a trained model, which this run would replace: choose another --out",
}


def _check_place(path: Path) -> None:
    """Refuse the path of a file or folder at which something of another kind exists."""
    if not os.path.lexists(path):
        return
    wanted, there = (
        ("folder", path.is_dir()) if path.name == TENSORBOARD else ("file", path.is_file())
    )
    advice = "move it away and repeat the command"
    if not there:
        raise CheckpointError(f"cannot write {path}: what is there is no {wanted}; {advice}")
    if not os.access(path, os.W_OK):
        raise CheckpointError(f"cannot write {path}: no permission to write to it; {advice}")


@contextmanager
def open_folder(folder: Path) -> Iterator[None]:
    """Make a folder for the first files of a run; if writing them fails, restore the former state.

    Args:
        folder: of the run.

    Raises:
        CheckpointError: as `check_folder` does.
    """
    check_folder(folder)
    missing = [p for p in (folder, *folder.absolute().parents) if not p.exists()]
    before = set(folder.iterdir()) if folder.exists() else set()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        with suppress(OSError):
            for path in set(folder.iterdir()) - before:
                path.unlink()
            for path in missing:
                path.rmdir()
        raise


def save_config(folder: Path, model: ClassifierConfig, training: Mapping[str, Any]) -> None:
    """Write config.json.

    Args:
        folder: of the run.
        model: configuration of the model.
        training: the training configuration, as plain values.

    Raises:
        CheckpointError: if the class of the configuration has no name in `MODELS`.
    """
    folder = Path(folder)
    kind = next((k for k, cls in MODELS.items() if type(model) is cls), None)
    if kind is None:
        raise CheckpointError(
            f"{type(model).__name__} has no name in lben.training.checkpoints.MODELS"
        )
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "format": FORMAT,
        "library": "lben",
        "model": {**encode(model), "kind": kind},
        "training": dict(training),
    }
    write_json(folder / CONFIG, config)


def load_config(folder: Path | str) -> tuple[ClassifierConfig, dict[str, Any]]:
    """Return the model's configuration and the training's, as a dictionary, from config.json.

    Args:
        folder: of the run.

    Raises:
        CheckpointError: if it is missing, not JSON, or of another format.
    """
    path = Path(folder) / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(
            f"no checkpoint in {folder}: {CONFIG} is missing; give the folder that "
            "`lben train --out` wrote"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is truncated or corrupt: {error}") from error
    _check_format(path, config.get("format") if isinstance(config, dict) else None)
    try:
        kind = config["model"]["kind"]
        if kind not in MODELS:
            raise CheckpointError(f"{path}: unknown kind of model {kind!r}")
        return decode(config["model"], MODELS), dict(config["training"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} lacks a field or has one too many, or one of another kind: {error}"
        ) from error


def save_model(folder: Path, model: Classifier) -> None:
    """Write model.safetensors, in the dtypes of the model.

    Args:
        folder: of the run.
        model: that is saved.
    """
    tensors = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    write_atomically(Path(folder) / MODEL, save(tensors, metadata={"format": "pt"}))


def load_model(folder: Path | str, device: torch.device | str = "cpu") -> Classifier:
    """Return the model of a checkpoint with its parameters, in eval mode.

    Every parameter and buffer has the dtype that it was saved with.

    Args:
        folder: of the run.
        device: device of the model.

    Raises:
        CheckpointError: if a file is missing, truncated, of another format, or does not fit.
    """
    folder = Path(folder)
    config, _ = load_config(folder)
    tensors, _ = _read(folder / MODEL)
    try:
        model = config.build()
    except ValueError as error:
        raise CheckpointError(f"{folder / CONFIG} configures no model: {error}") from error
    _load_state(folder / MODEL, model, tensors)
    return model.to(device).eval()


def certificate_doubts(folder: Path | str, proved: ChainCertificate) -> str | None:
    """Return what contradicts certificate.json, given a new proof of the model beside it.

    Args:
        folder: of the run.
        proved: of the model, just now.

    Returns:
        None if the file exists, is about this model, and claims nothing that is not proved; else
        one sentence that names the difference.
    """
    stored = _read_certificate(Path(folder) / CERTIFICATE, proved)
    if isinstance(stored, str):
        return stored
    shortfall = proved.shortfall(stored)
    return f"{Path(folder) / CERTIFICATE} is of this model, but {shortfall}" if shortfall else None


def prove_again(folder: Path | str, model: Classifier) -> tuple[ChainCertificate, str | None]:
    """Prove the claims of certificate.json, by the cheapest bound of the model that suffices.

    Rounding differs from machine to machine. If a claim is missed by no more than this difference,
    the bounds that were proved here replace those of the file.

    Args:
        folder: of the run.
        model: of the run.

    Returns:
        The certificate that was proved, and its `certificate_doubts`. If no bound of the model
        proves all claims of the file, the certificate is that of the most expensive bound.

    Raises:
        CertificateError: if not even the promised bound can be proved.
    """
    proved = model.certificate()
    stored = _read_certificate(Path(folder) / CERTIFICATE, proved)
    if isinstance(stored, ChainCertificate):
        for bound in model.bounds:
            if bound != "promised" and proved.shortfall(stored, _MACHINES):
                with suppress(CertificateError):  # may fail where a cheaper one holds
                    proved = model.certificate(bound=bound)
        if proved.shortfall(stored) and not proved.shortfall(stored, _MACHINES):
            write_json(Path(folder) / CERTIFICATE, proved)
    return proved, certificate_doubts(folder, proved)


_MACHINES = 1e-6
"""Relative difference that one proof may have between machines and numbers of threads."""


def _read_certificate(path: Path, proved: ChainCertificate) -> ChainCertificate | str:
    """Return the certificate of a file, or why it is not about the network that was proved."""
    try:
        stored = ChainCertificate.from_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"{path} is missing"
    except (OSError, ValueError) as error:
        return f"{path} cannot be read: {error}"
    differing = stored.differences(proved)
    return f"{path} is of another model: {differing}" if differing else stored


def save_training(
    folder: Path,
    model: Classifier,
    optimizer: torch.optim.Optimizer,
    epoch: int,
    ema: EMA | None = None,
) -> None:
    """Write training.safetensors: one file with everything that resuming reads.

    Args:
        folder: of the run.
        model: in training.
        optimizer: with its state.
        epoch: number of finished epochs.
        ema: average of the weights, if there is one.
    """
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
    """Load model, average and optimiser state in place; return the number of finished epochs.

    Args:
        folder: of the run.
        model: that gets the parameters.
        optimizer: that gets the state.
        ema: average that gets the weights, if there is one.

    Raises:
        CheckpointError: if the file is missing, truncated, of another format, or does not fit.
    """
    path = folder / TRAINING
    tensors, metadata = _read(path)
    _check_format(path, int(metadata["format"]) if metadata.get("format") == str(FORMAT) else None)
    epoch = metadata.get("epoch", "")
    if not epoch.isdecimal():
        raise CheckpointError(f"{path} does not say which epoch it holds: it is not of a run")
    states: dict[int, dict[str, Tensor]] = {}
    average: dict[str, Tensor] = {}
    for name, value in tensors.items():
        part, _, rest = name.partition(".")
        if part == "ema":
            average[rest] = value
        if part == "optimizer":
            index, _, key = rest.partition(".")
            states.setdefault(int(index) if index.isdecimal() else -1, {})[key] = value
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, state in states.items():
        shape = parameters[number].shape if 0 <= number < len(parameters) else None
        if any(value.ndim and value.shape != shape for value in state.values()) or shape is None:
            raise CheckpointError(f"{path} holds the state of another optimizer or model")
    _load_state(path, model, {k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": states, "param_groups": groups})
    if ema is not None:
        try:
            ema.load_state_dict(average)
        except (KeyError, RuntimeError) as error:
            raise CheckpointError(f"{path} holds no average of this model: {error}") from error
    return int(epoch)


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
    """Give a model the tensors of a file, in their own dtypes."""
    own = model.state_dict(keep_vars=True)
    wrong = sorted(
        name
        for name, tensor in tensors.items()
        if name in own and own[name].is_floating_point() != tensor.is_floating_point()
    )
    if wrong:
        raise CheckpointError(
            f"{path} does not fit its {CONFIG}: {wrong[0]} is {tensors[wrong[0]].dtype}"
        )
    floating = [tensors[k].dtype for k, _ in model.named_parameters() if k in tensors]
    if len(set(floating)) == 1:
        model.to(floating[0])  # also tensors that the file does not hold
    for name, tensor in own.items():
        if name in tensors:
            tensor.data = tensor.data.to(tensors[name].dtype)
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

"""Which model and which inputs are in the files that a user names? No code of a file is run."""

from __future__ import annotations

import math
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import cast, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lben.data import DataError, DatasetName, load, pixels
from lben.interop import from_onnx, load_checkpoint
from lben.models import Classifier
from lben.training import checkpoints
from lben.weights.network import Network

_PROGRAM = ".pt2"


@dataclass(frozen=True, kw_only=True, eq=False)
class Samples:
    """Inputs with their labels.

    Attributes:
        name: of the data set or file.
        inputs: as the model takes them.
        labels: int64, one per input.
        available: how many there are in the data; inputs may be the first of them.

    Example:
        >>> from lben.evaluation import read_samples
        >>> samples = read_samples("digits", count=5, shape=(64,))
        >>> samples.inputs.shape, samples.labels.shape, samples.available
        (torch.Size([5, 64]), torch.Size([5]), 360)
    """

    name: str
    inputs: Float[Tensor, "samples ..."]
    labels: Int[Tensor, " samples"]
    available: int


def read_model(path: Path | str) -> nn.Module | Network:
    """Return the model of a folder of `lben train`, an ONNX file or a checkpoint.

    Args:
        path: a folder; an .onnx file; a .safetensors file, or a file of torch.save with tensors by
            name, of a layout that `load_checkpoint` knows.

    Raises:
        FileNotFoundError: if there is neither file nor folder.
        ValueError: if a file is truncated, wants to run code, or is of no known layout.
        CheckpointError: if a folder holds no model.
        ImportError: if onnx is needed and not installed.

    Example:
        >>> from lben.evaluation import read_model
        >>> read_model("model.onnx")
        Traceback (most recent call last):
        ...
        FileNotFoundError: there is no file or folder model.onnx
    """
    place = Path(path)
    if place.is_dir():
        return checkpoints.load_model(place)
    if not place.exists():
        raise FileNotFoundError(f"there is no file or folder {place}")
    if place.suffix == ".onnx":
        return from_onnx(place)
    if place.suffix == _PROGRAM:
        raise ValueError(
            f"{place} is a program of torch.export, and reading it can run code: where you trust "
            "it, call certified_radius(torch.export.load(path).module(), x, labels) in Python, or "
            "save the model as ONNX"
        )
    return load_checkpoint(place)


def find_shape(model: nn.Module | Network) -> tuple[int, ...] | None:
    """Return the shape of one input of a model, None where the model leaves sizes open.

    Args:
        model: as `read_model` returns it.
    """
    if isinstance(model, Network):
        return model.input_shape
    shape = model.shape if isinstance(model, Classifier) else getattr(model, "sample_shape", None)
    return None if shape is None or None in shape else tuple(shape)


def read_samples(
    data: str,
    root: str | None = None,
    *,
    count: int | None = None,
    shape: tuple[int, ...] | None = None,
) -> Samples:
    """Return test images of a data set, or the inputs of an .npz file, with their labels.

    Args:
        data: digits, mnist or cifar10, whose pixels are scaled to [0, 1]; or an .npz file with the
            arrays `images` (samples first; uint8, scaled to [0, 1], or floating point, taken as it
            is) and `labels` (integers).
        root: folder of the files of mnist or cifar10.
        count: how many, from the first one on; all when omitted.
        shape: of one input of the model: an image is flattened, or a vector made an image.

    Raises:
        DataError: if a file is missing, truncated, or has other arrays; or the shape does not fit.
        ValueError: if the count is not positive.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import numpy as np
        >>> from lben.evaluation import read_samples
        >>> path = Path(tempfile.mkdtemp()) / "mine.npz"
        >>> np.savez(path, images=np.full((3, 2, 2), 255, dtype=np.uint8), labels=np.arange(3))
        >>> read_samples(str(path), shape=(4,)).inputs[0].tolist()
        [1.0, 1.0, 1.0, 1.0]
    """
    if count is not None and count < 1:
        raise ValueError(f"samples must be positive, got {count}")
    if data in get_args(DatasetName):
        found = load(cast(DatasetName, data), root)
        name, images, labels = found.name, pixels(found.test_images), found.test_labels
    elif data.endswith(".npz"):
        name, (images, labels) = Path(data).name, _read_arrays(Path(data))
    else:
        raise DataError(
            f"data must be {', '.join(get_args(DatasetName))} or an .npz file, got {data!r}"
        )
    available = len(images)
    return Samples(
        name=name, inputs=_fit(images[:count], shape), labels=labels[:count], available=available
    )


def _read_arrays(path: Path) -> tuple[Tensor, Tensor]:
    if not path.is_file():
        raise DataError(f"there is no file {path}")
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
    except (zipfile.BadZipFile, ValueError, OSError, EOFError) as error:
        raise DataError(
            f"{path} is no complete .npz file of plain arrays ({error}): write it by "
            "numpy.savez(path, images=..., labels=...)"
        ) from error
    if missing := {"images", "labels"} - set(found):
        raise DataError(
            f"{path} must have the arrays images and labels, it lacks "
            f"{' and '.join(sorted(missing))} and has {', '.join(sorted(found)) or 'none'}"
        )
    images, labels = found["images"], found["labels"]
    if images.dtype not in (np.uint8, np.float32, np.float64) or images.ndim < 2 or not len(images):
        raise DataError(
            f"{path}: images must be samples first, of uint8, float32 or float64, got "
            f"{images.dtype} of shape {images.shape}"
        )
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
        raise DataError(
            f"{path}: labels must be {len(images)} integers, got {labels.dtype} of shape "
            f"{labels.shape}"
        )
    inputs = torch.from_numpy(images)
    if images.dtype == np.uint8:
        inputs = pixels(inputs)
    return inputs, torch.from_numpy(labels.astype(np.int64))


def _fit(inputs: Tensor, shape: tuple[int, ...] | None) -> Tensor:
    """Return inputs in the shape that a model takes, if only a flattening is between them."""
    own = tuple(inputs.shape[1:])
    if shape is None or own == shape:
        return inputs
    channel = len(shape) == len(own) + 1 and shape == (1, *own)
    if math.prod(own) == math.prod(shape) and (1 in (len(own), len(shape)) or channel):
        return inputs.reshape(-1, *shape)
    raise DataError(
        f"the model takes inputs of shape {shape}, and the data have {own}: choose the data that "
        "the model was trained on"
    )

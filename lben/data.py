"""Where do images come from? Verified files to uint8 tensors; nothing is downloaded unasked.

The digits inside scikit-learn are the embedded default. MNIST is read from its IDX files, CIFAR-10
from its binary or its python batches. Every failure is one line: which file, what was expected,
how to get it.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import os
import pickle
import shutil
import struct
import tarfile
import urllib.error
import urllib.request
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from lben.values import conform

DatasetName = Literal["digits", "mnist", "cifar10"]


class DataError(Exception):
    """A data file is missing, truncated or corrupt."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Dataset:
    """Images of one data set with its fixed train and test split; also one of your own.

    Attributes:
        name: of the data set.
        train_images, test_images: uint8, samples × channels × height × width.
        train_labels, test_labels: in [0, classes); integers of any type, kept as int64.
        classes: number of classes.
        mean, std: per channel, of pixels scaled to [0, 1], on the training images.

    Raises:
        ValueError: naming what does not fit.
    """

    name: str
    train_images: UInt8[Tensor, "n c h w"]
    train_labels: Int[Tensor, " n"]
    test_images: UInt8[Tensor, "m c h w"]
    test_labels: Int[Tensor, " m"]
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        conform(self)
        if self.classes < 2:
            raise ValueError(f"classes must be at least 2, got {self.classes}")
        for part in ("train", "test"):
            images, labels = getattr(self, f"{part}_images"), getattr(self, f"{part}_labels")
            _check_images(f"{part}_images", images)
            labels = _checked_labels(f"{part}_labels", labels, len(images), self.classes)
            object.__setattr__(self, f"{part}_labels", labels)
        if self.test_images.shape[1:] != self.train_images.shape[1:]:
            raise ValueError(
                f"train_images are {tuple(self.train_images.shape[1:])}, "
                f"test_images {tuple(self.test_images.shape[1:])}: they must have one shape"
            )
        for name in ("mean", "std"):
            numbers, channels = getattr(self, name), self.train_images.shape[1]
            if len(numbers) != channels or not all(map(math.isfinite, numbers)):
                raise ValueError(
                    f"{name} must be one finite number for each of {channels} channels, "
                    f"got {numbers}"
                )
        if not min(self.std) > 0:
            raise ValueError(f"std must be positive, got {self.std}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        c, h, w = self.train_images.shape[1:]
        return (c, h, w)


def pixels(images: UInt8[Tensor, "*shape"], dtype: torch.dtype = torch.float32) -> Tensor:
    """Return images scaled to [0, 1].

    Raises:
        ValueError: unless they are uint8.
    """
    if images.dtype != torch.uint8:
        raise ValueError(
            f"pixels scales uint8 images to [0, 1], got {images.dtype}: floats in [0, 1] are pixels"
        )
    return images.to(dtype) / 255


def _check_images(name: str, images: Tensor) -> None:
    if not isinstance(images, Tensor) or images.dtype != torch.uint8:
        kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(
            f"{name} must be a uint8 Tensor with values from 0 to 255, got {kind}: make one of "
            "floats in [0, 1] by x.mul(255).round().to(torch.uint8), of an array by "
            "torch.from_numpy"
        )
    if images.ndim != 4 or 0 in images.shape[1:]:
        raise ValueError(
            f"{name} must be samples × channels × height × width, got {tuple(images.shape)}"
        )


def _checked_labels(name: str, labels: Tensor, samples: int, classes: int) -> Tensor:
    whole = isinstance(labels, Tensor) and not (labels.is_floating_point() or labels.is_complex())
    if not whole or labels.shape != (samples,):
        kind = (
            f"{tuple(labels.shape)} {labels.dtype}"
            if isinstance(labels, Tensor)
            else repr(type(labels).__name__)
        )
        raise ValueError(f"{name} must be a Tensor of {samples} integers, got {kind}")
    labels = labels.to(torch.int64)
    if samples and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(
            f"{name} must lie in [0, {classes}), got values from {int(labels.min())} to "
            f"{int(labels.max())}"
        )
    return labels


def load(name: DatasetName, root: Path | str | None = None, *, download: bool = False) -> Dataset:
    """Load a data set.

    Args:
        name: "digits" (embedded), "mnist" or "cifar10".
        root: folder with the files, in torchvision's layout or directly; not for digits.
        download: fetch missing files from their home into `root`, checked by MD5.

    Raises:
        DataError: if a file is missing, truncated or corrupt, or a download fails.
    """
    if name == "digits":
        return _digits()
    if name not in ("mnist", "cifar10"):
        raise DataError(f"data must be digits, mnist or cifar10, got {name!r}")
    if root is None:
        raise DataError(f"{name} is read from files: give the folder that holds them (--root)")
    folder = Path(root)
    if not folder.is_dir() and not download:
        raise DataError(
            f"missing {'train-images-idx3-ubyte' if name == 'mnist' else 'data_batch_1'}: there is "
            f"no folder {folder}; give the folder that holds {name} (--root), or --download"
        )
    return _mnist(folder, download) if name == "mnist" else _cifar10(folder, download)


def _digits() -> Dataset:
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(np.rint(data.images * (255 / 16)).astype(np.uint8))[:, None]
    labels = torch.from_numpy(data.target.astype(np.int64))
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(images)))
    train, test = order[:1437], order[1437:]
    return _with_statistics("digits", images[train], labels[train], images[test], labels[test])


def _with_statistics(
    name: DatasetName, train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor
) -> Dataset:
    scaled = pixels(train, torch.float64)
    return Dataset(
        name=name,
        train_images=train,
        train_labels=train_labels,
        test_images=test,
        test_labels=test_labels,
        classes=10,
        mean=tuple(round(float(v), 4) for v in scaled.mean((0, 2, 3))),
        std=tuple(round(float(v), 4) for v in scaled.std((0, 2, 3))),
    )


# --- MNIST -----------------------------------------------------------------------------------

_MNIST_HOME = "https://ossci-datasets.s3.amazonaws.com/mnist/"
_MNIST_MD5 = {
    "train-images-idx3-ubyte": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte": "ec29112dd5afa0611ce80d1b7f02629c",
}
_MNIST_COUNT = {"train": 60000, "t10k": 10000}


def _mnist(root: Path, download: bool) -> Dataset:
    folders = (root / "MNIST" / "raw", root / "raw", root)
    parts = []
    for stem in _MNIST_MD5:
        candidates = [f / (stem + suffix) for f in folders for suffix in ("", ".gz")]
        path = next((c for c in candidates if c.is_file()), None)
        if path is None and download:
            path = folders[0] / f"{stem}.gz"
            fetch(_MNIST_HOME + path.name, path, _MNIST_MD5[stem])
        if path is None:
            raise DataError(
                f"missing {stem}[.gz] under {root}: expected an IDX file of MNIST in it, in raw/ "
                f"or in MNIST/raw/; get it with --download or from {_MNIST_HOME}"
            )
        samples = _MNIST_COUNT[stem.split("-")[0]]
        shape = (samples, 28, 28) if "images" in stem else (samples,)
        parts.append(torch.from_numpy(read_idx(path, shape)))
    train, train_labels, test, test_labels = parts
    for labels, stem in ((train_labels, "train"), (test_labels, "t10k")):
        if int(labels.max()) > 9:
            raise DataError(f"corrupt {stem}-labels: labels above 9; get the file again")
    return Dataset(
        name="mnist",
        train_images=train[:, None],
        train_labels=train_labels.long(),
        test_images=test[:, None],
        test_labels=test_labels.long(),
        classes=10,
        mean=(0.1307,),
        std=(0.3081,),
    )


def read_idx(path: Path, shape: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Read an IDX file of unsigned bytes, gzipped or not, that must have this shape.

    Raises:
        DataError: if the file is not what it should be.
    """
    advice = "the file is truncated or corrupt; delete it and get it again (--download)"
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {path}: {error}; {advice}") from error
    header = 4 + 4 * len(shape)
    expected = struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape)
    if raw[:header] != expected:
        raise DataError(f"{path}: expected an IDX header for {shape} unsigned bytes; {advice}")
    size = int(np.prod(shape))
    if len(raw) != header + size:
        raise DataError(
            f"{path}: expected {header + size} bytes unpacked, got {len(raw)}; {advice}"
        )
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape).copy()


# --- CIFAR-10 --------------------------------------------------------------------------------

_CIFAR_HOME = "https://www.cs.toronto.edu/~kriz/"
_CIFAR_ARCHIVE = ("cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530")
_CIFAR_BATCHES = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]


def _cifar10(root: Path, download: bool) -> Dataset:
    binary, python = "cifar-10-batches-bin", "cifar-10-batches-py"
    readers = [
        (root / binary, ".bin", _read_cifar_binary),
        (root / python, "", _read_cifar_python),
        (root, ".bin", _read_cifar_binary),
        (root, "", _read_cifar_python),
    ]

    def find() -> Any:
        return next((r for r in readers if any((r[0] / (b + r[1])).is_file()
                     for b in _CIFAR_BATCHES)), None)  # fmt: skip

    found = find()
    if found is None and download:
        name, md5 = _CIFAR_ARCHIVE
        fetch(_CIFAR_HOME + name, root / name, md5)
        with tarfile.open(root / name) as archive:
            archive.extractall(root, filter="data")
        found = find()
    if found is None:
        raise DataError(
            f"no CIFAR-10 batches under {root}: expected {binary}/data_batch_1.bin … or "
            f"{python}/data_batch_1 …; get them with --download or from {_CIFAR_HOME}cifar.html"
        )
    folder, suffix, read = found
    images, labels = [], []
    for batch in _CIFAR_BATCHES:
        path = folder / (batch + suffix)
        if not path.is_file():
            raise DataError(f"missing {path}: expected six batches of CIFAR-10; get it again")
        x, y = read(path)
        if int(y.max()) > 9:
            raise DataError(f"{path} is corrupt: labels above 9; get it again")
        images.append(torch.from_numpy(x))
        labels.append(torch.from_numpy(y))
    return Dataset(
        name="cifar10",
        train_images=torch.cat(images[:5]),
        train_labels=torch.cat(labels[:5]),
        test_images=images[5],
        test_labels=labels[5],
        classes=10,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
    )


def _read_cifar_binary(path: Path) -> tuple[Any, Any]:
    raw = np.frombuffer(path.read_bytes(), np.uint8)
    if raw.size != 10000 * 3073:
        raise DataError(
            f"{path}: expected {10000 * 3073} bytes (10,000 records of 3,073), got {raw.size}; "
            "the file is truncated or corrupt; get it again"
        )
    records = raw.reshape(10000, 3073)
    return records[:, 1:].reshape(-1, 3, 32, 32).copy(), records[:, 0].astype(np.int64)


class _ArraysOnly(pickle.Unpickler):
    """Unpickles lists, dictionaries, bytes and numpy arrays, and refuses everything else."""

    _allowed = frozenset(
        (module, name)
        for module in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray")
        for name in ("ndarray", "dtype", "_reconstruct")
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        if (module, name) not in self._allowed:
            raise pickle.UnpicklingError(f"refused to load {module}.{name}")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def _read_cifar_python(path: Path) -> tuple[Any, Any]:
    try:
        with path.open("rb") as file:
            batch = _ArraysOnly(file, encoding="bytes").load()
        x, y = np.asarray(batch[b"data"]), np.asarray(batch[b"labels"], dtype=np.int64)
        if x.shape != (10000, 3072) or x.dtype != np.uint8 or y.shape != (10000,):
            raise ValueError(f"data {x.dtype} {x.shape}, labels {y.shape}")
    except (pickle.UnpicklingError, EOFError, ValueError, KeyError, TypeError, AttributeError,
            ImportError, IndexError) as error:  # fmt: skip
        raise DataError(
            f"{path}: expected a python batch of CIFAR-10 (10,000 × 3,072 bytes and labels): "
            f"{error}; the file is truncated or corrupt; get it again"
        ) from error
    return x.reshape(-1, 3, 32, 32), y


# --- downloads -------------------------------------------------------------------------------


def fetch(url: str, path: Path, md5: str) -> None:
    """Download a file and put it in place only when its MD5 is the published one.

    Raises:
        DataError: if the download fails or the checksum differs; nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        with urllib.request.urlopen(url, timeout=60) as response, partial.open("wb") as file:
            shutil.copyfileobj(response, file)
        found = hashlib.md5(partial.read_bytes()).hexdigest()
        if found != md5:
            raise DataError(f"{url}: expected MD5 {md5}, got {found}; try again")
        os.replace(partial, path)
    except (urllib.error.URLError, OSError) as error:
        raise DataError(f"cannot download {url}: {error}; put the file at {path}") from error
    finally:
        partial.unlink(missing_ok=True)

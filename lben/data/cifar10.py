"""How is CIFAR-10 read? From its binary or its python batches; no code in them is run."""

from __future__ import annotations

import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lben.data.base import DataError, Dataset
from lben.data.files import fetch

_HOME = "https://www.cs.toronto.edu/~kriz/"
_ARCHIVE = ("cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530")
_BATCHES = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]


def read_cifar10(root: Path, download: bool = False) -> Dataset:
    """Return CIFAR-10, read from its six binary batches or its six python batches.

    Args:
        root: folder with the batches, or with the folder that its archive unpacks to.
        download: fetch and unpack the archive into root where there are none.

    Returns:
        50,000 training and 10,000 test images.

    Raises:
        DataError: if a file is missing, truncated or corrupt, or a download fails.
    """
    binary, python = "cifar-10-batches-bin", "cifar-10-batches-py"
    readers = [
        (root / binary, ".bin", _read_binary),
        (root / python, "", _read_python),
        (root, ".bin", _read_binary),
        (root, "", _read_python),
    ]

    def find() -> Any:
        return next((r for r in readers if any((r[0] / (b + r[1])).is_file()
                     for b in _BATCHES)), None)  # fmt: skip

    found = find()
    if found is None and download:
        name, md5 = _ARCHIVE
        fetch(_HOME + name, root / name, md5)
        with tarfile.open(root / name) as archive:
            archive.extractall(root, filter="data")
        found = find()
    if found is None:
        raise DataError(
            f"no CIFAR-10 batches under {root}: expected {binary}/data_batch_1.bin … or "
            f"{python}/data_batch_1 …; get them with --download or from {_HOME}cifar.html"
        )
    folder, suffix, read = found
    images, labels = [], []
    for batch in _BATCHES:
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


def _read_binary(path: Path) -> tuple[Any, Any]:
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


def _read_python(path: Path) -> tuple[Any, Any]:
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

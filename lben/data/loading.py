"""Which data sets have a name? `load` reads them; nothing is downloaded unasked."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lben.data.base import DataError, Dataset
from lben.data.cifar10 import read_cifar10
from lben.data.digits import read_digits
from lben.data.mnist import read_mnist

DatasetName = Literal["digits", "mnist", "cifar10"]


def load(name: DatasetName, root: Path | str | None = None, *, download: bool = False) -> Dataset:
    """Return the data set of a name, read from its files.

    Args:
        name: "digits" (embedded), "mnist" or "cifar10".
        root: folder with the files, in torchvision's layout or directly; not for digits.
        download: fetch missing files from their home into `root`, checked by MD5.

    Returns:
        The data set with its training and test images.

    Raises:
        DataError: if a file is missing, truncated or corrupt, or a download fails.

    Example:
        >>> data = load("digits")
        >>> data.shape, data.classes, len(data.train_labels), len(data.test_labels)
        ((1, 8, 8), 10, 1437, 360)
    """
    if name == "digits":
        return read_digits()
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
    return read_mnist(folder, download) if name == "mnist" else read_cifar10(folder, download)

"""How is MNIST read? From its four IDX files, each checked for its header and its length."""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lben.data.base import DataError, Dataset
from lben.data.files import fetch

_HOME = "https://ossci-datasets.s3.amazonaws.com/mnist/"
_MD5 = {
    "train-images-idx3-ubyte": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte": "ec29112dd5afa0611ce80d1b7f02629c",
}
_COUNT = {"train": 60000, "t10k": 10000}


def read_mnist(root: Path, download: bool = False) -> Dataset:
    """Return MNIST, read from its four IDX files, gzipped or not.

    Args:
        root: folder with the files, or with MNIST/raw or raw.
        download: fetch what is missing into MNIST/raw.

    Returns:
        60,000 training and 10,000 test images.

    Raises:
        DataError: if a file is missing, truncated or corrupt, or a download fails.
    """
    folders = (root / "MNIST" / "raw", root / "raw", root)
    parts = []
    for stem in _MD5:
        candidates = [f / (stem + suffix) for f in folders for suffix in ("", ".gz")]
        path = next((c for c in candidates if c.is_file()), None)
        if path is None and download:
            path = folders[0] / f"{stem}.gz"
            fetch(_HOME + path.name, path, _MD5[stem])
        if path is None:
            raise DataError(
                f"missing {stem}[.gz] under {root}: expected an IDX file of MNIST in it, in raw/ "
                f"or in MNIST/raw/; get it with --download or from {_HOME}"
            )
        samples = _COUNT[stem.split("-")[0]]
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
    """Return the bytes of an IDX file, gzipped or not, that must have this shape.

    Args:
        path: of the file; gzipped if it ends in .gz.
        shape: that it must have.

    Returns:
        The bytes, in this shape.

    Raises:
        DataError: if the file is not what it should be.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "labels"
        >>> _ = path.write_bytes(struct.pack(">HBBI", 0, 8, 1, 3) + bytes([7, 2, 1]))
        >>> read_idx(path, (3,))
        array([7, 2, 1], dtype=uint8)
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

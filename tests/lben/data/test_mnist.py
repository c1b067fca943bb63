"""MNIST from its own format: what is read, and what is refused as damaged."""

import gzip
import hashlib
import struct

import numpy as np
import pytest
import torch

from lben.data import DataError, load, mnist, read_idx


def idx(array):
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    return header + array.tobytes()


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A small data set in MNIST's own format."""
    monkeypatch.setattr(mnist, "_COUNT", {"train": 30, "t10k": 20})
    g = np.random.default_rng(0)
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for stem, count in (("train", 30), ("t10k", 20)):
        pictures = g.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = g.integers(0, 10, count, dtype=np.uint8)
        (folder / f"{stem}-images-idx3-ubyte").write_bytes(idx(pictures))
        (folder / f"{stem}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    return tmp_path


def test_mnist_is_read_from_raw_and_gzipped_files(files):
    read = load("mnist", files)
    assert read.train_images.shape == (30, 1, 28, 28)
    assert read.test_labels.dtype == torch.long
    assert (read.mean, read.std) == ((0.1307,), (0.3081,))
    raw = (files / "MNIST" / "raw" / "train-images-idx3-ubyte").read_bytes()[16:]
    assert read.train_images.numpy().tobytes() == raw


def test_a_missing_file_is_named_with_advice(files):
    (files / "MNIST" / "raw" / "t10k-images-idx3-ubyte").unlink()
    with pytest.raises(
        DataError, match=r"missing t10k-images-idx3-ubyte\[\.gz\] under .*--download"
    ):
        load("mnist", files)


def test_a_truncated_file_is_named(files):
    path = files / "MNIST" / "raw" / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match="train-images-idx3-ubyte: expected 23536 bytes unpacked"):
        load("mnist", files)


def test_a_truncated_archive_is_named(files):
    path = files / "MNIST" / "raw" / "train-labels-idx1-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"cannot read .*train-labels.*truncated or corrupt"):
        load("mnist", files)


def test_a_wrong_header_is_named(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"<html>404</html>" * 100)
    with pytest.raises(DataError, match=r"expected an IDX header for \(10,\) unsigned bytes"):
        read_idx(path, (10,))


def test_labels_out_of_range_are_corrupt(files):
    path = files / "MNIST" / "raw" / "t10k-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(idx(np.full(20, 11, dtype=np.uint8))))
    with pytest.raises(DataError, match="corrupt t10k-labels: labels above 9"):
        load("mnist", files)


def test_download_fills_the_folder(files, monkeypatch):
    path = files / "MNIST" / "raw" / "t10k-labels-idx1-ubyte.gz"
    home = files / "home"
    home.mkdir()
    path.rename(home / path.name)
    digest = hashlib.md5((home / path.name).read_bytes()).hexdigest()
    monkeypatch.setattr(mnist, "_HOME", home.as_uri() + "/")
    monkeypatch.setitem(mnist._MD5, "t10k-labels-idx1-ubyte", digest)
    assert len(load("mnist", files, download=True).test_labels) == 20
    assert path.exists()

import gzip
import hashlib
import pickle
import struct
import sys

import numpy as np
import pytest
import torch

from lben import data
from lben.data import DataError, fetch, load, pixels, read_idx


def idx(array):
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    return header + array.tobytes()


@pytest.fixture
def mnist(tmp_path, monkeypatch):
    """A small data set in MNIST's own format."""
    monkeypatch.setattr(data, "_MNIST_COUNT", {"train": 30, "t10k": 20})
    g = np.random.default_rng(0)
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for stem, count in (("train", 30), ("t10k", 20)):
        pictures = g.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = g.integers(0, 10, count, dtype=np.uint8)
        (folder / f"{stem}-images-idx3-ubyte").write_bytes(idx(pictures))
        (folder / f"{stem}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    return tmp_path


def test_digits_are_embedded_and_fixed():
    first, second = load("digits"), load("digits")
    assert first.shape == (1, 8, 8)
    assert (len(first.train_labels), len(first.test_labels)) == (1437, 360)
    assert torch.equal(first.train_images, second.train_images)
    assert int(first.train_images.max()) == 255
    scaled = pixels(first.train_images, torch.float64)
    assert first.mean[0] == pytest.approx(float(scaled.mean()), abs=1e-4)
    assert first.std[0] == pytest.approx(float(scaled.std()), abs=1e-4)


def test_mnist_is_read_from_raw_and_gzipped_files(mnist):
    read = load("mnist", mnist)
    assert read.train_images.shape == (30, 1, 28, 28)
    assert read.test_labels.dtype == torch.long
    assert (read.mean, read.std) == ((0.1307,), (0.3081,))
    raw = (mnist / "MNIST" / "raw" / "train-images-idx3-ubyte").read_bytes()[16:]
    assert read.train_images.numpy().tobytes() == raw


def test_a_missing_file_is_named_with_advice(mnist):
    (mnist / "MNIST" / "raw" / "t10k-images-idx3-ubyte").unlink()
    with pytest.raises(
        DataError, match=r"missing t10k-images-idx3-ubyte\[\.gz\] under .*--download"
    ):
        load("mnist", mnist)


def test_a_truncated_file_is_named(mnist):
    path = mnist / "MNIST" / "raw" / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match="train-images-idx3-ubyte: expected 23536 bytes unpacked"):
        load("mnist", mnist)


def test_a_truncated_archive_is_named(mnist):
    path = mnist / "MNIST" / "raw" / "train-labels-idx1-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"cannot read .*train-labels.*truncated or corrupt"):
        load("mnist", mnist)


def test_a_wrong_header_is_named(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"<html>404</html>" * 100)
    with pytest.raises(DataError, match=r"expected an IDX header for \(10,\) unsigned bytes"):
        read_idx(path, (10,))


def test_labels_out_of_range_are_corrupt(mnist):
    path = mnist / "MNIST" / "raw" / "t10k-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(idx(np.full(20, 11, dtype=np.uint8))))
    with pytest.raises(DataError, match="corrupt t10k-labels: labels above 9"):
        load("mnist", mnist)


def test_data_from_files_needs_a_folder():
    with pytest.raises(DataError, match="mnist is read from files: give the folder"):
        load("mnist")
    with pytest.raises(DataError, match="must be digits, mnist or cifar10, got 'svhn'"):
        load("svhn", ".")


def write_cifar(folder, kind):
    g = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for index, name in enumerate(data._CIFAR_BATCHES):
        pictures = np.full((10000, 3072), index, dtype=np.uint8)
        labels = g.integers(0, 10, 10000)
        if kind == "binary":
            records = np.concatenate([labels[:, None].astype(np.uint8), pictures], 1)
            (folder / f"{name}.bin").write_bytes(records.tobytes())
        else:
            batch = {b"data": pictures, b"labels": labels.tolist()}
            (folder / name).write_bytes(pickle.dumps(batch, protocol=2))


@pytest.mark.parametrize("kind", ["binary", "python"])
def test_cifar_is_read_from_both_formats_and_refused_when_damaged(tmp_path, kind):
    folder = tmp_path / ("cifar-10-batches-bin" if kind == "binary" else "cifar-10-batches-py")
    write_cifar(folder, kind)
    read = load("cifar10", tmp_path)
    assert read.train_images.shape == (50000, 3, 32, 32)
    assert read.train_images[::10000, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]
    assert int(read.test_images.max()) == 5
    damaged = next(p for p in folder.iterdir() if p.name.startswith("data_batch_3"))
    damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.raises(DataError, match=r"data_batch_3.*truncated or corrupt"):
        load("cifar10", tmp_path)
    damaged.unlink()
    with pytest.raises(DataError, match=r"missing .*data_batch_3"):
        load("cifar10", tmp_path)


def test_missing_cifar_is_named_with_advice(tmp_path):
    with pytest.raises(DataError, match=r"no CIFAR-10 batches under .*--download"):
        load("cifar10", tmp_path)


class Trap:
    def __reduce__(self):
        return (sys.exit, (3,))


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "data_batch_1").write_bytes(pickle.dumps({b"data": Trap()}))
    with pytest.raises(DataError, match=r"refused to load sys\.exit"):
        load("cifar10", tmp_path)


def test_downloads_are_checked(tmp_path):
    source = tmp_path / "source"
    source.write_bytes(b"content")
    md5 = hashlib.md5(b"content").hexdigest()
    fetch(source.as_uri(), tmp_path / "new" / "file", md5)
    assert (tmp_path / "new" / "file").read_bytes() == b"content"
    with pytest.raises(DataError, match=f"expected MD5 {'0' * 32}, got {md5}"):
        fetch(source.as_uri(), tmp_path / "bad", "0" * 32)
    with pytest.raises(DataError, match=r"cannot download .*put the file at"):
        fetch((tmp_path / "absent").as_uri(), tmp_path / "bad", md5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "source"]


def test_download_fills_the_folder(mnist, monkeypatch):
    path = mnist / "MNIST" / "raw" / "t10k-labels-idx1-ubyte.gz"
    home = mnist / "home"
    home.mkdir()
    path.rename(home / path.name)
    digest = hashlib.md5((home / path.name).read_bytes()).hexdigest()
    monkeypatch.setattr(data, "_MNIST_HOME", home.as_uri() + "/")
    monkeypatch.setitem(data._MNIST_MD5, "t10k-labels-idx1-ubyte", digest)
    assert len(load("mnist", mnist, download=True).test_labels) == 20
    assert path.exists()


# --- data of your own -------------------------------------------------------------------------

IMAGES, LABELS = torch.zeros(6, 1, 4, 4, dtype=torch.uint8), torch.arange(6) % 3


def own(**changes):
    return data.Dataset(**{
        "name": "mine", "train_images": IMAGES, "train_labels": LABELS, "test_images": IMAGES,
        "test_labels": LABELS, "classes": 3, "mean": (0.3,), "std": (0.2,), **changes,
    })  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.uint16])
def test_labels_of_any_integer_type_become_int64(dtype):
    found = own(train_labels=LABELS.to(dtype), test_labels=LABELS.to(dtype))
    assert torch.equal(found.train_labels, LABELS)
    assert found.test_labels.dtype == torch.int64


def test_numbers_of_arrays_become_plain():
    found = own(mean=np.array([0.25], np.float32), std=[torch.tensor(0.5)], classes=np.int64(3))
    assert (found.mean, found.std, found.classes) == ((0.25,), (0.5,), 3)
    assert found.shape == (1, 4, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"train_images": IMAGES / 255},
            r"train_images must be a uint8 Tensor .* got torch\.float",
        ),
        ({"test_images": IMAGES.numpy()}, "test_images must be a uint8 Tensor .* got ndarray"),
        ({"test_images": IMAGES[:, 0]}, r"test_images must be samples × channels .* \(6, 4, 4\)"),
        ({"test_images": IMAGES[:, :, :3]}, "they must have one shape"),
        ({"train_labels": LABELS[:5]}, r"train_labels must be a Tensor of 6 integers, got \(5,\)"),
        ({"test_labels": LABELS.float()}, r"test_labels must be .* torch\.float32"),
        (
            {"test_labels": LABELS.tolist()},
            "test_labels must be a Tensor of 6 integers, got 'list'",
        ),
        ({"test_labels": LABELS + 1}, r"test_labels must lie in \[0, 3\), got values from 1 to 3"),
        ({"train_labels": (LABELS - 1).to(torch.int8)}, "got values from -1 to 1"),
        ({"classes": 1}, "classes must be at least 2"),
        ({"mean": (0.1, 0.2)}, "mean must be one finite number for each of 1 channels"),
        ({"std": (0.0,)}, "std must be positive"),
        ({"std": "1"}, "std must be a tuple"),
    ],
)
def test_data_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        own(**changes)


def test_floats_are_not_scaled_again():
    with pytest.raises(ValueError, match=r"got torch\.float32: floats in \[0, 1\] are pixels"):
        data.pixels(torch.rand(2, 1, 4, 4))
    assert data.pixels(torch.tensor([255], dtype=torch.uint8)).tolist() == [1.0]

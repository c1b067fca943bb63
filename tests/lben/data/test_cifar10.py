"""CIFAR-10 from both of its formats; a pickle runs no code."""

import pickle
import sys

import numpy as np
import pytest

from lben.data import DataError, cifar10, load


def write_cifar(folder, kind):
    g = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for index, name in enumerate(cifar10._BATCHES):
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

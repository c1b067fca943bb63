"""Models and inputs are read without running code; what is wrong with a file is one sentence."""

import numpy as np
import pytest
import torch
from torch import nn

from lben import ConvertedNetwork, EquilibriumLinear, LipschitzSequential, SLLLinear, from_torch
from lben.data import DataError, load, pixels
from lben.evaluation.files import find_shape, read_model, read_samples
from lben.models import Classifier
from lben.training import train
from lben.training.checkpoints import CheckpointError
from lben.weights.network import Network
from tests.lben.runs import equilibrium


def test_a_folder_an_onnx_file_and_a_checkpoint_are_read(tmp_path):
    train(equilibrium(out=str(tmp_path / "run"), hidden=5, epochs=1, batch_size=500))
    model = read_model(tmp_path / "run")
    assert isinstance(model, Classifier)
    assert find_shape(model) == (1, 8, 8)
    torch.manual_seed(0)
    tensors = {"0.weight": torch.randn(5, 4), "0.bias": torch.randn(5),
               "1.weight": torch.randn(3, 5), "1.bias": torch.randn(3)}  # fmt: skip
    torch.save(tensors, tmp_path / "dense.pt")
    network = read_model(str(tmp_path / "dense.pt"))
    assert isinstance(network, Network)
    assert find_shape(network) == (4,)
    onnx = pytest.importorskip("onnx")
    from tests.lben.interop.test_onnx_models import residual

    onnx.save(residual(), tmp_path / "m.onnx")
    assert isinstance(read_model(tmp_path / "m.onnx"), Network)


def test_the_shape_of_an_input_is_that_of_the_model():
    converted = ConvertedNetwork(from_torch(nn.Linear(4, 3), (4,)))
    assert find_shape(converted) == (4,)
    assert find_shape(LipschitzSequential(SLLLinear(4, 3))) == (4,)
    assert find_shape(EquilibriumLinear(4, 3, 2)) == (4,)
    assert find_shape(nn.Linear(4, 3)) is None


class Evil:
    def __reduce__(self):
        return print, ("code ran",)


@pytest.mark.parametrize(
    ("name", "write", "error", "message"),
    [
        ("none.pt", None, FileNotFoundError, "there is no file or folder"),
        ("cut.pt", lambda p: p.write_bytes(b"PK\x03\x04cut"), ValueError, "truncated"),
        ("cut.safetensors", lambda p: p.write_bytes(b"cut"), ValueError, "no complete safetensors"),
        ("evil.pt", lambda p: torch.save(Evil(), p), ValueError, "no code of a file is run"),
        ("module.pt", lambda p: torch.save(nn.Linear(2, 2), p), ValueError, "no code of a file is"),
        ("odd.pt", lambda p: torch.save({"w": torch.ones(2)}, p), ValueError, "no known layout"),
        ("m.pt2", lambda p: p.write_bytes(b"x"), ValueError, r"certified_radius\(torch.export"),
        ("m.onnx", lambda p: p.write_bytes(b"cut"), ValueError, "no complete ONNX model"),
        ("folder", lambda p: p.mkdir(), CheckpointError, "config.json"),
    ],
)
def test_models_that_cannot_be_read_are_refused(tmp_path, capsys, name, write, error, message):
    if name.endswith("onnx"):
        pytest.importorskip("onnx")
    if write is not None:
        write(tmp_path / name)
    with pytest.raises(error, match=message):
        read_model(tmp_path / name)
    assert "code ran" not in capsys.readouterr().out


def test_inputs_of_a_data_set_are_its_test_images():
    samples, data = read_samples("digits", count=7), load("digits")
    assert torch.equal(samples.inputs, pixels(data.test_images[:7]))
    assert torch.equal(samples.labels, data.test_labels[:7])
    assert samples.available == 360
    assert len(read_samples("digits").inputs) == 360
    assert read_samples("digits", count=2, shape=(64,)).inputs.shape == (2, 64)


def test_inputs_of_a_file_are_scaled_if_they_are_bytes(tmp_path):
    path, labels = tmp_path / "mine.npz", np.arange(3, dtype=np.int32)
    for images, expected in (
        (np.full((3, 4, 4), 51, dtype=np.uint8), 0.2), (np.full((3, 16), -7.5), -7.5)
    ):  # fmt: skip
        np.savez(path, images=images, labels=labels)
        samples = read_samples(str(path), count=2, shape=(1, 4, 4))
        assert samples.name == "mine.npz"
        assert samples.labels.tolist() == [0, 1]
        assert samples.inputs.shape == (2, 1, 4, 4)
        assert float(samples.inputs[0, 0, 0, 0]) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": np.zeros((2, 4))}, "it lacks labels and has images"),
        ({"x": np.zeros(2)}, "it lacks images and labels and has x"),
        ({"images": np.zeros((2, 4)), "labels": np.zeros(2)}, "labels must be 2 integers"),
        ({"images": np.zeros((2, 4)), "labels": np.zeros(3, int)}, "labels must be 2 integers"),
        ({"images": np.zeros((2, 4), int), "labels": np.zeros(2, int)}, "images must be samples f"),
        ({"images": np.zeros(2), "labels": np.zeros(2, int)}, "images must be samples first"),
        ({"images": np.array([object()]), "labels": np.zeros(1, int)}, "no complete .npz file of"),
        ({"images": np.zeros((2, 5)), "labels": np.zeros(2, int)}, r"inputs of shape \(4,\), and"),
    ],
)
def test_files_with_other_arrays_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "odd.npz", **arrays)
    with pytest.raises(DataError, match=message):
        read_samples(str(tmp_path / "odd.npz"), shape=(4,))


def test_files_that_are_missing_or_cut_are_refused(tmp_path):
    path = tmp_path / "cut.npz"
    with pytest.raises(DataError, match="there is no file"):
        read_samples(str(path))
    np.savez(path, images=np.zeros((9, 4)), labels=np.zeros(9, int))
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(DataError, match=r"is no complete \.npz file"):
        read_samples(str(path))
    with pytest.raises(DataError, match=r"digits, mnist, cifar10 or an \.npz file"):
        read_samples("images.csv")
    with pytest.raises(ValueError, match="samples must be positive, got 0"):
        read_samples("digits", count=0)

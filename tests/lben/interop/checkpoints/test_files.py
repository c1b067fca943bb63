"""Which files are read, and what is said of the others."""

import math
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file

from lben.interop import load_checkpoint
from lben.interop.checkpoints.files import Tensors, read_tensors

STATE = {"0.weight": torch.eye(2), "1.weight": torch.ones(3, 2)}


class Calls:
    """A pickle of it runs a command, which makes a file."""

    def __init__(self, made):
        self.made = made

    def __reduce__(self):
        return os.system, (f"touch {self.made}",)


def same(found):
    assert list(found) == list(STATE)
    assert all(torch.equal(found[name], STATE[name]) for name in STATE)


@pytest.mark.parametrize("suffix", ["pt", "pth", "params", "ckpt"])
@pytest.mark.parametrize("zipped", [False, True])
def test_files_of_torch_are_read(tmp_path, suffix, zipped):
    path = tmp_path / f"model.{suffix}"
    torch.save(STATE, path, _use_new_zipfile_serialization=zipped)
    same(read_tensors(path))
    same(read_tensors(str(path)))


def test_safetensors_and_mappings_are_read(tmp_path):
    save_file(STATE, tmp_path / "model.safetensors")
    same(read_tensors(tmp_path / "model.safetensors"))
    same(read_tensors(STATE))


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model", "net"])
def test_tensors_inside_a_checkpoint_of_a_script_are_found(tmp_path, key):
    inside = {f"module.{name}": value for name, value in STATE.items()}
    torch.save({key: inside, "epoch": 3, "optimizer": {"state": {}}}, tmp_path / "model.pt")
    same(read_tensors(tmp_path / "model.pt"))


@pytest.mark.parametrize("size", [0, 7, 100, -10])
@pytest.mark.parametrize("name", ["model.pt", "old.pt", "model.safetensors"])
def test_a_truncated_file_is_named(tmp_path, name, size):
    path = tmp_path / name
    if name == "model.safetensors":
        save_file(STATE, path)
    else:
        torch.save(STATE, path, _use_new_zipfile_serialization=name == "model.pt")
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=f"{name} .*is truncated"):
        load_checkpoint(path)


def test_a_file_of_something_else_is_named(tmp_path):
    path = tmp_path / "model.pt"
    path.write_bytes(b"hello world" * 20)
    with pytest.raises(ValueError, match="is truncated, of another format"):
        load_checkpoint(path)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_checkpoint(tmp_path / "other.pt")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_that_wants_to_run_code_is_refused_and_runs_nothing(tmp_path, protocol):
    path, made = tmp_path / "model.pt", tmp_path / "made"
    torch.save({"0.weight": Calls(made)}, path, pickle_protocol=protocol)
    wanted = "wants to call posix.system, and" if protocol == 2 else "a pickle of more than tensors"
    with pytest.raises(ValueError, match=f"{wanted}.* no code of a file is run"):
        load_checkpoint(path)
    path.write_bytes(pickle.dumps({"0.weight": Calls(made)}, protocol=protocol))
    with pytest.raises(ValueError, match="no code of a file is run"):
        load_checkpoint(path)
    assert not made.exists()
    pickle.loads(path.read_bytes())
    assert made.exists()  # it would have run


def test_a_whole_module_is_refused(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"wants to call torch.nn.modules.linear.Linear"):
        load_checkpoint(tmp_path / "model.pt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "got dict of 0 entries"),
        ([torch.ones(2)], "got list of 1 entries"),
        (torch.ones(2), "got Tensor of 2 entries"),
        ({"a": 1.5}, "a is float"),
        ({1: torch.ones(2)}, "1 is Tensor"),
    ],
)
def test_a_file_without_tensors_by_name_is_named(tmp_path, content, message):
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=rf"expected tensors by name .*{message}"):
        load_checkpoint(tmp_path / "model.pt")


def test_tensors_are_taken_once_with_their_shapes():
    tensors = Tensors(STATE, "a test")
    assert "0.weight" in tensors
    assert "2.weight" not in tensors
    taken = tensors.take("0.weight", 2, None)
    assert taken.dtype == torch.float64
    assert torch.equal(taken, torch.eye(2, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"a test has no 1.weight: the file is of another network"):
        tensors.finish()
    with pytest.raises(ValueError, match=r"needs a tensor 0.weight, and the file has 1.weight"):
        tensors.take("0.weight", 2, 2)
    with pytest.raises(ValueError, match=r"shape 4 × any, got \(3, 2\)"):
        tensors.take("1.weight", 4, None)


@pytest.mark.parametrize("shape", [(3,), (3, 2, 1), (2, 2)])
def test_other_shapes_are_named(shape):
    with pytest.raises(ValueError, match=r"must have shape .*, got \(3, 2\)"):
        Tensors(STATE, "a test").take("1.weight", *shape)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_named(wrong):
    value = torch.ones(2, 2)
    value[1, 0] = wrong
    with pytest.raises(ValueError, match="W has 1 entries that are NaN or infinite, of 4"):
        Tensors({"W": value}, "a test").take("W", 2, 2)


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool])
def test_numbers_that_are_not_real_are_named(dtype):
    with pytest.raises(ValueError, match="must hold real floating-point numbers"):
        Tensors({"W": torch.ones(2, dtype=dtype)}, "a test").take("W", 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_numbers_become_float64_exactly(dtype):
    value = torch.randn(50).to(dtype)
    taken = Tensors({"W": value}, "a test").take("W", 50)
    assert taken.dtype == torch.float64
    assert torch.equal(taken.to(dtype), value)

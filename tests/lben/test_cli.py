"""The terminal: one line and the next step for every error, any encoding, and strict files."""

import dataclasses
import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lben import cli
from lben.data import load
from lben.evaluation.accuracy import Report, evaluate
from lben.evaluation.proofs import Certification, CertificationConfig
from lben.evaluation.robustness import Robustness
from lben.models import (
    ConvolutionalEquilibriumArchitecture,
    EquilibriumArchitecture,
    FeedforwardArchitecture,
)
from lben.training import checkpoints, train
from lben.training.augmentation import Augmentation
from lben.training.losses import EMMA, CrossEntropy
from lben.training.optimization import SGD, PiecewiseLinear, WarmupCosine
from lben.training.recipes import read
from tests.lben import runs
from tests.lben.runs import config, equilibrium

QUICK = ["--hidden", "5", "--epochs", "1", "--batch-size", "500"]
FILES = [
    "config.json", "training.safetensors", "model.safetensors", "certificate.json", "metrics.jsonl"
]  # fmt: skip
SHORT = {
    "evaluate": "--attack-samples 3 --pairs 20 --ascent-pairs 2 --ascent-steps 2 --radii 0 0.1",
    "certify": "--samples 3 --attack-steps 2 --attack-restarts 1 --no-local --radii 0.1",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(equilibrium(out=folder, hidden=5, epochs=1, batch_size=500, gamma=None))
    return folder


@pytest.fixture
def copied(run, tmp_path):
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in run.iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def contents(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def one_line(capsys):
    """The only line on standard error that is an error."""
    said = capsys.readouterr().err
    lines = [line for line in said.splitlines() if line.startswith("lben: ")]
    assert len(lines) == 1
    assert "Traceback" not in said
    return lines[0]


# --- files ------------------------------------------------------------------------------------


def refuse(word):
    raise ValueError(f"{word} is not JSON")


def test_every_file_is_strict_json_and_comes_back(copied, capsys):
    assert cli.main(["certify", str(copied), *SHORT["certify"].split()]) == 0
    words = [*SHORT["evaluate"].split(), "--bound", "promised"]  # which is infinite here
    assert cli.main(["evaluate", str(copied), *words]) == 0
    files = [p for p in copied.iterdir() if p.suffix in (".json", ".jsonl")]
    assert len(files) == 5
    for path in files:
        for line in (
            path.read_text("utf-8").splitlines()
            if path.suffix == ".jsonl"
            else [path.read_text("utf-8")]
        ):
            json.loads(line, parse_constant=refuse)
    report = Report.from_json((copied / "report.json").read_text("utf-8"))
    assert report.bound == float("inf")
    assert report.promised_bound is None
    assert report.config.radii == (0.0, 0.1)
    certification = Certification.from_json((copied / "certification.json").read_text("utf-8"))
    assert certification.in_linf[1].bound == float("inf")  # intervals
    assert certification.samples == 3
    assert certification.available == 360
    assert report.to_dict()["bound"] is None
    assert json.dumps(report.to_dict(), allow_nan=False)


def test_a_loss_that_is_no_number_is_null(tmp_path):
    checkpoints.append_json(tmp_path / "m.jsonl", {"loss": float("nan"), "epoch": 1})
    assert (tmp_path / "m.jsonl").read_text("utf-8") == '{"loss": null, "epoch": 1}\n'


@pytest.mark.parametrize("command", SHORT)
def test_a_certificate_of_another_model_is_noticed_and_replaced(copied, capsys, command):
    words = [command, str(copied), *SHORT[command].split()]
    (copied / "certificate.json").write_text(
        (copied / "certificate.json").read_text("utf-8").replace('"fingerprint": "', '$&0')
        .replace("$&0", '"fingerprint": "0'), "utf-8",
    )  # fmt: skip
    assert cli.main(words) == 0
    said = capsys.readouterr().err
    assert "certificate.json is of another model: module 0 has fingerprint" in said
    assert sum(line.startswith("warning: ") for line in said.splitlines()) == 1
    if command == "evaluate":
        assert cli.main(words) == 0
        out, err = capsys.readouterr()
        assert "certificate.json is of this model" in out
        assert "warning" not in err


@pytest.mark.parametrize("command", SHORT)
def test_a_certificate_that_claims_too_much_was_not_proved_again(copied, capsys, command):
    path = copied / "certificate.json"
    stored = json.loads(path.read_text("utf-8"))
    stored["bound"], stored["layers"][0]["bound"] = 1e-3, 1e-9
    path.write_text(json.dumps(stored), "utf-8")
    assert cli.main([command, str(copied), *SHORT[command].split()]) == 0
    out, err = capsys.readouterr()
    assert "proved again" not in out
    warnings = [line for line in err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1
    assert "is of this model, but it claims 0.001 as the bound, and only " in warnings[0]
    assert json.loads(path.read_text("utf-8"))["bound"] > 0.1


def test_a_tighter_certificate_that_certify_wrote_is_proved_again_and_kept(copied, capsys):
    assert cli.main(["certify", str(copied), *SHORT["certify"].split()]) == 0
    capsys.readouterr()
    before = (copied / "certificate.json").read_bytes()
    assert json.loads(before)["bound"] is not None  # the run promises none
    assert cli.main(["evaluate", str(copied), *SHORT["evaluate"].split()]) == 0
    out, err = capsys.readouterr()
    assert "certificate.json is of this model: its bound was proved again" in out
    assert "warning" not in err
    assert (copied / "certificate.json").read_bytes() == before


# --- errors -----------------------------------------------------------------------------------


def test_folders_that_cannot_be_are_refused_and_stay_as_they_are(run, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    before = contents(tmp_path)
    for out, words in {
        tmp_path / "file": "is a file, not a folder; choose another --out",
        tmp_path / "file" / "below": "is a file, not a folder; choose another --out",
        tmp_path / ("x" * 300): "cannot write into",
        run: "already holds a run: continue it with `lben resume",
        "": "out must name the folder",
    }.items():
        assert cli.main(["train", "--out", str(out), *QUICK]) == 1
        assert words in one_line(capsys)
    assert contents(tmp_path) == before


def occupied(path, kind):
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to("nowhere")
    else:
        path.write_text("mine")


def everything(folder):
    """Paths, kinds and contents below a folder."""
    return {
        str(p): (p.is_symlink(), p.is_dir(), p.read_bytes() if p.is_file() else b"")
        for p in folder.rglob("*")
    }


@pytest.mark.parametrize("command", ["train", "demo"])
@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("tensorboard", "file", "what is there is no folder; move it away"),
        ("tensorboard", "folder", "already holds tensorboard, which this run would replace"),
        *((name, "folder", "what is there is no file; move it away") for name in FILES),
        *((f"{name}.partial", "folder", "what is there is no file; move") for name in FILES),
        ("metrics.jsonl", "link", "what is there is no file; move it away"),
        ("metrics.jsonl", "file", "already holds metrics.jsonl, which this run would replace"),
        ("certificate.json", "file", "already holds certificate.json, which this run would"),
        ("model.safetensors", "file", "already holds a trained model"),
        ("training.safetensors", "file", "already holds a run: continue it with `lben resume"),
    ],
)
def test_occupied_places_are_refused_and_the_folder_stays(
    tmp_path, capsys, command, name, kind, message
):
    occupied(tmp_path / "run" / name, kind)
    before = everything(tmp_path)
    words = QUICK if command == "train" else ["--epochs", "1"]
    assert cli.main([command, "--out", str(tmp_path / "run"), *words]) == 1
    assert message in one_line(capsys)
    assert everything(tmp_path) == before


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("evaluate", "report.json"), ("evaluate", "robustness.png"),
        ("evaluate", "robustness.partial.png"), ("evaluate", "certificate.json"),
        ("certify", "certification.json"), ("certify", "certification.png"),
        ("certify", "certificate.json.partial"),
    ],
)  # fmt: skip
def test_occupied_places_are_refused_before_anything_is_computed(
    copied, capsys, monkeypatch, command, name
):
    for computed in ("evaluate", "evaluate_certificates"):
        monkeypatch.setattr(cli, computed, None)
    (copied / name).unlink(missing_ok=True)
    occupied(copied / name, "folder")
    before = everything(copied)
    assert cli.main([command, str(copied), *SHORT[command].split()]) == 1
    assert f"{name}: what is there is no file; move it away" in one_line(capsys)
    assert everything(copied) == before


def test_places_that_the_demo_and_a_resumed_run_write_are_looked_at_first(copied, capsys):
    occupied(copied / "report.json", "folder")
    occupied(copied / "tensorboard", "file")
    before = everything(copied)
    assert cli.main(["demo", "--out", str(copied), "--epochs", "1"]) == 1
    assert "report.json: what is there is no file" in one_line(capsys)
    assert cli.main(["resume", str(copied)]) == 1
    assert "tensorboard: what is there is no folder" in one_line(capsys)
    assert everything(copied) == before


def test_files_without_permission_are_refused(copied, capsys, monkeypatch):
    (copied / "report.json").write_text("mine")
    access = os.access
    monkeypatch.setattr(
        checkpoints.os, "access", lambda p, mode: p.name != "report.json" and access(p, mode)
    )
    assert cli.main(["evaluate", str(copied), *SHORT["evaluate"].split()]) == 1
    assert "report.json: no permission to write to it" in one_line(capsys)
    assert (copied / "report.json").read_text() == "mine"


def test_folders_without_permission_are_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(checkpoints.os, "access", lambda *_: False)  # root may write anywhere
    assert cli.main(["train", "--out", str(tmp_path / "a"), *QUICK]) == 1
    assert "no permission to write in" in one_line(capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "foo"], "device must be cpu or cuda, got 'foo'"),
        (["--device", "cuda:99"], "take --device cpu"),
        (["--device", ""], "device must be cpu or cuda"),
        (["--epochs", "two"], "Error parsing --epochs: invalid literal"),
        (["--lr", "nan"], "lr must be positive and finite, got nan"),
        (["--data", "imagenet"], "see `lben train --help`"),
        (["--data", "mnist", "--root", "nowhere"], "there is no folder nowhere"),
        (["--loss.scale", "-1"], "--loss: scale must be positive"),
        (["--colour", "red"], "Unrecognized options: --colour, red"),
        (["--seed", str(2**70)], "seed must be an integer below"),
        (["--tol", "2"], "tol must be below 1 (it is relative"),
        (["--shift", "99"], "shift must be below the size of the images, 8 × 8 pixels, got 99"),
        (["--shift", "8"], "shift must be below the size of the images, 8 × 8 pixels, got 8"),
    ],
)
def test_bad_options_are_one_line_and_no_folder(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "--out", "run", *QUICK, *words]) == 1
    assert message in one_line(capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [[], ["mystery"], ["resume"]])
def test_commands_that_are_none_are_one_line(words, capsys):
    assert cli.main(words) == 1
    assert "--help" in one_line(capsys)


def test_cuda_where_there_is_none(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["train", "--out", str(tmp_path / "a"), "--device", "cuda", *QUICK]) == 1
    assert "torch sees no CUDA device here; take --device cpu" in one_line(capsys)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", b"", "is truncated or corrupt"),
        ("config.json", b"\xff\xfe", "is truncated or corrupt"),
        ("config.json", b"[1]", "has checkpoint format None"),
        ("config.json", b'{"format": 2}', "has checkpoint format 2"),
        ("config.json", b'{"format": 3}', "lacks a field"),
        ("config.json", b"[" * 100000, "is truncated or corrupt"),
        ("config.json", None, "no checkpoint in"),
        ("model.safetensors", b"", "is truncated or corrupt"),
        ("model.safetensors", b"x" * 100, "is truncated or corrupt"),
        ("model.safetensors", None, "is missing"),
    ],
)
def test_damaged_runs_are_named(copied, capsys, name, content, message):
    path = copied / name
    path.unlink() if content is None else path.write_bytes(content)
    before = contents(copied)
    for command in ("evaluate", "certify"):
        assert cli.main([command, str(copied), *SHORT[command].split()]) == 1
        assert message in one_line(capsys)
    assert contents(copied) == before


def test_runs_that_are_none_are_named(tmp_path, capsys):
    (tmp_path / "file").touch()
    for folder in (tmp_path, tmp_path / "nowhere", tmp_path / "file"):
        for command in ("resume", "evaluate", "certify"):
            assert cli.main([command, str(folder)]) == 1
            assert "no checkpoint in" in one_line(capsys)
    assert {p.name for p in tmp_path.iterdir()} == {"file"}


def test_data_that_has_moved_away_is_named(copied, capsys):
    path = copied / "config.json"
    for data, message in (('"mnist"', "give the folder"), ('"letters"', "data must be digits")):
        text = path.read_text("utf-8").replace('"digits"', data)
        path.write_text(text, "utf-8")
        assert cli.main(["evaluate", str(copied)]) == 1
        assert message in one_line(capsys)
        path.write_text(text.replace(data, '"digits"'), "utf-8")
    config = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({**config, "training": {}}), "utf-8")
    assert cli.main(["evaluate", str(copied)]) == 1
    assert "does not say which data" in one_line(capsys)


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        (errno.ENOSPC, "free some space and repeat the command"),
        (errno.EACCES, "choose a folder that you may write to"),
        (errno.EIO, "see to that"),
    ],
)
def test_a_disk_that_fails_is_one_line(copied, capsys, monkeypatch, code, advice):
    def fail(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(checkpoints.os, "fsync", fail)
    before = contents(copied)
    assert cli.main(["train", "--out", str(copied / "new"), *QUICK]) == 1
    line = one_line(capsys)
    assert os.strerror(code) in line
    assert advice in line
    assert "config.json" in line
    assert cli.main(["evaluate", str(copied), *SHORT["evaluate"].split()]) == 1
    assert "report.json" in one_line(capsys)
    assert contents(copied) == before


def test_no_memory_is_one_line(tmp_path, capsys, monkeypatch):
    for error in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory.\nTried")):
        monkeypatch.setattr(cli, "train", lambda _, e=error: (_ for _ in ()).throw(e))
        assert cli.main(["train"]) == 1
        assert "smaller --batch-size" in one_line(capsys)


def test_a_model_beyond_all_memory_is_one_line(copied, tmp_path, capsys):
    for power in (12, 16, 18, 20):
        words = ["train", "--out", str(tmp_path / "new"), "--hidden", str(10**power)]
        assert cli.main(words) == 1
        assert "out of memory: take a smaller --batch-size or a smaller model" in one_line(capsys)
    assert not (tmp_path / "new").exists()
    path = copied / "config.json"
    path.write_text(path.read_text("utf-8").replace('"hidden": 5', f'"hidden": {10**12}'), "utf-8")
    assert cli.main(["evaluate", str(copied)]) == 1
    assert "out of memory" in one_line(capsys)


def test_another_runtime_error_is_a_defect_and_shows_its_trace(monkeypatch):
    monkeypatch.setattr(cli, "train", lambda _: (_ for _ in ()).throw(RuntimeError("defect")))
    with pytest.raises(RuntimeError, match="defect"):
        cli.main(["train"])


@pytest.mark.parametrize("command", ["evaluate", "certify", "demo"])
def test_ctrl_c_is_130_everywhere(copied, capsys, monkeypatch, command):
    name = {"evaluate": "evaluate", "certify": "evaluate_certificates", "demo": "train"}[command]
    monkeypatch.setattr(cli, name, lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    words = ["--out", str(copied)] if command == "demo" else [str(copied)]
    assert cli.main([command, *words]) == 130
    assert "lben: interrupted" in one_line(capsys)


def test_the_demo_replaces_no_run_on_other_data(copied, capsys):
    path = copied / "config.json"
    path.write_text(path.read_text("utf-8").replace('"digits"', '"mnist"'), "utf-8")
    before = contents(copied)
    assert cli.main(["demo", "--out", str(copied)]) == 1
    assert "holds a run on mnist, which the demo would replace" in one_line(capsys)
    assert cli.main(["demo", "--out", str(copied), "--gamma", "-1"]) == 1
    assert contents(copied) == before


# --- terminals --------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8", "latin-1"])
def test_output_survives_any_encoding(run, monkeypatch, encoding):
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    with pytest.raises(SystemExit) as end:
        cli.main(["train", "--help"])
    assert end.value.code == 0
    assert cli.main(["evaluate", str(run), *SHORT["evaluate"].split()]) == 0
    assert cli.main(["evaluate", "Λ"]) == 1
    for stream in streams:
        stream.flush()
    out, err = (stream.buffer.getvalue().decode(encoding) for stream in streams)
    assert "promised" in out
    assert ("promised γ" in out) == (encoding == "utf-8")
    assert "lben: no checkpoint in" in err


@pytest.mark.slow
def test_a_closed_pipe_ends_without_a_word(run):
    words = [sys.executable, "-m", "lben", "evaluate", str(run), *SHORT["evaluate"].split()]
    root = Path(cli.__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root), "PYTHONIOENCODING": "ascii"}
    child = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, cwd=root
    )
    child.stdout.close()
    assert child.stderr.read() == b""
    child.stderr.close()
    assert child.wait() == 1
    assert (run / "report.json").exists()


def test_a_reader_that_went_away_is_no_error(run, monkeypatch, capsys):
    class Gone(io.StringIO):
        def write(self, _):
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

        def fileno(self):
            raise OSError

    monkeypatch.setattr(sys, "stdout", Gone())
    assert cli.main(["evaluate", str(run), *SHORT["evaluate"].split()]) == 1
    assert "lben:" not in capsys.readouterr().err


def test_ctrl_c_on_the_command_line_exits_with_130(tmp_path, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(WarmupCosine, "__call__", stop)
    folder = tmp_path / "cli"
    assert cli.main(["train", "--out", str(folder), "--hidden", "5", "--epochs", "1"]) == 130
    assert "the last checkpoint is whole" in capsys.readouterr().err


def test_train_resume_and_evaluate_on_the_command_line(tmp_path, capsys):
    folder = str(tmp_path / "run")
    train_words = ["train", "--out", folder, "--hidden", "5", "--epochs", "1"]
    assert cli.main(train_words) == 0
    assert "next: lben evaluate" in capsys.readouterr().out
    assert cli.main(train_words) == 1
    assert "already holds a run" in capsys.readouterr().err
    assert cli.main(["resume", folder]) == 0
    words = ["--pairs", "100", "--ascent-pairs", "3", "--ascent-steps", "3",
             "--attack-samples", "5", "--radii", "0", "0.5"]  # fmt: skip
    assert cli.main(["evaluate", folder, *words]) == 0
    out = capsys.readouterr().out
    assert "violations         0" in out
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["radii"] == [0.0, 0.5]
    assert (tmp_path / "run" / "robustness.png").read_bytes().startswith(b"\x89PNG")


def test_choices_on_the_command_line_reach_the_recipe(tmp_path, capsys):
    folder = str(tmp_path / "run")
    words = f"train --out {folder} --hidden 5 --epochs 1 --batch-size 300 --ema 0.9 --accumulate 2"
    choices = (
        "loss:emma --loss.radius 0.5 --loss.bound 3.2 optimizer:sgd --optimizer.momentum 0.8 "
        "schedule:piecewise-linear --shift 1 --reflect"
    )
    assert cli.main([*words.split(), *choices.split()]) == 0
    model, record = checkpoints.load_config(folder)
    assert read(record, model) == equilibrium(
        out=folder, hidden=5, epochs=1, batch_size=300, ema=0.9, accumulate=2,
        loss=EMMA(radius=0.5, bound=3.2), optimizer=SGD(momentum=0.8),
        schedule=PiecewiseLinear(), augmentation=Augmentation(shift=1, reflect=True),
    )  # fmt: skip


def test_options_of_a_default_choice_need_not_name_it(tmp_path):
    words = f"train --out {tmp_path} --hidden 5 --epochs 1 --loss.offset 0.5 --schedule.warmup 0.3"
    assert cli.main(words.split()) == 0
    model, record = checkpoints.load_config(tmp_path)
    assert read(record, model).loss == CrossEntropy(offset=0.5)
    assert read(record, model).schedule == WarmupCosine(warmup=0.3)


def test_the_help_names_the_choices(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    out = capsys.readouterr().out
    for word in ("loss:emma", "optimizer:sgd", "schedule:piecewise-linear", "--shift", "--gamma"):
        assert word in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["evaluate", "nowhere"], "no checkpoint in nowhere"),
        (["train", "--data", "mnist", "--out", "x"], "mnist is read from files"),
        (["train", "--data", "mnist", "--root", "nowhere", "--out", "x"], "missing train-images"),
        (["train", "--gamma", "-1", "--out", "x"], "gamma must be a positive"),
        (["train", "--tol", "1e-9", "--out", "x"], "below what torch.float32 can hold"),
        (["train", "--epochs", "0", "--out", "x"], "epochs must be positive"),
    ],
)
def test_errors_are_one_line(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(words) == 1
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("lben:")]
    assert len(lines) == 1
    assert message in lines[0]


def test_demo_starts_afresh_and_writes_everything(tmp_path, capsys):
    train(config(tmp_path, epochs=1, hidden=5))
    assert cli.main(["demo", "--out", str(tmp_path), "--epochs", "2"]) == 0
    assert "certificate.json, report.json, robustness.png" in capsys.readouterr().out
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_convolutional_run_learns_and_is_evaluated(tmp_path):
    folder = str(tmp_path / "conv")
    words = ["train-conv", "--channels", "6", "--pool", "2", "--epochs", "4", "--lr", "0.02"]
    assert cli.main([*words, "--out", folder, "--gamma", "2", "--batch-size", "64"]) == 0
    model = checkpoints.load_model(folder)
    report = evaluate(model, load("digits"), runs.SHORT)
    assert report.clean_accuracy > 0.7
    assert report.violations == 0
    assert report.certified_accuracy[1] <= report.pgd_accuracy[1]


def test_data_of_ones_own_are_asked_for_in_python(tmp_path, capsys):
    train(config(tmp_path, epochs=1, hidden=5), runs.stripes(name="stripes"))
    before = contents(tmp_path)
    for command, words in {
        "resume": "continue it in Python with lben.training.resume(folder, data)",
        "evaluate": "data of your own ('stripes'), which it does not keep",
        "certify": "data of your own ('stripes'), which it does not keep",
    }.items():
        assert cli.main([command, str(tmp_path)]) == 1
        assert words in one_line(capsys)
    assert cli.main(["demo", "--out", str(tmp_path)]) == 1
    assert "holds a run on data of your own, which the demo would replace" in one_line(capsys)
    assert contents(tmp_path) == before


def test_every_option_of_an_architecture_is_an_option_of_the_command_line(capsys):
    for command, architecture in {
        "train": EquilibriumArchitecture,
        "train-conv": ConvolutionalEquilibriumArchitecture,
        "train-feedforward": FeedforwardArchitecture,
    }.items():
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        out = capsys.readouterr().out
        for field in dataclasses.fields(architecture):
            assert f"--{field.name.replace('_', '-')} " in out.replace(",", " ")


# --- models from elsewhere ----------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path):
    """A network in GLipSDP's layout whose inputs are 8 × 8 images."""
    torch.manual_seed(0)
    path = tmp_path / "model.pt"
    torch.save({"0.weight": torch.randn(6, 64) / 8, "0.bias": torch.randn(6),
                "1.weight": torch.randn(10, 6), "1.bias": torch.randn(10)}, path)  # fmt: skip
    return path


ANY = ["--data", "digits", "--samples", "4", "--seconds", "0"]


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_any_model_is_certified_on_any_data(checkpoint, capsys, norm):
    out = checkpoint.parent / "report.json"
    words = ["certify", str(checkpoint), *ANY, "--norm", norm, "--box", "0", "1"]
    assert cli.main([*words, "--radii", "0.001", "0.01", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "by primal-dual, at most" in said
    assert f"at {norm} radius r, among inputs in [0, 1]" in said
    report = Robustness.from_json(out.read_text("utf-8"))
    json.loads(out.read_text("utf-8"), parse_constant=refuse)
    assert report.radii == (0.001, 0.01)
    assert report.config.norm == norm
    assert report.samples == 4
    assert cli.main([*words, "--no-local"]) == 0
    default = CertificationConfig()
    radius = (default.radii if norm == "l2" else default.linf_radii)[0]
    said = capsys.readouterr().out
    assert f"r = {radius:.3g}" in said
    assert "around each input" not in said


def test_a_run_is_certified_on_other_data(copied, tmp_path, capsys):
    path = tmp_path / "mine.npz"
    np.savez(path, images=np.zeros((3, 8, 8), dtype=np.uint8), labels=np.arange(3))
    before = contents(copied)
    words = ["--data", str(path), "--seconds", "0", "--radii", "0.01"]
    assert cli.main(["certify", str(copied), *words]) == 0
    assert "EquilibriumClassifier on mine.npz, first 3 of 3 inputs" in capsys.readouterr().out
    assert contents(copied) == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "digits", "--norm", "l1"], "invalid choice 'l1' for argument '--norm'"),
        (["--data", "digits", "--radii", "-1"], "radii must be positive and finite"),
        (["--data", "digits", "--seconds", "-1"], "seconds must be at least 0"),
        (["--data", "digits", "--box", "1", "0"], "box must be (smallest, largest)"),
        (["--data", "digits", "--box", "0.5", "1"], "inputs must lie in the box"),
        (["--data", "digits", "--tol", "1e-3"], "--tol is for runs without --data"),
        (["--data", "digits", "--linf-radii", "0.1"], "--linf-radii is for runs without --data"),
        (["--data", "digits", "--out", "{}/x"], "is a file, not a folder; choose another --out"),
        (["--data", "mnist"], "mnist is read from files: give the folder that holds them (--root)"),
        (["--data", "images.csv"], "data must be digits, mnist, cifar10 or an .npz file"),
        (["--data", "{}.npz"], "there is no file"),
        ([], "it is a file. If it holds a model, say which inputs are certified by --data"),
        (["--out", "x.json"], "--out needs --data"),
        (["--norm", "linf"], "--norm needs --data"),
    ],
)
def test_what_does_not_fit_a_model_from_elsewhere_is_one_line(checkpoint, capsys, words, message):
    words = [word.format(checkpoint) for word in words]
    assert cli.main(["certify", str(checkpoint), *words]) == 1
    assert message in one_line(capsys)


def test_a_pickled_module_and_labels_out_of_range_are_refused(checkpoint, capsys):
    pickled, path = checkpoint.parent / "module.pt", checkpoint.parent / "mine.npz"
    torch.save(torch.nn.Linear(2, 2), pickled)
    assert cli.main(["certify", str(pickled), *ANY]) == 1
    assert "no code of a file is run" in one_line(capsys)
    np.savez(path, images=np.zeros((2, 64)), labels=np.array([0, 10]))
    assert cli.main(["certify", str(checkpoint), "--data", str(path)]) == 1
    assert "labels must lie in [0, 10), got values from 0 to 10" in one_line(capsys)
    np.savez(path, images=np.zeros((2, 63)), labels=np.array([0, 9]))
    assert cli.main(["certify", str(checkpoint), "--data", str(path)]) == 1
    assert "the model takes inputs of shape (64,), and the data have (63,)" in one_line(capsys)

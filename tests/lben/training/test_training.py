"""Training, checkpoints, evaluation and command line on a small piece of the digits."""

import dataclasses
import json

import pytest
import torch

from lben import cli
from lben.data import load
from lben.evaluation.accuracy import EvaluationConfig, evaluate
from lben.evaluation.reports import draw, table
from lben.training import checkpoints
from lben.training import loop as training
from lben.training.augmentation import Augmentation
from lben.training.checkpoints import CheckpointError
from lben.training.loop import Interrupted, resume, train
from lben.training.losses import EMMA, CrossEntropy, Hinge
from lben.training.optimization import SGD, Adam, AdamW, Constant, PiecewiseLinear, WarmupCosine
from lben.training.recipes import EquilibriumTraining, FeedforwardTraining, read

SHORT = EvaluationConfig(
    radii=(0.0, 0.5), attack_samples=20, pgd_steps=5, pgd_restarts=1, pairs=200, ascent_pairs=5,
    ascent_steps=5,
)  # fmt: skip


def config(folder, **changes):
    options = {
        "out": str(folder),
        "hidden": 16,
        "epochs": 8,
        "lr": 0.02,
        "batch_size": 64,
        "seed": 5,
    }
    return EquilibriumTraining(**{**options, **changes})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(config(folder))
    return folder


def same(a, b):
    assert all(torch.equal(a.state_dict()[k], v) for k, v in b.state_dict().items())


def test_a_run_leaves_whole_files_and_learns(run):
    assert {p.name for p in run.iterdir()} >= {
        "config.json", "model.safetensors", "certificate.json", "training.safetensors",
        "metrics.jsonl", "tensorboard",
    }  # fmt: skip
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [m["epoch"] for m in metrics] == list(range(1, 9))
    assert metrics[-1]["test_error_percent"] < 40
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    certificate = json.loads((run / "certificate.json").read_text())
    assert certificate["bound"] == pytest.approx(1 / load("digits").std[0], rel=1e-6)


def test_training_is_seeded(run, tmp_path):
    same(train(config(tmp_path / "again")), checkpoints.load_model(run))
    other = train(config(tmp_path / "other", seed=6, epochs=1))
    assert not torch.equal(
        other.layer.parameterization.U, checkpoints.load_model(run).layer.parameterization.U
    )


def interrupt_after(monkeypatch, steps):
    original, count = WarmupCosine.__call__, [0]

    def counted(*arguments):
        count[0] += 1
        if count[0] > steps:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(WarmupCosine, "__call__", counted)


@pytest.mark.parametrize("steps", [0, 5, 40, 170])
def test_ctrl_c_leaves_a_whole_checkpoint_and_resume_reaches_the_same_weights(
    run, tmp_path, monkeypatch, steps
):
    folder = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        interrupt_after(patch, steps)
        with pytest.raises(Interrupted, match=f"continue with `lben resume {folder}`"):
            train(config(folder))
    same(resume(folder), checkpoints.load_model(run))
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == list(range(1, 9))


def test_ctrl_c_on_the_command_line_exits_with_130(tmp_path, monkeypatch, capsys):
    interrupt_after(monkeypatch, 3)
    folder = tmp_path / "cli"
    assert cli.main(["train", "--out", str(folder), "--hidden", "5", "--epochs", "1"]) == 130
    assert "the last checkpoint is whole" in capsys.readouterr().err


def test_a_finished_run_is_not_overwritten(run):
    with pytest.raises(CheckpointError, match="already holds a run: continue it with"):
        train(config(run))


@pytest.mark.parametrize("name", ["model.safetensors", "training.safetensors"])
@pytest.mark.parametrize("keep", [0, 7, 300])
def test_truncated_tensors_are_named(run, tmp_path, name, keep):
    for path in run.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / name).write_bytes((run / name).read_bytes()[:keep])
    act = checkpoints.load_model if name.startswith("model") else resume
    with pytest.raises(CheckpointError, match=f"{name} is truncated or corrupt"):
        act(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        act(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(format=1), "has checkpoint format 1, this version of lben reads"),
        (lambda c: c.pop("format"), "has checkpoint format None"),
        (lambda c: c["model"].update(kind="mystery"), "unknown kind of model 'mystery'"),
        (lambda c: c["model"].update(colour=1), "lacks a field or has one too many"),
        (lambda c: c["model"].pop("shape"), "lacks a field or has one too many"),
        (lambda c: c["model"].update(hidden=11), "does not fit its config"),
    ],
)
def test_checkpoints_of_another_kind_are_refused(run, tmp_path, change, message):
    content = json.loads((run / "config.json").read_text())
    change(content)
    (tmp_path / "config.json").write_text(json.dumps(content))
    (tmp_path / "model.safetensors").write_bytes((run / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=message):
        checkpoints.load_model(tmp_path)


def test_truncated_configuration_is_named(run, tmp_path):
    (tmp_path / "config.json").write_text((run / "config.json").read_text()[:50])
    with pytest.raises(CheckpointError, match=r"config\.json is truncated or corrupt"):
        checkpoints.load_model(tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        checkpoints.load_model(tmp_path / "nowhere")


def test_atomic_writes_keep_the_old_content_on_failure(tmp_path, monkeypatch):
    path = tmp_path / "file"
    checkpoints.write_atomically(path, b"old")
    monkeypatch.setattr(checkpoints.os, "fsync", lambda _: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        checkpoints.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("gamma", 0.1), ("gamma", None), ("feedthrough", True), ("activation", "tanh"),
        ("learn_metric", False), ("epsilon", 0.1), ("lr", 1e-3), ("batch_size", 128),
        ("tol", 2e-6), ("loss", CrossEntropy(scale=3.0)), ("loss", Hinge(margin=1.0)),
        ("optimizer", AdamW(weight_decay=1.0)), ("optimizer", Adam(betas=(0.5, 0.9))),
        ("optimizer", SGD()), ("augmentation", Augmentation(shift=1)),
        ("schedule", PiecewiseLinear()), ("schedule", Constant()), ("ema", 0.5),
    ],
)  # fmt: skip
def test_every_option_acts(option, value, tmp_path):
    base = train(config(tmp_path / "base", epochs=1, hidden=5))
    changed = train(config(tmp_path / "changed", **{"epochs": 1, "hidden": 5, option: value}))
    assert not torch.equal(base.layer.parameterization.C, changed.layer.parameterization.C)
    assert checkpoints.load_model(tmp_path / "changed").config == changed.config


def test_order_and_shifts_are_drawn_from_seed_and_epoch(tmp_path):
    images = torch.randint(0, 256, (100, 1, 4, 4), dtype=torch.uint8)
    labels = torch.arange(100)

    def draw_report(seed, epoch):
        recipe = config(tmp_path, seed=seed, augmentation=Augmentation(shift=1))
        batches = training._batches(images, labels, recipe, epoch)
        x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
        assert torch.equal(y.sort().values, labels)
        return x

    assert torch.equal(draw_report(1, 2), draw_report(1, 2))
    assert not torch.equal(draw_report(1, 2), draw_report(1, 3))
    assert not torch.equal(draw_report(1, 2), draw_report(2, 2))


# --- evaluation ------------------------------------------------------------------------------


def test_evaluation_is_consistent_and_finds_no_violation(run):
    report = evaluate(checkpoints.load_model(run), load("digits"), SHORT)
    assert report.violations == 0
    assert report.pairs == 205
    assert report.quotient <= report.bound <= report.promised_bound
    assert 1 <= report.tightness < 3
    assert report.certified_accuracy[0] == report.clean_accuracy > 0.6
    for certified, attacked in zip(report.certified_attacked, report.pgd_accuracy, strict=True):
        assert certified <= attacked
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert 100 * (1 - report.clean_accuracy) == pytest.approx(last["test_error_percent"], abs=0.6)
    assert json.dumps(report.to_dict())
    untightened = evaluate(
        checkpoints.load_model(run), load("digits"), dataclasses.replace(SHORT, bound="promised")
    )
    assert untightened.bound == report.promised_bound
    assert untightened.certified_accuracy[1] <= report.certified_accuracy[1]


def test_evaluation_counts_violations_of_a_false_bound(run, monkeypatch):
    model = checkpoints.load_model(run)
    honest = type(model).certificate

    def false(self, *bound):
        certificate = honest(self, *bound)
        return dataclasses.replace(certificate, bound=certificate.bound / 4)

    monkeypatch.setattr(type(model), "certificate", false)
    assert evaluate(model, load("digits"), SHORT).violations > 0


@pytest.mark.parametrize("gamma", [None, 1.0])
def test_monotone_and_feedthrough_models_can_be_evaluated(tmp_path, gamma):
    model = train(
        config(tmp_path / "run", gamma=gamma, learn_metric=False, feedthrough=gamma is not None,
               epochs=1)
    )  # fmt: skip
    report = evaluate(model, load("digits"), SHORT)
    assert report.violations == 0
    assert report.quotient <= report.bound < float("inf")
    assert (report.promised_bound is None) == (gamma is None)
    draw(report, tmp_path / "picture.png")
    assert ("promised γ         none" in table(report)) == (gamma is None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"radii": ()}, "radii must be at least 0"),
        ({"radii": (-1.0,)}, "radii must be at least 0"),
        ({"pairs": 0}, "pairs must be positive, got 0"),
    ],
)
def test_bad_evaluation_configurations(changes, message):
    with pytest.raises(ValueError, match=message):
        EvaluationConfig(**changes)


# --- command line ----------------------------------------------------------------------------


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
    _, record = checkpoints.load_config(folder)
    assert read(record) == EquilibriumTraining(
        out=folder, hidden=5, epochs=1, batch_size=300, ema=0.9, accumulate=2,
        loss=EMMA(radius=0.5, bound=3.2), optimizer=SGD(momentum=0.8),
        schedule=PiecewiseLinear(), augmentation=Augmentation(shift=1, reflect=True),
    )  # fmt: skip


def test_options_of_a_default_choice_need_not_name_it(tmp_path):
    words = f"train --out {tmp_path} --hidden 5 --epochs 1 --loss.offset 0.5 --schedule.warmup 0.3"
    assert cli.main(words.split()) == 0
    _, record = checkpoints.load_config(tmp_path)
    assert read(record).loss == CrossEntropy(offset=0.5)
    assert read(record).schedule == WarmupCosine(warmup=0.3)


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
    report = evaluate(model, load("digits"), SHORT)
    assert report.clean_accuracy > 0.7
    assert report.violations == 0
    assert report.certified_accuracy[1] <= report.pgd_accuracy[1]


def test_a_core_and_autocast_do_not_go_together():
    with pytest.raises(ValueError, match="do not support autocast"):
        FeedforwardTraining(core=4, autocast=True)

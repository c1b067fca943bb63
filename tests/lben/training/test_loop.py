"""The training loop with a model that it has never heard of, and with one of the library."""

import dataclasses
import json
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lben.data import load
from lben.models import (
    Architecture,
    Classifier,
    ConvolutionalEquilibriumArchitecture,
    FeedforwardArchitecture,
)
from lben.training import checkpoints
from lben.training.augmentation import Augmentation
from lben.training.checkpoints import CheckpointError
from lben.training.loop import Interrupted, _batches, error_rate, resume, train
from lben.training.losses import CrossEntropy, Hinge
from lben.training.optimization import SGD, Adam, AdamW, Constant, PiecewiseLinear, WarmupCosine
from lben.training.recipes import TrainingConfig
from tests.lben.runs import config, stripes


@dataclass(frozen=True, kw_only=True)
class TinyConfig:
    classes: int

    @property
    def architecture(self):
        return TinyArchitecture()

    def build(self):
        return Tiny(self)


class Tiny(Classifier):
    """Two convolutions and a matrix, with a running mean and a count in buffers."""

    gamma = None

    @property
    def stages(self):
        return (self.normalize,)

    def __init__(self, config):
        super().__init__((1, 8, 8), (0.0,), (1.0,))
        self.config = config
        self.convolutions = nn.Sequential(
            nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten()
        )
        self.matrix = nn.Linear(16, config.classes)
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("seen", torch.tensor(0))
        self.dtypes = set()

    def forward(self, x):
        x = self.normalize(x)
        if self.training:
            self.mean += 0.1 * (x.mean() - self.mean)
            self.seen += len(x)
        logits = self.matrix(self.convolutions(x))
        self.dtypes.add((self.training, logits.dtype))
        return logits

    def _certificate(self, bound):
        return dataclasses.replace(super()._certificate(bound), bound=99.0)


@dataclass(frozen=True, kw_only=True)
class TinyArchitecture(Architecture):
    supports: ClassVar[frozenset[str]] = frozenset({"channels_last", "autocast"})

    def for_data(self, data):
        return TinyConfig(classes=data.classes)


@pytest.fixture(autouse=True)
def _known(monkeypatch):
    monkeypatch.setitem(checkpoints.MODELS, "tiny", TinyConfig)


def tiny(folder, **changes):
    options = {"out": str(folder), "epochs": 2, "batch_size": 100, "lr": 0.02}
    return TrainingConfig(model=TinyArchitecture(), **{**options, **changes})


def read_metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def distance(a, b):
    a, b = a.state_dict(), b.state_dict()
    return max(float((a[k] - b[k]).abs().max()) for k in a)


def test_it_learns_and_its_folder_says_what_it_is(tmp_path):
    model = train(tiny(tmp_path, epochs=4))
    metrics = read_metrics(tmp_path)
    assert metrics[-1]["loss"] < 0.7 * metrics[0]["loss"]
    assert json.loads((tmp_path / "certificate.json").read_text())["bound"] == 99.0
    content = json.loads((tmp_path / "config.json").read_text())
    assert (content["model"]["kind"], content["training"]["kind"]) == ("tiny", "TrainingConfig")
    assert distance(checkpoints.load_model(tmp_path), model) == 0
    assert int(model.seen) == 4 * 1437


@pytest.mark.parametrize("steps", [0, 20, 31])
def test_weights_buffers_momentum_and_average_resume_to_the_same_bits(tmp_path, monkeypatch, steps):
    options = {"optimizer": SGD(), "schedule": PiecewiseLinear(), "ema": 0.95, "epochs": 3}
    whole = train(tiny(tmp_path / "whole", **options))
    original, count = PiecewiseLinear.__call__, [0]

    def stop(*arguments):
        count[0] += 1
        if count[0] > steps:
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(PiecewiseLinear, "__call__", stop)
        with pytest.raises(Interrupted):
            train(tiny(tmp_path / "part", **options))
    assert distance(resume(tmp_path / "part"), whole) == 0
    a, b = (load_file(tmp_path / name / "training.safetensors") for name in ("part", "whole"))
    assert a.keys() == b.keys()
    assert {"optimizer.0.momentum_buffer", "model.seen", "ema.steps"} < set(a)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_average_is_what_is_evaluated_and_saved(tmp_path):
    averaged = train(tiny(tmp_path / "averaged", ema=0.9))
    last = train(tiny(tmp_path / "last"))
    assert 1e-4 < distance(averaged, last) < 1
    data = load("digits")
    for name, model in (("averaged", averaged), ("last", last)):
        assert distance(checkpoints.load_model(tmp_path / name), model) == 0
        assert read_metrics(tmp_path / name)[-1]["test_error_percent"] == 100 * error_rate(
            model, data
        )
    raw = tiny(tmp_path).model.for_data(data).build()
    checkpoints.load_training(tmp_path / "last", raw, tiny(tmp_path).optimizer.build(raw))
    assert distance(raw, last) == 0
    with pytest.raises(CheckpointError, match="holds no average of this model: 'steps'"):
        train(tiny(tmp_path / "last", ema=0.9), resume=True)


@pytest.mark.parametrize("parts", [2, 3, 100])
def test_a_batch_in_parts_is_the_same_step(tmp_path, parts):
    """1437 samples end in a batch of 37, and 37 in parts of at most ⌈37/parts⌉."""
    options = {"optimizer": SGD(momentum=0.5), "loss": CrossEntropy(temperature=0.5, offset=0.5)}
    whole = train(tiny(tmp_path / "whole", **options))
    split = train(tiny(tmp_path / "split", accumulate=parts, **options))
    for name, value in whole.named_parameters():
        torch.testing.assert_close(split.get_parameter(name), value, atol=2e-5, rtol=0)
    losses = [read_metrics(tmp_path / name)[-1]["loss"] for name in ("whole", "split")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_channels_last_is_another_order_of_the_same_numbers(tmp_path):
    plain = train(tiny(tmp_path / "plain", epochs=1))
    moved = train(tiny(tmp_path / "moved", epochs=1, channels_last=True))
    kernel = moved.convolutions[2].weight
    assert kernel.is_contiguous(memory_format=torch.channels_last)
    assert not plain.convolutions[2].weight.is_contiguous(memory_format=torch.channels_last)
    assert distance(plain, moved) < 1e-3
    images, labels = torch.zeros(4, 3, 5, 5, dtype=torch.uint8), torch.arange(4)
    for recipe, layout in (
        (tiny(tmp_path, channels_last=True), torch.channels_last),
        (tiny(tmp_path, augmentation=Augmentation(shift=1)), torch.contiguous_format),
    ):
        ((x, _),) = _batches(images, labels, recipe, 0)
        assert x.is_contiguous(memory_format=layout)


@dataclass(frozen=True, kw_only=True)
class InFull(CrossEntropy):
    def __call__(self, logits, labels):
        assert logits.dtype == torch.float32
        return super().__call__(logits, labels)


def test_autocast_trains_in_bfloat16_and_evaluates_in_float32(tmp_path):
    model = train(tiny(tmp_path / "half", epochs=1, autocast=True, loss=InFull()))
    assert model.dtypes == {(True, torch.bfloat16), (False, torch.float32)}
    assert model.matrix.weight.dtype == torch.float32
    plain = train(tiny(tmp_path / "plain", epochs=1))
    assert plain.dtypes == {(True, torch.float32), (False, torch.float32)}
    assert 0 < distance(model, plain) < 0.1


def test_what_does_not_suit_the_data_is_refused_before_a_folder_is_made(tmp_path):
    with pytest.raises(ValueError, match="hue needs images of 3 channels, got 1"):
        train(tiny(tmp_path / "run", augmentation=Augmentation(hue=0.1)))
    assert not (tmp_path / "run").exists()


def test_a_model_that_could_not_be_loaded_again_is_not_trained(tmp_path, monkeypatch):
    monkeypatch.delitem(checkpoints.MODELS, "tiny")
    with pytest.raises(
        CheckpointError, match=r"TinyConfig has no name in lben\.training\.checkpoints"
    ):
        train(tiny(tmp_path))


@pytest.mark.gpu
def test_a_cuda_device_trains_with_everything_on_and_resumes(tmp_path):
    options = {
        "device": "cuda", "channels_last": True, "autocast": True, "accumulate": 2, "ema": 0.9,
        "augmentation": Augmentation(shift=1, reflect=True, flip=True, brightness=0.1),
    }  # fmt: skip
    whole = train(tiny(tmp_path / "whole", **options)).cpu()
    model = resume(tmp_path / "whole")  # already done: reads everything back
    assert next(model.parameters()).is_cuda
    assert (True, torch.bfloat16) in whole.dtypes
    assert distance(model.cpu(), whole) == 0


# --- a model of the library, on the digits -----------------------------------------------------


def same(a, b):
    assert all(torch.equal(a.state_dict()[k], v) for k, v in b.state_dict().items())


def test_a_run_leaves_whole_files_and_learns(digits_run):
    assert {p.name for p in digits_run.iterdir()} >= {
        "config.json", "model.safetensors", "certificate.json", "training.safetensors",
        "metrics.jsonl", "tensorboard",
    }  # fmt: skip
    metrics = [json.loads(line) for line in (digits_run / "metrics.jsonl").read_text().splitlines()]
    assert [m["epoch"] for m in metrics] == list(range(1, 9))
    assert metrics[-1]["test_error_percent"] < 40
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    certificate = json.loads((digits_run / "certificate.json").read_text())
    assert certificate["bound"] == pytest.approx(1 / load("digits").std[0], rel=1e-6)


def test_training_is_seeded(digits_run, tmp_path):
    same(train(config(tmp_path / "again")), checkpoints.load_model(digits_run))
    other = train(config(tmp_path / "other", seed=6, epochs=1))
    assert not torch.equal(
        other.layer.parameterization.U, checkpoints.load_model(digits_run).layer.parameterization.U
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
    digits_run, tmp_path, monkeypatch, steps
):
    folder = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        interrupt_after(patch, steps)
        with pytest.raises(Interrupted, match=f"continue with `lben resume {folder}`"):
            train(config(folder))
    same(resume(folder), checkpoints.load_model(digits_run))
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == list(range(1, 9))


def test_a_finished_run_is_not_overwritten(digits_run):
    with pytest.raises(CheckpointError, match="already holds a run: continue it with"):
        train(config(digits_run))


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
        batches = _batches(images, labels, recipe, epoch)
        x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
        assert torch.equal(y.sort().values, labels)
        return x

    assert torch.equal(draw_report(1, 2), draw_report(1, 2))
    assert not torch.equal(draw_report(1, 2), draw_report(1, 3))
    assert not torch.equal(draw_report(1, 2), draw_report(2, 2))


# --- data of one's own ------------------------------------------------------------------------


def own(folder, **changes):
    options = {"epochs": 3, "hidden": 5, "batch_size": 20}
    return config(folder, **{**options, **changes})


def test_own_data_take_the_place_of_named_ones(tmp_path):
    data = stripes(name="stripes")
    model = train(own(tmp_path, epochs=20), data)
    assert model.config == own(tmp_path).model.for_data(data)
    assert (model.shape, model.config.classes) == ((1, 4, 4), 3)
    assert error_rate(model, data) < 0.3
    record = json.loads((tmp_path / "config.json").read_text())["training"]
    assert record["own_data"] == {"name": "stripes", "fingerprint": data.fingerprint}
    assert not {"data", "root", "download", "model"} & set(record)
    same(checkpoints.load_model(tmp_path), model)


@pytest.mark.parametrize("steps", [0, 4, 8])
def test_a_run_on_own_data_resumes_to_the_same_weights(tmp_path, monkeypatch, steps):
    data = stripes()
    whole = train(own(tmp_path / "whole"), data)
    with monkeypatch.context() as patch:
        interrupt_after(patch, steps)
        with pytest.raises(Interrupted):
            train(own(tmp_path / "part"), data)
    again = dataclasses.replace(data, name="renamed")
    same(resume(tmp_path / "part", again), whole)
    same(train(own(tmp_path / "part"), data, resume=True), whole)


def test_a_run_is_continued_on_its_data_alone(tmp_path, digits_run):
    data = stripes()
    train(own(tmp_path), data)
    before = {p: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
    other = dataclasses.replace(data, test_labels=data.test_labels.flip(0))
    for call, message in (
        (lambda: resume(tmp_path), r"data of your own \('own', fingerprint .*resume\(folder, data"),
        (lambda: train(own(tmp_path), resume=True), "which it does not keep"),
        (
            lambda: resume(tmp_path, other),
            "on other data: expected 'own', .*, got 'own'",
        ),
        (lambda: resume(digits_run, data), "a run on digits, which it reads itself"),
    ):
        with pytest.raises(CheckpointError, match=message):
            call()
    assert {p: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()} == before


@pytest.mark.parametrize(
    ("part", "message"),
    [("train", "stripes has no train images"), ("test", "stripes has no test images")],
)
def test_own_data_without_images_are_refused_before_a_folder_is_made(tmp_path, part, message):
    data = stripes(name="stripes")
    empty = {f"{part}_{what}": getattr(data, f"{part}_{what}")[:0] for what in ("images", "labels")}
    with pytest.raises(ValueError, match=message):
        train(own(tmp_path / "run"), dataclasses.replace(data, **empty))
    assert not (tmp_path / "run").exists()


def test_own_data_are_a_data_set(tmp_path):
    with pytest.raises(ValueError, match=r"must be a Dataset, got a tuple: make one"):
        train(own(tmp_path / "run"), (torch.zeros(3), torch.zeros(3)))
    assert not (tmp_path / "run").exists()


def test_every_architecture_trains_on_own_data(tmp_path):
    data = stripes()
    for model in (
        ConvolutionalEquilibriumArchitecture(channels=(4,), pool=2),
        FeedforwardArchitecture(
            channels=(4,), depths=(1,), conv_hidden=4, pool=2, dense_depth=1, dense_hidden=8
        ),
    ):
        recipe = dataclasses.replace(own(tmp_path / type(model).__name__, epochs=1), model=model)
        trained = train(recipe, data)
        assert trained.config.architecture == model
        same(resume(recipe.out, data), trained)

"""Configurations of a run: what they refuse, and their way to JSON and back."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from benchmarks.mnist import MODELS, RECIPE
from lben.records import by_name, decode, encode
from lben.training import checkpoints
from lben.training.augmentation import Augmentation
from lben.training.losses import EMMA, CrossEntropy
from lben.training.optimization import SGD, Adam, Constant, PiecewiseLinear
from lben.training.recipes import (
    RECIPES,
    ConvolutionalEquilibriumTraining,
    EquilibriumTraining,
    TrainingConfig,
    read,
)

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results" / "mnist"
FULL = EquilibriumTraining(
    data="cifar10", root="data", gamma=None, epochs=3, accumulate=2, ema=0.99, lr=0.01,
    loss=EMMA(radius=0.1, bound=2.0), optimizer=Adam(betas=(0.5, 0.9), weight_decay=1e-4),
    schedule=PiecewiseLinear(), augmentation=Augmentation(shift=2, contrast=(0.5, 2.0)),
)  # fmt: skip


@pytest.mark.parametrize(
    "config",
    [EquilibriumTraining(), FULL, ConvolutionalEquilibriumTraining(channels=(8, 16))],
    ids=["default", "full", "convolutional"],
)
def test_a_recipe_survives_json(config):
    assert read(json.loads(json.dumps(encode(config)))) == config


def test_a_record_names_its_classes():
    record = encode(FULL)
    assert record["kind"] == "EquilibriumTraining"
    assert record["loss"] == {"kind": "EMMA", "radius": 0.1, "bound": 2.0}
    assert record["optimizer"]["betas"] == [0.5, 0.9]


@pytest.mark.parametrize("name", MODELS)
def test_runs_from_before_there_were_kinds_are_equilibrium_runs(name):
    _, record = checkpoints.load_config(RESULTS / name)
    assert "kind" not in record
    assert read(record) == replace(RECIPE, root="data", out=name, **MODELS[name])


def test_the_old_temperature_multiplied_the_logits():
    _, record = checkpoints.load_config(RESULTS / "1")
    config = read({**record, "temperature": 3.0, "weight_decay": 0.1})
    assert config.loss == CrossEntropy(scale=3.0)
    assert config.optimizer.weight_decay == 0.1
    with pytest.raises(TypeError, match="colour"):
        read({**record, "colour": 1})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"kind": "Mystery"}, ValueError, "unknown kind 'Mystery', expected EquilibriumTraining"),
        ({"loss": {"kind": "Adam"}}, ValueError, "'Adam', expected CrossEntropy or Hinge or EMMA"),
        ({"loss": {"kind": "EMMA"}}, TypeError, "radius"),
        ({"augmentation": {"shift": 1}}, ValueError, "unknown kind None, expected Augmentation"),
        ({"colour": {"kind": "Adam"}}, ValueError, "unknown kind 'Adam'"),
        ({"epochs": 0}, ValueError, "epochs must be positive"),
    ],
)
def test_records_that_fit_no_recipe_are_refused(change, error, message):
    with pytest.raises(error, match=message):
        read({**encode(FULL), **change})


@dataclass(frozen=True)
class Nested:
    rows: tuple[tuple[int, ...], ...]
    inner: SGD | Constant | None = None


@pytest.mark.parametrize("inner", [None, SGD(momentum=0.5), Constant()])
def test_nested_values_come_back_equal(inner):
    value = Nested(((1, 2), ()), inner)
    assert decode(json.loads(json.dumps(encode(value))), by_name(Nested)) == value


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs must be positive"),
        ({"lr": -1.0}, "lr must be positive"),
        ({"tol": float("nan")}, "tol must be positive"),
        ({"tol": 1.0}, "tol must be below 1"),
        ({"accumulate": 0}, "accumulate must be positive"),
        ({"accumulate": 9, "batch_size": 8}, "accumulate must be at most batch_size 8, got 9"),
        ({"ema": 1.0}, r"ema must be a decay in \(0, 1\) or None"),
        ({"autocast": True}, "EquilibriumTraining does not support autocast: leave it off"),
        ({"channels_last": True}, "EquilibriumTraining does not support channels_last"),
    ],
)
def test_bad_recipes(changes, message):
    with pytest.raises(ValueError, match=message):
        EquilibriumTraining(**changes)


def test_a_recipe_needs_a_model():
    ours = [c for c in TrainingConfig.__subclasses__() if c.__module__.startswith("lben.")]
    assert set(RECIPES) == {c.__name__ for c in ours}
    with pytest.raises(TypeError, match=r"abstract method '?model"):
        TrainingConfig()

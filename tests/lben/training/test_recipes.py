"""Configurations of a run: what they refuse, and their way to JSON and back."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.mnist import MODELS, RECIPE
from lben.models import (
    ConvolutionalEquilibriumArchitecture,
    FeedforwardArchitecture,
)
from lben.records import encode
from lben.training import checkpoints
from lben.training.augmentation import Augmentation
from lben.training.losses import EMMA
from lben.training.optimization import Adam, PiecewiseLinear
from lben.training.recipes import TrainingConfig, read
from tests.lben.runs import equilibrium, stripes

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results" / "mnist"
FULL = equilibrium(
    data="cifar10", root="data", gamma=None, epochs=3, accumulate=2, ema=0.99, lr=0.01,
    loss=EMMA(radius=0.1, bound=2.0), optimizer=Adam(betas=(0.5, 0.9), weight_decay=1e-4),
    schedule=PiecewiseLinear(), augmentation=Augmentation(shift=2, contrast=(0.5, 2.0)),
)  # fmt: skip


DATA = stripes()


def stored(config):
    """The two parts of a configuration, after JSON."""
    record = encode(config)
    del record["model"]
    return json.loads(json.dumps(record)), config.model.for_data(DATA)


@pytest.mark.parametrize(
    "config",
    [
        equilibrium(), FULL,
        TrainingConfig(model=ConvolutionalEquilibriumArchitecture(channels=(8, 16))),
        TrainingConfig(model=FeedforwardArchitecture(block="aol"), autocast=True),
    ],
    ids=["default", "full", "convolutional", "feedforward"],
)  # fmt: skip
def test_a_recipe_survives_json(config):
    assert read(*stored(config)) == config


def test_a_record_names_its_classes():
    record = encode(FULL)
    assert record["kind"] == "TrainingConfig"
    assert record["model"]["kind"] == "EquilibriumArchitecture"
    assert record["loss"] == {"kind": "EMMA", "radius": 0.1, "bound": 2.0}
    assert record["optimizer"]["betas"] == [0.5, 0.9]


@pytest.mark.parametrize("name", MODELS)
def test_stored_runs_say_how_they_were_trained(name):
    model, record = checkpoints.load_config(RESULTS / name)
    expected = replace(RECIPE, model=MODELS[name], root="data", out=name)
    found = read(record, model)
    assert replace(found, model=replace(found.model, max_steps=5000)) == expected


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"kind": "Mystery"}, ValueError, "unknown kind 'Mystery', expected TrainingConfig"),
        ({"loss": {"kind": "Adam"}}, ValueError, "'Adam', expected CrossEntropy or Hinge or EMMA"),
        ({"loss": {"kind": "EMMA"}}, TypeError, "radius"),
        ({"augmentation": {"shift": 1}}, ValueError, "unknown kind None, expected Augmentation"),
        ({"colour": {"kind": "Adam"}}, ValueError, "unknown kind 'Adam'"),
        ({"epochs": 0}, ValueError, "epochs must be positive"),
    ],
)
def test_records_that_fit_no_recipe_are_refused(change, error, message):
    with pytest.raises(error, match=message):
        record, model = stored(FULL)
        read({**record, **change}, model)


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
        ({"autocast": True}, "EquilibriumArchitecture does not support autocast .*: leave it off"),
        ({"channels_last": True}, "EquilibriumArchitecture does not support channels_last"),
    ],
)
def test_bad_recipes(changes, message):
    with pytest.raises(ValueError, match=message):
        equilibrium(**changes)


def test_a_recipe_needs_a_model():
    with pytest.raises(TypeError, match="model"):
        TrainingConfig()


def test_a_core_and_autocast_do_not_go_together():
    with pytest.raises(
        ValueError,
        match="FeedforwardArchitecture does not support autocast",
    ):
        TrainingConfig(model=FeedforwardArchitecture(core=4), autocast=True)

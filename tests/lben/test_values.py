"""Configurations hold plain Python, whatever they are made from, and refuse other kinds by name."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from lben.evaluation.accuracy import EvaluationConfig
from lben.evaluation.proofs import CertificationConfig
from lben.models import (
    ConvolutionalEquilibriumArchitecture,
    ConvolutionalEquilibriumClassifierConfig,
    EquilibriumArchitecture,
    EquilibriumClassifierConfig,
    FeedforwardArchitecture,
    FeedforwardClassifierConfig,
    ImageTask,
)
from lben.records import encode, to_json
from lben.training.augmentation import Augmentation
from lben.training.losses import EMMA, CrossEntropy, Hinge
from lben.training.optimization import SGD, Adam, AdamW, WarmupCosine
from lben.training.recipes import TrainingConfig
from tests.lben.runs import equilibrium

IMAGES = {"shape": (1, 4, 4), "classes": 3, "mean": (0.25,), "std": (0.5,)}
DENSE = EquilibriumArchitecture()
NAMES = (
    "Adam AdamW Augmentation CertificationConfig ConvolutionalEquilibriumArchitecture "
    "ConvolutionalEquilibriumClassifierConfig CrossEntropy EMMA EquilibriumArchitecture "
    "EquilibriumClassifierConfig EvaluationConfig FeedforwardArchitecture "
    "FeedforwardClassifierConfig Hinge ImageTask SGD TrainingConfig WarmupCosine"
)
CLASSES = {name: globals()[name] for name in NAMES.split()}
ODD = {  # what users have at hand, and the plain value that it stands for
    "numpy": (np.float32(0.5), np.int64(3), np.array([0.5, 0.75]), np.bool_(True)),
    "torch": (torch.tensor(0.5), torch.tensor(3), torch.tensor([0.5, 0.75]), torch.tensor(True)),
    "lists": (0.5, 3, [0.5, 0.75], True),
    "bfloat16": (
        torch.tensor(0.5, dtype=torch.bfloat16), np.uint8(3),
        torch.tensor([0.5, 0.75], dtype=torch.bfloat16), np.True_,
    ),
}  # fmt: skip


@pytest.mark.parametrize("given", ODD.values(), ids=ODD)
def test_values_of_other_libraries_become_plain(given):
    half, three, two, true = given
    made = [
        TrainingConfig(model=DENSE, out=Path("a/b"), epochs=three, autocast=not true, lr=half),
        EquilibriumArchitecture(gamma=half, feedthrough=true),
        ConvolutionalEquilibriumArchitecture(channels=[three, 4], circular=true),
        FeedforwardArchitecture(channels=np.array([8]), depths=[three]),
        ImageTask(**{**IMAGES, "mean": two[:1], "std": [half]}),
        EquilibriumClassifierConfig(**{**IMAGES, "mean": two[:1], "std": [half]}, hidden=three),
        FeedforwardClassifierConfig(**{**IMAGES, "shape": [1, 4, 4]}, depths=[three]),
        ConvolutionalEquilibriumClassifierConfig(**IMAGES, channels=[three]),
        EvaluationConfig(radii=two, pairs=three, tol=half),
        CertificationConfig(radii=two, samples=three, local=true),
        CrossEntropy(scale=half), Hinge(margin=half), EMMA(radius=half, bound=three),
        AdamW(betas=two), Adam(weight_decay=half), SGD(momentum=half), WarmupCosine(warmup=half),
        Augmentation(shift=three, flip=true, contrast=two),
    ]  # fmt: skip
    assert {type(m).__name__ for m in made} == set(CLASSES)
    plain = (int, float, bool, str, type(None))
    for config in made:
        for f in dataclasses.fields(config):
            value = getattr(config, f.name)
            for item in value if isinstance(value, tuple) else (value,):
                assert type(item) in plain or dataclasses.is_dataclass(item), (f.name, item)
        assert eval(repr(config), dict(CLASSES)) == config
        to_json(encode(config))
    assert made[0].out == str(Path("a/b"))
    assert made[1].gamma == 0.5
    assert made[-1].contrast == (0.5, 0.75)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: equilibrium(epochs="3"),
            r"epochs must be an integer, got '3' \(str\)",
        ),
        (lambda: equilibrium(epochs=2.0), "epochs must be an integer, got 2.0"),
        (lambda: equilibrium(epochs=True), "epochs must be an integer, got True"),
        (lambda: equilibrium(lr="0.1"), "lr must be a number, got '0.1'"),
        (lambda: equilibrium(lr=torch.tensor([0.1])), "lr must be a number"),
        (
            lambda: equilibrium(lr=float("nan")),
            "lr must be positive and finite, got nan",
        ),
        (lambda: equilibrium(lr=10**400), "lr must be a number"),
        (lambda: EquilibriumArchitecture(gamma="1"), "gamma must be a number or None, got '1'"),
        (lambda: EquilibriumArchitecture(gamma=-1.0), "gamma must be a positive"),
        (lambda: EquilibriumArchitecture(gamma=float("inf")), "gamma must be a positive"),
        (
            lambda: EquilibriumArchitecture(feedthrough=1),
            "feedthrough must be True or False, got 1",
        ),
        (lambda: EquilibriumArchitecture(activation="sigmoid"), "activation must be one of relu, "),
        (lambda: equilibrium(data="imagenet"), "data must be one of digits, mnist"),
        (
            lambda: equilibrium(loss="hinge"),
            "loss must be a CrossEntropy or a Hinge or",
        ),
        (lambda: equilibrium(optimizer=SGD), "optimizer must be a AdamW or"),
        (lambda: equilibrium(out=3), r"out must be text, got 3 \(int\)"),
        (lambda: equilibrium(out=""), "out must name the folder"),
        (lambda: equilibrium(seed=2**62), r"seed must be an integer below 2\^40"),
        (lambda: TrainingConfig(model=IMAGES), "model must be the architecture .*, got dict"),
        (lambda: TrainingConfig(model=ImageTask(**IMAGES)), "got ImageTask"),
        (lambda: ConvolutionalEquilibriumArchitecture(channels=()), "channels must be positive"),
        (lambda: ConvolutionalEquilibriumArchitecture(channels="12"), "channels must be a tuple"),
        (lambda: ConvolutionalEquilibriumArchitecture(channels=8), "channels must be a tuple"),
        (lambda: Augmentation(contrast=(1.0,)), "contrast must be a tuple of 2"),
        (lambda: EvaluationConfig(radii="0.5"), "radii must be a tuple"),
        (lambda: EvaluationConfig(radii=(0.5, True)), "radii must be a tuple"),
        (lambda: EvaluationConfig(bound="best"), "bound must be one of promised, .* or None"),
        (lambda: CertificationConfig(local="no"), "local must be True or False"),
        (lambda: CertificationConfig(samples=1.5), "samples must be an integer"),
        (lambda: CrossEntropy(scale=True), "scale must be a number, got True"),
        (lambda: SGD(momentum=float("nan")), r"momentum must lie in \[0, 1\)"),
    ],
)
def test_other_kinds_are_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()

"""Short runs on the digits, as several tests have them."""

from dataclasses import fields

import torch

from lben.data import Dataset
from lben.evaluation.accuracy import EvaluationConfig
from lben.models import EquilibriumArchitecture
from lben.training import TrainingConfig

MODEL = {f.name for f in fields(EquilibriumArchitecture)}


def equilibrium(**options):
    """The configuration of a run; options of its architecture and of the training alike."""
    model = {name: options.pop(name) for name in MODEL & set(options)}
    return TrainingConfig(model=EquilibriumArchitecture(**model), **options)


def config(folder, **changes):
    options = {
        "out": str(folder), "hidden": 16, "epochs": 8, "lr": 0.02, "batch_size": 64, "seed": 5,
    }  # fmt: skip
    return equilibrium(**{**options, **changes})


def stripes(samples=90, classes=3, **options):
    """Images whose bright row is their class."""
    labels = torch.arange(samples) % classes
    images = torch.randint(0, 60, (samples, 1, 4, 4), dtype=torch.uint8)
    images[torch.arange(samples), 0, labels] += 150
    half = samples // 2
    return Dataset.from_tensors(
        images[:half], labels[:half], images[half:], labels[half:], **options
    )


SHORT = EvaluationConfig(
    radii=(0.0, 0.5), attack_samples=20, pgd_steps=5, pgd_restarts=1, pairs=200, ascent_pairs=5,
    ascent_steps=5,
)  # fmt: skip

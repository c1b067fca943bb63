"""What a classifier is configured of: an architecture and a task, and what they refuse."""

import dataclasses
import math

import numpy as np
import pytest

from lben.models import (
    ConvolutionalEquilibriumArchitecture,
    ConvolutionalEquilibriumClassifierConfig,
    EquilibriumArchitecture,
    EquilibriumClassifierConfig,
    FeedforwardArchitecture,
    FeedforwardClassifierConfig,
    ImageTask,
)
from lben.models.configuration import check_channels, check_kernel
from tests.lben.runs import stripes

IMAGES = {"shape": (1, 4, 4), "classes": 3, "mean": (0.25,), "std": (0.5,)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": (4, 4)}, "shape must be a tuple of 3, every entry an integer"),
        ({"shape": (0, 4, 4)}, "shape must be positive"),
        ({"shape": (1.0, 4, 4)}, "shape must be a tuple of 3"),
        ({"shape": (3, 4, 4)}, "mean must have one number for each of the 3 channels"),
        ({"std": (0.5, 0.5)}, "std must have one number for each of the 1 channels"),
        ({"std": (0.0,)}, "std must be positive"),
        ({"std": (float("nan"),)}, "std must be positive"),
        ({"mean": (float("nan"),)}, "mean must be finite"),
        ({"classes": 1}, "classes must be at least 2, got 1"),
        ({"classes": True}, "classes must be an integer"),
    ],
)
@pytest.mark.parametrize(
    "kind",
    [
        EquilibriumClassifierConfig, ConvolutionalEquilibriumClassifierConfig,
        FeedforwardClassifierConfig,
    ],
)  # fmt: skip
def test_images_and_classes_must_fit(kind, changes, message):
    with pytest.raises(ValueError, match=message):
        kind(**{**IMAGES, **changes})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EquilibriumClassifierConfig(**IMAGES, hidden=0), "hidden must be positive"),
        (lambda: EquilibriumClassifierConfig(**IMAGES, max_steps=0), "max_steps must be positive"),
        (lambda: EquilibriumClassifierConfig(**IMAGES, gamma=0), "gamma must be a positive"),
        (lambda: ConvolutionalEquilibriumClassifierConfig(**IMAGES, kernel_size=2), "be odd"),
        (lambda: ConvolutionalEquilibriumClassifierConfig(**IMAGES, channels=(4, 0)), "channels"),
        (lambda: FeedforwardClassifierConfig(**IMAGES, dense_hidden=0), "dense_hidden must be pos"),
        (lambda: FeedforwardClassifierConfig(**IMAGES, head="columns"), "head must be one of rows"),
    ],
)
def test_sizes_of_models_are_checked_at_construction(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_what_the_data_decide_is_taken_from_them():
    data = stripes()
    dense = EquilibriumArchitecture(hidden=7, gamma=3.0).for_data(data)
    assert (dense.shape, dense.classes) == ((1, 4, 4), 3)
    assert (dense.mean, dense.std) == (data.mean, data.std)
    assert dense.architecture == EquilibriumArchitecture(hidden=7, gamma=3.0)
    assert FeedforwardArchitecture(pool=2).for_data(data).std == (1.0,)  # shifted alone


def test_an_architecture_and_a_task_make_a_configuration():
    task = ImageTask(**IMAGES)
    for architecture in (
        EquilibriumArchitecture(hidden=7), ConvolutionalEquilibriumArchitecture(channels=(3,)),
        FeedforwardArchitecture(block="aol"),
    ):  # fmt: skip
        made = architecture.for_data(task)
        names = {f.name for f in dataclasses.fields(made)}
        assert names == {
            f.name for f in (*dataclasses.fields(architecture), *dataclasses.fields(task))
        }
        assert made.architecture == architecture
        assert made.architecture.for_data(made) == made


CONFIG = EquilibriumClassifierConfig(shape=(2, 4, 4), classes=3, mean=(0.5,) * 2, std=(0.5,) * 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": 1}, "classes must be at least 2, got 1"),
        ({"mean": (0.5,)}, "mean must have one number for each of the 2 channels"),
        ({"std": (0.5,) * 3}, "std must have one number for each of the 2 channels"),
        ({"mean": (0.5, math.nan)}, "mean must be finite"),
        ({"std": (0.5, 0.0)}, "std"),
        ({"shape": (2, 0, 4)}, "shape"),
        ({"hidden": 0}, "hidden"),
        ({"tol": -1.0}, "tol"),
        ({"gamma": -1.0}, "gamma must be a positive"),
    ],
)
def test_parts_that_do_not_fit_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)


def test_numbers_become_plain():
    config = dataclasses.replace(CONFIG, classes=np.int64(4))
    assert type(config.classes) is int


def test_channels_and_kernels():
    check_channels((3, 1))
    check_kernel(5)
    for channels in ((), (3, 0)):
        with pytest.raises(ValueError, match="channels must be positive numbers"):
            check_channels(channels)
    for size in (0, 2, -3):
        with pytest.raises(ValueError, match="kernel_size must be odd and positive"):
            check_kernel(size)

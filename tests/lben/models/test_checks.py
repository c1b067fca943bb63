"""Configurations whose parts do not belong together are refused by name."""

import dataclasses
import math

import numpy as np
import pytest
from lben.models.checks import check_channels, check_kernel

from lben import EquilibriumClassifierConfig

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

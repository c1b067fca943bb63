"""The digits that need no file."""

import sys

import pytest
import torch

from lben.data import DataError, load, pixels


def test_digits_are_embedded_and_fixed():
    first, second = load("digits"), load("digits")
    assert first.shape == (1, 8, 8)
    assert (len(first.train_labels), len(first.test_labels)) == (1437, 360)
    assert torch.equal(first.train_images, second.train_images)
    assert int(first.train_images.max()) == 255
    scaled = pixels(first.train_images, torch.float64)
    assert first.mean[0] == pytest.approx(float(scaled.mean()), abs=1e-4)
    assert first.std[0] == pytest.approx(float(scaled.std()), abs=1e-4)


def test_digits_without_scikit_learn_name_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match=r"scikit-learn, which is not installed: pip install 'lben"):
        load("digits")

"""Sizes of a checkpoint say which images it is for."""

import pytest

from lben.interop.checkpoints.tasks import CIFAR10, MNIST, task_for
from lben.models import ImageTask


def test_known_images_are_found_by_their_sizes():
    assert task_for(None, 784, 10, MNIST, CIFAR10) == MNIST
    assert task_for(None, 3072, 10, MNIST, CIFAR10) == CIFAR10
    own = ImageTask(shape=(4, 14, 14), classes=10, mean=(0.0,) * 4, std=(1.0,) * 4)
    assert task_for(own, 784, 10, MNIST, CIFAR10) == own


def test_other_sizes_are_named():
    with pytest.raises(ValueError, match="784 inputs and 11 outputs, and no data set"):
        task_for(None, 784, 11, MNIST)
    with pytest.raises(ValueError, match=r"784 inputs and 10 outputs, which does not fit"):
        task_for(CIFAR10, 784, 10, MNIST)

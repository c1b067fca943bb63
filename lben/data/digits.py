"""Which data need no files? The digits inside scikit-learn: 1,437 to train on, 360 to test."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from lben.data.base import DataError, Dataset


def read_digits() -> Dataset:
    """Return the 8 × 8 digits of scikit-learn in a fixed order.

    Raises:
        DataError: if scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(
            "the digits come with scikit-learn, which is not installed: pip install 'lben[cli]', "
            "or give other data"
        ) from error
    found = load_digits()
    images = torch.from_numpy(np.rint(found.images * (255 / 16)).astype(np.uint8))[:, None]
    labels = torch.from_numpy(found.target.astype(np.int64))
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(images)))
    train, test = order[:1437], order[1437:]
    data = Dataset.from_tensors(
        images[train], labels[train], images[test], labels[test], name="digits", classes=10
    )
    return replace(
        data,
        mean=tuple(round(number, 4) for number in data.mean),
        std=tuple(round(number, 4) for number in data.std),
    )
